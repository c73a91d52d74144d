"""Control's Celery app. Nothing exists only here or in Redis: tasks derive their work from the database."""

from __future__ import annotations

from celery import Celery

app = Celery("roundhouse")
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["inference"])
