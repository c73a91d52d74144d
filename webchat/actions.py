"""Every write with a rule. An action owns its transaction; who asks is always checked here."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import msgspec
from django.contrib.auth import get_user_model
from django.contrib.auth.models import AbstractBaseUser
from django.db import transaction
from django.db.models import Max

from inference.http import new_request_id
from openai_api.admission import load_rules
from openai_api.auth import Key
from registry.actions.budgets import hard_budgets, route_budgets
from registry.models import Gateway, Project, Route
from registry.querysets import database_now
from registry.rights import Priority
from webchat import bounds
from webchat.errors import BadInput, NotNow, NotThere
from webchat.models import Conversation, Message, MessageState, Role
from webchat.protocol import Change, Settings, show_message

PROJECT = "Chat"
"""Owns what people use in the chat."""
SILENT_AFTER = timedelta(seconds=10)
"""An answer that nobody writes and whose gateway is gone is interrupted after this long."""
GIVEN_UP_AFTER = timedelta(seconds=60)
"""The same, when its gateway is still there."""
INTERRUPTED = "The answer was interrupted: the gateway that wrote it ended. Regenerate it to try again."

LEFT_OUT = frozenset({MessageState.FAILED, MessageState.GENERATING})
"""Answers in these states are not told to a model again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """An answer to be written: everything that the runner needs."""

    message_id: uuid.UUID
    user_id: int
    request_id: str
    key: Key
    body: bytes
    assistant: dict[str, Any]
    """As the page gets it."""
    user: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """What there is of an answer so far, or in the end."""

    content: str
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    ttft_ms: int | None = None
    duration_ms: int | None = None
    state: MessageState = MessageState.GENERATING
    error: str = ""


# -- conversations


@transaction.atomic
def create_conversation(*, user: AbstractBaseUser, model: str | None = None) -> Conversation:
    """Begin a conversation; without a model it gets the one that this person used last, else the first."""
    if not model:
        used = Conversation.objects.for_user(user).exclude(model="").order_by("-updated_at").first()
        model = used.model if used is not None else None
    if not model:
        first = Route.objects.filter(enabled=True, targets__isnull=False).order_by("name").first()
        model = first.name if first is not None else ""
    return Conversation.objects.create(user_id=user.pk, model=model)


@transaction.atomic
def change_conversation(
    *, user: AbstractBaseUser, conversation_id: uuid.UUID, change: Change
) -> Conversation:
    """Change title, model, settings or the branch in view. Raises NotThere or BadInput."""
    conversation = _conversation(user.pk, conversation_id)
    fields = []
    if not isinstance(change.title, msgspec.UnsetType):
        title = " ".join(_text(change.title, "title").split())
        if not title:
            raise BadInput("title: write at least one character.")
        conversation.title = title
        fields.append("title")
    if not isinstance(change.model, msgspec.UnsetType):
        conversation.model = _text(change.model, "model")
        fields.append("model")
    if not isinstance(change.settings, msgspec.UnsetType):
        conversation.settings = _settings(change.settings)
        fields.append("settings")
    if not isinstance(change.leaf, msgspec.UnsetType):
        conversation.leaf_id = _newest_below(conversation, change.leaf)
        fields.append("leaf")
    if fields:
        conversation.updated_at = database_now()
        conversation.save(update_fields=[*fields, "updated_at"])
    return conversation


@transaction.atomic
def delete_conversation(*, user: AbstractBaseUser, conversation_id: uuid.UUID) -> None:
    """Delete a conversation with its messages; an answer being written ends within a second. Raises
    NotThere."""
    conversation = _conversation(user.pk, conversation_id)
    Conversation.objects.filter(pk=conversation.pk).update(leaf=None)
    conversation.delete()


# -- messages


