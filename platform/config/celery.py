"""Control's Celery app. Nothing exists only here or in Redis: tasks derive their work from the database."""

from __future__ import annotations

from celery import Celery

# Without Celery's Django fixup: `manage.py control` has set Django up, tasks see to their own database
# connections, and the fixup would load every URL and close every connection before each task.
app = Celery("roundhouse", fixups=())
app.config_from_object("django.conf:settings", namespace="CELERY")
app.autodiscover_tasks(["inference", "openai_api"])
