"""What the API keeps for its clients."""

from __future__ import annotations

from django.db import models
from django.utils import timezone


class StoredResponseQuerySet(models.QuerySet["StoredResponse"]):
    def for_project(self, project_id: int) -> StoredResponseQuerySet:
        """Those that this project's keys may see."""
        return self.filter(project_id=project_id, expires_at__gte=timezone.now())


class StoredResponse(models.Model):
    """An answer of /v1/responses, one turn of a conversation. Always asked for through `for_project`: what is
    another project's, or expired, is not there."""

    id = models.CharField(primary_key=True, max_length=64, editable=False)
    project_id = models.BigIntegerField(
        editable=False, help_text="No foreign key: a project may go before what it leaves expires."
    )
    previous_id = models.CharField(
        max_length=64, blank=True, editable=False, help_text="The response that this one is built on."
    )
    created_at = models.DateTimeField(editable=False)
    expires_at = models.DateTimeField(db_index=True, editable=False)
    # JSON as text: PostgreSQL's own JSON cannot hold everything that a model may say.
    items = models.TextField(editable=False, help_text="The input items, JSON.")
    answer = models.TextField(editable=False, help_text="The response, JSON.")

    objects = StoredResponseQuerySet.as_manager()

    def __str__(self) -> str:
        return self.id
