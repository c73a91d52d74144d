"""The chat page and its JSON API. Streaming goes over the socket: `webchat.consumers`."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable
from functools import wraps
from typing import Any

import msgspec
from django.contrib.auth.decorators import login_required
from django.db import DatabaseError, InterfaceError
from django.db.models import Q
from django.http import Http404, HttpRequest, HttpResponse, RawPostDataException
from django.shortcuts import render
from django.views.decorators.csrf import ensure_csrf_cookie
from django.views.decorators.http import require_safe

from openai_api.errors import STORAGE
from webchat import actions, bounds
from webchat.errors import BadInput, ChatError, NotThere
from webchat.models import Conversation
from webchat.picker import list_models
from webchat.protocol import Change, NewConversation, read_body, show_conversation, show_listed

logger = logging.getLogger("roundhouse.chat")

POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data: blob:; font-src 'self'; base-uri 'none'; form-action 'self'; "
    "frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types dompurify"
)
"""Stricter than the other pages': here a model's text is shown."""


@require_safe
@login_required
@ensure_csrf_cookie
def chat_page(request: HttpRequest, conversation_id: uuid.UUID | None = None) -> HttpResponse:
    """The page; it fetches everything itself."""
    if conversation_id is not None:
        mine = Conversation.objects.for_user(_user(request)).filter(pk=conversation_id)
        if not mine.exists():
            raise Http404("There is no such conversation.")
    response = render(request, "webchat/chat.html")
    response["Content-Security-Policy"] = POLICY
    response["Cache-Control"] = "no-store"
    return response


def _user(request: HttpRequest) -> Any:
    return request.user


def _answer(payload: object, status: int = 200) -> HttpResponse:
    response = HttpResponse(msgspec.json.encode(payload), content_type="application/json", status=status)
    response["Cache-Control"] = "no-store"
    return response


def _refuse(message: str, status: int) -> HttpResponse:
    return _answer({"error": {"message": message}}, status)


def api(*methods: str) -> Callable[[Callable[..., HttpResponse]], Callable[..., HttpResponse]]:
    """A view of the JSON API: only for people who are logged in, and every refusal is JSON."""

    def decorate(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponse]:
        @wraps(view)
        def guarded(request: HttpRequest, **arguments: Any) -> HttpResponse:
            try:
                if not request.user.is_authenticated:
                    return _refuse("You are not logged in, or no longer: log in again.", 401)
                if request.method not in methods:
                    response = _refuse(f"Method {request.method} is not allowed here.", 405)
                    response["Allow"] = ", ".join(methods)
                    return response
                return view(request, **arguments)
            except ChatError as error:
                return _refuse(str(error), error.status)
            except (DatabaseError, InterfaceError):
                logger.warning("a view failed: the database is away", extra={"event": "chat_storage_away"})
                return _refuse(STORAGE, 503)

        return guarded

    return decorate


def _body(request: HttpRequest) -> bytes:
    length = request.META.get("CONTENT_LENGTH") or "0"
    if not length.isdigit() or int(length) > bounds.BODY_BYTES:
        raise BadInput(f"The body is larger than the {bounds.BODY_BYTES} bytes that are accepted here.")
    try:
        return request.body
    except RawPostDataException:
        raise BadInput("Send the body as JSON.") from None


@api("GET")
def models(request: HttpRequest) -> HttpResponse:
    return _answer({"models": list_models()})


@api("GET", "POST")
def conversations(request: HttpRequest) -> HttpResponse:
    user = _user(request)
    if request.method == "POST":
        wanted = read_body(_body(request), NewConversation)
        created = actions.create_conversation(user=user, model=wanted.model)
        return _answer(show_conversation(created), 201)
    found = Conversation.objects.for_user(user)
    text = " ".join(request.GET.get("q", "")[: bounds.QUERY_CHARACTERS].replace("\x00", "").split())
    if text:
        in_messages = Conversation.objects.for_user(user).filter(messages__content__icontains=text)
        found = found.filter(Q(title__icontains=text) | Q(pk__in=in_messages.values("pk")))
    listed = found.order_by("-updated_at")[: bounds.LISTED]
    return _answer({"conversations": [show_listed(conversation) for conversation in listed]})


@api("GET", "PATCH", "DELETE")
def conversation(request: HttpRequest, conversation_id: uuid.UUID) -> HttpResponse:
    user = _user(request)
    if request.method == "PATCH":
        change = read_body(_body(request), Change)
        changed = actions.change_conversation(user=user, conversation_id=conversation_id, change=change)
        return _answer(show_conversation(changed))
    if request.method == "DELETE":
        actions.delete_conversation(user=user, conversation_id=conversation_id)
        return HttpResponse(status=204)
    found = Conversation.objects.for_user(user).filter(pk=conversation_id).first()
    if found is None:
        raise NotThere
    return _answer(show_conversation(found))


@api("GET", "POST", "PATCH", "DELETE", "PUT")
def unknown(request: HttpRequest, rest: str = "") -> HttpResponse:
    return _refuse("There is nothing at this address.", 404)