@transaction.atomic
def send(
    *,
    user_id: int,
    conversation_id: uuid.UUID,
    content: str,
    parent: uuid.UUID | msgspec.UnsetType | None,
    model: str | None,
    gateway: str,
) -> Job:
    """Take a message and prepare its answer. Raises NotThere, BadInput or NotNow."""
    content = _text(content, "content")
    if not content.strip():
        raise BadInput("content: write a message first.")
    conversation = _conversation(user_id, conversation_id)
    model = _model(conversation, model)
    _check_room(conversation, user_id, new=2)
    parent_id = conversation.leaf_id if isinstance(parent, msgspec.UnsetType) else parent
    above = _path(conversation, parent_id) if parent_id is not None else []
    if parent_id is not None:
        _check_answer(above[-1], parent_id)
    said = _add(conversation, parent_id, Role.USER, content=content)
    if not conversation.title:
        conversation.title = _title(content)
    history = [*above, _Said(Role.USER, content, MessageState.COMPLETE)]
    return _answer(conversation, said.pk, model, history, user_id, gateway, said=said)


@transaction.atomic
def regenerate(*, user_id: int, message_id: uuid.UUID, model: str | None, gateway: str) -> Job:
    """Prepare another answer beside one that there is. Raises NotThere, BadInput or NotNow."""
    message = Message.objects.for_user(user_id).filter(pk=message_id).first()
    if message is None:
        raise NotThere("message")
    if message.role != Role.ASSISTANT or message.parent_id is None:
        raise BadInput("message: only an answer can be written anew.")
    conversation = _conversation(user_id, message.conversation_id)
    if Message.objects.generating().filter(parent_id=message.parent_id).exists():
        raise NotNow("An answer is still being written here; stop it first.")
    model = _model(conversation, model)
    _check_room(conversation, user_id, new=1)
    history = _path(conversation, message.parent_id)
    return _answer(conversation, message.parent_id, model, history, user_id, gateway)


@transaction.atomic
def request_stop(*, user_id: int, message_id: uuid.UUID) -> bool:
    """Ask, durably, that an answer ends. False: it has ended. Raises NotThere."""
    message = Message.objects.for_user(user_id).filter(pk=message_id).first()
    if message is None:
        raise NotThere("message")
    return bool(Message.objects.generating().filter(pk=message_id).update(stop_requested=True))


# -- what the runner writes


def stopped_among(*, gateway: str, running: Iterable[uuid.UUID]) -> set[uuid.UUID]:
    """Of the answers that this gateway writes, those that shall end: stopped, or deleted."""
    running = set(running)
    wanted = Message.objects.filter(pk__in=running, gateway=gateway, stop_requested=False)
    return running - set(wanted.values_list("pk", flat=True))


@transaction.atomic
def save_drafts(*, gateway: str, drafts: Mapping[uuid.UUID, Draft], alive: Iterable[uuid.UUID]) -> None:
    """Keep what there is so far, and say that this gateway still writes."""
    now = database_now()
    for message_id, draft in sorted(drafts.items()):
        _own(gateway, message_id).update(
            content=draft.content,
            prompt_tokens=draft.prompt_tokens,
            completion_tokens=draft.completion_tokens,
            ttft_ms=draft.ttft_ms,
        )
    # Another gateway may have given up hope of one; its own gateway knows better.
    Message.objects.filter(
        pk__in=set(alive), gateway=gateway, state__in=(MessageState.GENERATING, MessageState.INTERRUPTED)
    ).update(alive_at=now, state=MessageState.GENERATING, error="")


@transaction.atomic
def finish(*, gateway: str, message_id: uuid.UUID, draft: Draft) -> str:
    """Keep the whole answer and how it ended; returns the conversation's title. Twice changes nothing."""
    _own(gateway, message_id).update(
        # Nobody's any more: a draft on its way to the database comes too late.
        gateway="",
        content=draft.content,
        state=draft.state,
        error=draft.error[:1000],
        prompt_tokens=draft.prompt_tokens,
        completion_tokens=draft.completion_tokens,
        ttft_ms=draft.ttft_ms,
        duration_ms=draft.duration_ms,
    )
    found = Conversation.objects.filter(messages=message_id)
    found.update(updated_at=database_now())
    return found.values_list("title", flat=True).first() or ""


