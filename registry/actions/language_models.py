"""Language models and their copies on nodes."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from registry.actions.deployments import save_deployment
from registry.actions.events import publish_change, record_event
from registry.errors import StillInUse
from registry.models import Deployment, LanguageModel, ModelCopy, Node
from registry.states import CopyState


@transaction.atomic
def add_language_model(*, name: str, source: str, by: str, chat_template: str = "") -> LanguageModel:
    """Register a model. The source is not fetched until a deployment needs it."""
    language_model = LanguageModel(name=name, source=source, chat_template=chat_template)
    language_model.full_clean()
    language_model.save()
    record_event(language_model, "added", by=by, data={"source": source})
    return language_model


@transaction.atomic
def change_language_model(*, language_model: LanguageModel, by: str) -> None:
    """Save edits. Deployments of it get a new revision where it matters to a running worker."""
    language_model.full_clean()
    language_model.save()
    record_event(language_model, "changed", by=by, data={"source": language_model.source})
    publish_change("language_model", str(language_model.pk))
    for deployment in language_model.deployments.select_related("revision"):
        deployment.language_model = language_model
        save_deployment(deployment=deployment, by=by)


@transaction.atomic
def delete_language_model(*, language_model: LanguageModel, by: str) -> None:
    """Delete a model and what is known of its copies; files on nodes stay. Raises StillInUse."""
    used = (
        Deployment.objects.filter(
            Q(language_model=language_model) | Q(revisions__language_model=language_model)
        )
        .distinct()
        .count()
    )
    if used:
        raise StillInUse(
            f"{language_model} is, or was in an earlier revision, the model of {used} deployment(s); "
            "delete them first."
        )
    record_event(language_model, "deleted", by=by)
    publish_change("language_model", str(language_model.pk))
    language_model.delete()


@transaction.atomic
def record_copy(*, node: Node, language_model_id: int, state: CopyState, **facts: Any) -> None:
    """Note how far a model's files are on a node.

    `facts`: step, done, total, unit, size_bytes, sha256, detail.
    """
    if not LanguageModel.objects.filter(pk=language_model_id).exists():
        # Deleted while its files were on the way.
        return
    facts["detail"] = facts.get("detail", "")[:1000]
    before = ModelCopy.objects.filter(node=node, language_model_id=language_model_id).first()
    copy, _ = ModelCopy.objects.update_or_create(
        node=node,
        language_model_id=language_model_id,
        defaults={"state": state, "updated_at": timezone.now(), **facts},
    )
    if before is None or before.state != state:
        record_event(copy, state, reason=facts["detail"], by=f"agent {node.name}")


@transaction.atomic
def note_context_length(*, language_model_id: int, context_length: int) -> None:
    """Note what the engine tells of the model; gateways hear of it only when it is news."""
    changed = (
        LanguageModel.objects.filter(pk=language_model_id)
        .exclude(context_length=context_length)
        .update(context_length=context_length)
    )
    if changed:
        publish_change("language_model", str(language_model_id))
