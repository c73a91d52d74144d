from django.apps import AppConfig


class RoundhouseConfig(AppConfig):
    """Makes the project's own commands (`up`, `down`, `gateway`, `control`) known to Django."""

    name = "config"
    label = "roundhouse"
    verbose_name = "Roundhouse"
