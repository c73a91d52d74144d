"""Control's task for what the API keeps. Scheduled in the settings."""

from __future__ import annotations

from celery import shared_task

from inference.tasks import one_at_a_time
from openai_api.responses.store import forget_expired

BATCHES = 20
"""What is left over after so many waits for the next time."""


@shared_task(name="openai_api.forget_responses")  # type: ignore[untyped-decorator]
@one_at_a_time
def forget_responses() -> None:
    """Delete responses that are no longer kept."""
    for _ in range(BATCHES):
        if not forget_expired():
            return