def find_orphans(*, besides: Iterable[uuid.UUID]) -> list[tuple[uuid.UUID, int]]:
    """Answers whose gateway is gone, and how long each is so far."""
    now = database_now()
    here = list(Gateway.objects.filter(seen_at__gte=now - SILENT_AFTER).values_list("name", flat=True))
    orphans = (
        Message.objects.generating()
        .filter(alive_at__lt=now - SILENT_AFTER)
        .exclude(gateway__in=here, alive_at__gte=now - GIVEN_UP_AFTER)
        .exclude(pk__in=set(besides))
    )
    return [(message.pk, len(message.content)) for message in orphans[:100]]


@transaction.atomic
def interrupt(*, message_id: uuid.UUID, more: str) -> None:
    """Mark an orphan; `more` is text of it that only the log had."""
    message = Message.objects.generating().select_for_update().filter(pk=message_id).first()
    if message is not None:
        message.content += more
        message.state = MessageState.INTERRUPTED
        message.error = INTERRUPTED
        message.save(update_fields=["content", "state", "error"])


def chat_key(user: Any) -> Key:
    """In whose name a person's answers are accounted for: no key that anybody could send."""
    project, _ = Project.objects.get_or_create(name=PROJECT)
    return Key(
        public_id=f"user-{user.pk}",
        name=user.get_username()[:120],
        project_id=project.pk,
        project_name=project.name,
        routes=frozenset(),
        expires_at=None,
        revoked=False,
        project_routes=frozenset(project.routes),
        project_scopes=frozenset(project.scopes),
        priority=Priority.INTERACTIVE.value,
        rules=load_rules(api_key=None, public_id=f"user-{user.pk}", project_id=project.pk, user_id=user.pk),
        budgets=hard_budgets(key_public_id=f"user-{user.pk}", project_id=project.pk, user_id=user.pk),
        budget_routes=route_budgets(),
    )


# -- parts


@dataclass(frozen=True, slots=True)
class _Said:
    role: str
    content: str
    state: str


def _own(gateway: str, message_id: uuid.UUID) -> Any:
    return Message.objects.filter(
        pk=message_id, gateway=gateway, state__in=(MessageState.GENERATING, MessageState.INTERRUPTED)
    )


def _conversation(user_id: int, conversation_id: uuid.UUID) -> Conversation:
    """Locked, so that two frames at once cannot take the same place in the tree."""
    found = Conversation.objects.for_user(user_id).select_for_update().filter(pk=conversation_id).first()
    if found is None:
        raise NotThere
    return found


def _answer(
    conversation: Conversation,
    parent_id: uuid.UUID,
    model: str,
    history: list[_Said],
    user_id: int,
    gateway: str,
    *,
    said: Message | None = None,
) -> Job:
    request_id = new_request_id()
    answer = _add(
        conversation,
        parent_id,
        Role.ASSISTANT,
        state=MessageState.GENERATING,
        model=model,
        request_id=request_id,
        gateway=gateway,
        alive_at=database_now(),
    )
    conversation.leaf = answer
    conversation.model = model
    conversation.updated_at = database_now()
    conversation.save(update_fields=["title", "leaf", "model", "updated_at"])
    return Job(
        message_id=answer.pk,
        user_id=user_id,
        request_id=request_id,
        key=chat_key(get_user_model().objects.get(pk=user_id)),
        body=_body(conversation, model, history),
        assistant=show_message(answer),
        user=show_message(said) if said is not None else None,
    )


