"""Language models and their copies on nodes."""

from __future__ import annotations

from typing import Any

from django.db import transaction
from django.db.models import Q
from django.utils import timezone

from registry.actions.deployments import save_deployment
from registry.actions.events import publish_change, record_event
from registry.errors import StillInUse
from registry.models import Deployment, LanguageModel, ModelCopy, Node, UnwantedCopy
from registry.states import CopyState

USERS_NAMED = 10
"""Deployments that a refusal names."""


@transaction.atomic
def add_language_model(*, name: str, source: str, by: str, chat_template: str = "") -> LanguageModel:
    """Register a model. The source is not fetched until a deployment needs it."""
    language_model = LanguageModel(name=name, source=source, chat_template=chat_template)
    language_model.full_clean()
    language_model.save()
    # What nodes have not deleted yet is wanted again.
    UnwantedCopy.objects.filter(model_name=name, source=source).delete()
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
def delete_language_model(*, language_model: LanguageModel, by: str, files: bool = False) -> None:
    """Delete a model and what is known of its copies. Raises StillInUse.

    Files on nodes stay; with `files` the nodes delete what they fetched or converted, each when it is heard
    next. A folder that the operator gave is never touched.
    """
    used = list(
        Deployment.objects.filter(
            Q(language_model=language_model) | Q(revisions__language_model=language_model)
        )
        .distinct()
        .values_list("name", flat=True)
    )
    if used:
        named = ", ".join(used[:USERS_NAMED]) + (", …" if len(used) > USERS_NAMED else "")
        raise StillInUse(
            f"{language_model} is, or was in an earlier revision, the model of {len(used)} deployment(s) "
            f"({named}); delete them first."
        )
    record_event(language_model, "deleted", by=by, data={"files": files})
    publish_change("language_model", str(language_model.pk))
    if files:
        UnwantedCopy.objects.bulk_create(
            [
                UnwantedCopy(
                    node_id=copy.node_id, model_name=language_model.name, source=language_model.source
                )
                for copy in language_model.copies.all()
            ],
            ignore_conflicts=True,
        )
    language_model.delete()


@transaction.atomic
def note_deleted_copy(*, node: Node, model_name: str, source: str, freed_bytes: int) -> None:
    """A node says that these files are gone; what it was not asked for, or did not have, is not noted."""
    asked, _ = UnwantedCopy.objects.filter(node=node, model_name=model_name, source=source).delete()
    if asked and freed_bytes:
        record_event(
            node,
            "files deleted",
            reason=f"Of the model {model_name}, which was removed.",
            by=f"agent {node.name}",
            data={"freed_bytes": freed_bytes},
        )


@transaction.atomic
def record_copy(*, node: Node, language_model_id: int, state: CopyState, **facts: Any) -> None:
    """Note how far a model's files are on a node.

    `facts`: step, done, total, unit, files_done, files_total, size_bytes, sha256, detail.
    """
    if not LanguageModel.objects.filter(pk=language_model_id).exists():
        # Deleted while its files were on the way.
        return
    facts["detail"] = facts.get("detail", "")[:1000]
    before = ModelCopy.objects.filter(node=node, language_model_id=language_model_id).first()
    now = timezone.now()
    if before is None or (before.state, before.step) != (state, facts.get("step", before.step)):
        facts |= {"step_began_at": now, "step_began_done": facts.get("done", 0)}
    copy, _ = ModelCopy.objects.update_or_create(
        node=node,
        language_model_id=language_model_id,
        defaults={"state": state, "updated_at": now, **facts},
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
