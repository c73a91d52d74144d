"""Deployments: the wish. Reconcile sees it and acts; nothing here touches a process."""

from __future__ import annotations

from typing import Any

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Max

from registry.actions.events import publish_change, record_event
from registry.errors import StillInUse
from registry.models import Deployment, DeploymentRevision, Event, LanguageModel, Route, RouteTarget
from registry.querysets import database_now
from registry.upstreams import check_key, seal, unseal, url_of


@transaction.atomic
def save_deployment(*, deployment: Deployment, by: str, upstream_key: str | None = None) -> Deployment:
    """Create or change a wish, checked whole. What workers are started from becomes a new revision.

    `upstream_key` is the key of the server behind it; empty: it needs none. None: as it is, which is none
    after a change of the URL: a key goes to the server that it was given for, and no other.

    Raises ValidationError naming the field.
    """
    deployment.full_clean(exclude=["revision"])
    about_key = _keep_key(deployment, upstream_key)
    is_new = deployment.pk is None
    deployment.wish_changed_at = database_now()
    deployment.save()
    started_from = _started_from(deployment)
    current = deployment.revision
    if (
        current is None
        or about_key  # which revisions do not hold: workers that have the old one are replaced all the same
        or any(getattr(current, field) != value for field, value in started_from.items())
    ):
        deployment.revision = _new_revision(deployment, by)
        deployment.save(update_fields=["revision"])
    record_event(
        deployment,
        "created" if is_new else "changed",
        reason=about_key,
        by=by,
        data={
            "replicas": deployment.replicas,
            "revision": deployment.revision.number if deployment.revision else None,
        },
    )
    publish_change("deployment", str(deployment.pk))
    return deployment


def _keep_key(deployment: Deployment, key: str | None) -> str:
    """Set, clear or keep the upstream key; what was done with it, in words."""
    url = url_of(deployment)
    if key:
        if not url:
            raise ValidationError({"upstream_key": "Only a deployment of the upstream engine has one."})
        try:
            check_key(key)
        except ValidationError as error:
            raise ValidationError({"upstream_key": error.messages}) from None
        if unseal(deployment.upstream_key, url) == key:
            return ""
        deployment.upstream_key = seal(key, url)
        return "the upstream key was set"
    if not deployment.upstream_key or (key is None and unseal(deployment.upstream_key, url)):
        return ""
    deployment.upstream_key = ""
    return "the upstream key was cleared" if key == "" else "the URL changed: the upstream key was cleared"


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
    upstream_key: str | None = None,
    **wish: Any,
) -> Deployment:
    """Create a deployment and, with `route`, the public name that points to it."""
    deployment = save_deployment(
        deployment=Deployment(name=name, language_model=language_model, **wish),
        by=by,
        upstream_key=upstream_key,
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