def _body(conversation: Conversation, model: str, history: list[_Said]) -> bytes:
    """The request, as the API takes it."""
    settings = dict(conversation.settings)
    messages: list[dict[str, str]] = []
    if system := settings.pop("system", ""):
        messages.append({"role": "system", "content": system})
    for said in history:
        if said.role == Role.ASSISTANT and (said.state in LEFT_OUT or not said.content.strip()):
            continue
        if messages and messages[-1]["role"] == said.role:
            # Nothing was answered between them; templates want the roles to alternate.
            messages[-1]["content"] += f"\n\n{said.content}"
        else:
            messages.append({"role": said.role, "content": said.content})
    return msgspec.json.encode(
        {
            "model": model,
            "messages": messages,
            "stream": True,
            "stream_options": {"include_usage": True},
            **settings,
        }
    )


def _add(conversation: Conversation, parent_id: uuid.UUID | None, role: Role, **facts: Any) -> Message:
    last = conversation.messages.filter(parent_id=parent_id).aggregate(last=Max("position"))["last"]
    return Message.objects.create(
        conversation=conversation,
        parent_id=parent_id,
        position=0 if last is None else last + 1,
        role=role,
        **facts,
    )


def _path(conversation: Conversation, message_id: uuid.UUID) -> list[_Said]:
    """From the first message down to this one. Raises NotThere when it is not of this conversation."""
    rows = {
        row[0]: row
        for row in conversation.messages.values_list("pk", "parent_id", "role", "content", "state")
    }
    path: list[_Said] = []
    at: uuid.UUID | None = message_id
    while at is not None:
        if at not in rows:
            raise NotThere("message")
        _, above, role, content, state = rows[at]
        path.append(_Said(role, content, state))
        at = above
    return path[::-1]


def _newest_below(conversation: Conversation, message_id: uuid.UUID) -> uuid.UUID:
    """The end of the newest branch through this message. Raises NotThere."""
    rows = conversation.messages.order_by("position").values_list("pk", "parent_id")
    newest = {parent: pk for pk, parent in rows}
    if message_id not in {pk for pk, _ in rows}:
        raise NotThere("message")
    at = message_id
    while at in newest:
        at = newest[at]
    return at


def _check_answer(parent: _Said, parent_id: uuid.UUID) -> None:
    if parent.role != Role.ASSISTANT:
        raise BadInput("parent: a message follows an answer, or is the first one.")
    if parent.state == MessageState.GENERATING:
        raise NotNow("The answer is still being written; wait for its end, or stop it.")


def _check_room(conversation: Conversation, user_id: int, *, new: int) -> None:
    if conversation.messages.count() + new > bounds.MESSAGES_PER_CONVERSATION:
        raise NotNow("This conversation is full; begin a new one.")
    if Message.objects.for_user(user_id).generating().count() >= bounds.GENERATIONS_PER_USER:
        raise NotNow(
            f"{bounds.GENERATIONS_PER_USER} answers are being written for you; wait for one, or stop one."
        )


def _model(conversation: Conversation, model: str | None) -> str:
    chosen = _text(model or conversation.model, "model")
    if not chosen:
        raise BadInput("model: choose a model first.")
    return chosen


def _settings(settings: Settings) -> dict[str, Any]:
    """Only what was given."""
    given: dict[str, Any] = {
        name: value for name, value in msgspec.to_builtins(settings).items() if value not in (None, "")
    }
    if "system" in given:
        _text(given["system"], "settings.system")
    return given


def _text(text: str, field: str) -> str:
    # PostgreSQL's text cannot hold NUL, nor does a prompt need one.
    if "\x00" in text:
        raise BadInput(f"{field}: the text has a NUL character.")
    return text


def _title(content: str) -> str:
    """The first words of the first message."""
    text = " ".join(content.split())
    if len(text) <= bounds.TITLE_FROM_TEXT:
        return text
    cut = text[: bounds.TITLE_FROM_TEXT - 1]
    head, _, _ = cut.rpartition(" ")
    return f"{head if len(head) > bounds.TITLE_FROM_TEXT // 2 else cut}…"
