"""Nodes: join, beat, fall silent."""

from __future__ import annotations

import hmac
from datetime import datetime, timedelta

from django.db import transaction
from django.db.models import F
from django.utils import timezone

from registry.actions.events import record_event
from registry.errors import InvalidInput, InvalidTransition, JoinRefused, StillInUse
from registry.keys import digest_secret, generate_secret
from registry.models import JoinToken, Node, Worker
from registry.querysets import database_now
from registry.states import NODE_TRANSITIONS, NodeState, sources_of
from registry.validators import validate_host_label


@transaction.atomic
def create_join_token(*, by: str, uses: int = 1, lifetime: timedelta = timedelta(hours=1)) -> str:
    """Make a token that lets `uses` nodes join; returns its text, which cannot be had again."""
    text = generate_secret()
    JoinToken.objects.create(
        digest=digest_secret(text), expires_at=timezone.now() + lifetime, uses_left=uses, created_by=by
    )
    return text


@transaction.atomic
def join_node(*, token: str, name: str, address: str, version: str = "") -> tuple[Node, str]:
    """Let a node join, or join again under its name; returns it and its secret. Raises JoinRefused.

    Joining again gives a new secret and ends the old one: the machine was set up anew.
    """
    try:
        validate_host_label(name)
        Node(name=name, address=address).clean_fields(exclude=["name", "secret_digest"])
    except Exception as error:
        raise InvalidInput("name", "; ".join(getattr(error, "messages", [str(error)]))) from error
    used = JoinToken.objects.filter(
        digest=digest_secret(token), uses_left__gt=0, expires_at__gt=timezone.now()
    ).update(uses_left=F("uses_left") - 1)
    if not used:
        raise JoinRefused("The join token is unknown, used up or expired; make a new one.")
    secret = generate_secret()
    node, created = Node.objects.update_or_create(
        name=name,
        defaults={"address": address, "version": version, "secret_digest": digest_secret(secret)},
    )
    record_event(node, "joined" if created else "joined again", by=f"node {name}")
    return node, secret


@transaction.atomic
def change_node(*, node: Node, by: str) -> None:
    """Save edits of a node's labels or cordon. Raises ValidationError."""
    node.clean_fields(exclude=["secret_digest"])
    node.save(update_fields=["labels", "cordoned"])
    record_event(node, "changed", by=by, data={"labels": node.labels, "cordoned": node.cordoned})


@transaction.atomic
def cordon_node(*, node: Node, cordoned: bool, by: str) -> None:
    """Let a node get no new worker, or get them again. Nothing that runs there is touched."""
    if Node.objects.filter(pk=node.pk).exclude(cordoned=cordoned).update(cordoned=cordoned):
        record_event(node, "cordoned" if cordoned else "uncordoned", by=by)


@transaction.atomic
def delete_node(*, node: Node, by: str) -> None:
    """Forget a node and its ended workers; its secret ends. Raises StillInUse."""
    live = Worker.objects.live().filter(node=node).count()
    if live:
        raise StillInUse(f"{node} still has {live} live worker(s); cordon it and scale them away first.")
    record_event(node, "deleted", by=by)
    node.delete()


def node_of_secret(node_id: int, secret: str) -> Node | None:
    """The node that proves itself with this secret, else None."""
    node = Node.objects.filter(pk=node_id).first()
    if node is None or not hmac.compare_digest(node.secret_digest, digest_secret(secret)):
        return None
    return node


@transaction.atomic
def move_node(*, node: Node, to: NodeState, reason: str, by: str) -> None:
    """Move a node's state by compare-and-set. Raises InvalidTransition."""
    changed = Node.objects.filter(pk=node.pk, state__in=sources_of(to, NODE_TRANSITIONS)).update(
        state=to, state_changed_at=database_now(), state_reason=reason[:500]
    )
    if not changed:
        raise InvalidTransition(f"Node {node} cannot become {to} now.")
    record_event(node, to, reason=reason, by=by)


@transaction.atomic
def record_node_beat(
    *,
    node: Node,
    now: datetime,
    agent_pid: int,
    version: str,
    cores: int,
    memory_bytes: int,
    memory_free_bytes: int,
) -> None:
    """Note that a node's agent is alive; brings a silent node back online."""
    Node.objects.filter(pk=node.pk).update(
        last_seen_at=now,
        agent_pid=agent_pid,
        version=version[:40],
        cores=cores,
        memory_bytes=memory_bytes,
        memory_free_bytes=memory_free_bytes,
    )
    if node.state != NodeState.ONLINE:
        try:
            move_node(node=node, to=NodeState.ONLINE, reason="its agent reports", by=f"agent {node.name}")
        except InvalidTransition:
            # Two beats at once: the other one moved it.
            node.refresh_from_db(fields=["state"])
