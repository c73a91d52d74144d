"""Deployments: the wish. Reconcile sees it and acts; nothing here touches a process."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import Max

from registry.actions.events import publish_change, record_event
from registry.errors import StillInUse
from registry.models import Deployment, DeploymentRevision, Event, LanguageModel, Route, RouteTarget
from registry.querysets import database_now


@transaction.atomic
def save_deployment(*, deployment: Deployment, by: str) -> Deployment:
    """Create or change a wish, checked whole. What workers are started from becomes a new revision.

    Raises ValidationError naming the field.
    """
    deployment.full_clean(exclude=["revision"])
    is_new = deployment.pk is None
    deployment.wish_changed_at = database_now()
    deployment.save()
    started_from = _started_from(deployment)
    current = deployment.revision
    if current is None or any(getattr(current, field) != value for field, value in started_from.items()):
        deployment.revision = _new_revision(deployment, by)
        deployment.save(update_fields=["revision"])
    record_event(
        deployment,
        "created" if is_new else "changed",
        by=by,
        data={
            "replicas": deployment.replicas,
            "revision": deployment.revision.number if deployment.revision else None,
        },
    )
    publish_change("deployment", str(deployment.pk))
    return deployment


def _started_from(deployment: Deployment) -> dict[str, Any]:
    """The part of the wish that a running worker cannot change: a difference means a new revision."""
    return {
        "language_model": deployment.language_model,
        "source": deployment.language_model.source,
        "chat_template": deployment.language_model.chat_template,
        "engine": deployment.engine,
        "arguments": deployment.arguments,
        "environment": deployment.environment,
        "slots": deployment.slots,
    }


def _new_revision(deployment: Deployment, by: str) -> DeploymentRevision:
    last = deployment.revisions.aggregate(last=Max("number"))["last"] or 0
    return DeploymentRevision.objects.create(
        deployment=deployment, number=last + 1, created_by=by, **_started_from(deployment)
    )


@transaction.atomic
def deploy(
    *,
    name: str,
    language_model: LanguageModel,
    by: str,
    route: str | None = None,
    **wish: Any,
) -> Deployment:
    """Create a deployment and, with `route`, the public name that points to it."""
    deployment = save_deployment(
        deployment=Deployment(name=name, language_model=language_model, **wish), by=by
    )
    if route is not None:
        target, created = Route.objects.get_or_create(name=route)
        RouteTarget.objects.create(route=target, deployment=deployment)
        if created:
            record_event(target, "created", by=by)
        publish_change("route", target.name)
    return deployment


@transaction.atomic
def scale_deployment(*, deployment: Deployment, replicas: int, by: str) -> None:
    """Wish for this many replicas; 0 drains and stops them all."""
    deployment.replicas = replicas
    deployment.clean_fields(exclude=["revision"])
    Deployment.objects.filter(pk=deployment.pk).update(replicas=replicas, wish_changed_at=database_now())
    record_event(deployment, "scaled", reason=f"to {replicas} replicas", by=by, data={"replicas": replicas})
    publish_change("deployment", str(deployment.pk))


def replicas_before_stop(deployment: Deployment) -> int:
    """How many replicas were last wished for before 0; 1 when the timeline does not tell."""
    timeline = Event.objects.filter(kind="deployment", object_id=deployment.pk)[:50]
    for event in timeline:
        replicas = event.data.get("replicas") if isinstance(event.data, dict) else None
        if isinstance(replicas, int) and replicas > 0:
            return replicas
    return 1


@transaction.atomic
def restart_deployment(*, deployment: Deployment, by: str) -> None:
    """Replace its workers one by one by new ones of the same wish; one that gave up starts again.

    The wish becomes a new revision, like the last but for its number: reconcile needs to know no more.
    """
    held = Deployment.objects.select_for_update().get(pk=deployment.pk)
    held.revision = _new_revision(held, by)
    held.wish_changed_at = database_now()
    held.save(update_fields=["revision", "wish_changed_at"])
    record_event(
        held,
        "restarted",
        reason="its workers are replaced one by one",
        by=by,
        data={"replicas": held.replicas, "revision": held.revision.number},
    )
    publish_change("deployment", str(held.pk))


@transaction.atomic
def retry_deployment(*, deployment: Deployment, by: str) -> None:
    """Forget past failures: a deployment that gave up starts again."""
    Deployment.objects.filter(pk=deployment.pk).update(wish_changed_at=database_now())
    record_event(deployment, "retried", by=by)
    publish_change("deployment", str(deployment.pk))


@transaction.atomic
def delete_deployment(*, deployment: Deployment, by: str) -> None:
    """Delete a deployment that runs nothing. Raises StillInUse while it has live workers."""
    live = deployment.workers.live().count()
    if live:
        raise StillInUse(f"{deployment} still has {live} live worker(s); scale it to 0 first.")
    record_event(deployment, "deleted", by=by)
    publish_change("deployment", str(deployment.pk))
    Deployment.objects.filter(pk=deployment.pk).update(revision=None)
    deployment.delete()
