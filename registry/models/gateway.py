from django.db import models


class Gateway(models.Model):
    """A gateway that listens. A worker's silence counts only while one was there to hear it."""

    name = models.CharField(max_length=80, unique=True)
    listening_since = models.DateTimeField(help_text="Start of its present unbroken presence.")
    seen_at = models.DateTimeField()

    class Meta:
        ordering = ["name"]

    def __str__(self) -> str:
        return self.name
