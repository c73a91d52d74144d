"""`/api/v1/projects` and `/api/v1/keys`: what the page `/keys/` does, for programs of people.

A session and its CSRF token let one in, never an API key: a key that leaked must not make others. Fields are
listed one by one, and an unknown one is refused; whose a key is, and what it costs, cannot be said at all.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import msgspec
from django.core.exceptions import RequestDataTooBig
from django.db import Error as DatabaseError
from django.urls import URLPattern, path
from django.utils import timezone
from rest_framework.authentication import SessionAuthentication
from rest_framework.exceptions import NotFound
from rest_framework.permissions import IsAuthenticated
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from inference.http import BodyTooLarge
from openai_api.errors import InvalidRequest, StorageAway
from openai_api.parsing import check_headers, decode
from registry.actions.api_keys import MAX_OVERLAP, OVERLAP
from registry.actions.own_keys import (
    change_own_key,
    issue_own_key,
    may_change,
    may_issue,
    may_revoke,
    may_rotate,
    revoke_own_key,
    role_in,
    rotate_own_key,
)
from registry.errors import InvalidInput
from registry.models import ApiKey, Membership, Project
from registry.rights import MAX_CIDRS, MAX_ROUTES, METADATA_NAMES, Scope

BODY_BYTES = 256 * 1024
PAGE = 20
MOST_ON_A_PAGE = 100

_Text = Annotated[str, msgspec.Meta(max_length=120)]


class NewKeyRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What may be said of a new key."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=120)]
    project: Annotated[int, msgspec.Meta(ge=1, le=2**62)]
    expires_at: datetime | None = None
    routes: Annotated[list[_Text], msgspec.Meta(max_length=MAX_ROUTES)] = []
    scopes: Annotated[list[_Text], msgspec.Meta(max_length=len(Scope.values))] = []
    addresses: Annotated[list[_Text], msgspec.Meta(max_length=MAX_CIDRS)] = []
    priority: _Text | None = None
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=METADATA_NAMES)] = {}


class KeyChangeRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """What may be changed of a key. What is left out stays; `null` means as in a new key."""

    name: Annotated[str, msgspec.Meta(min_length=1, max_length=120)] | msgspec.UnsetType = msgspec.UNSET
    expires_at: datetime | msgspec.UnsetType | None = msgspec.UNSET
    routes: Annotated[list[_Text], msgspec.Meta(max_length=MAX_ROUTES)] | msgspec.UnsetType = msgspec.UNSET
    scopes: Annotated[list[_Text], msgspec.Meta(max_length=len(Scope.values))] | msgspec.UnsetType = (
        msgspec.UNSET
    )
    addresses: Annotated[list[_Text], msgspec.Meta(max_length=MAX_CIDRS)] | msgspec.UnsetType = msgspec.UNSET
    priority: _Text | msgspec.UnsetType | None = msgspec.UNSET
    metadata: Annotated[dict[str, str], msgspec.Meta(max_length=METADATA_NAMES)] | msgspec.UnsetType = (
        msgspec.UNSET
    )


class KeyRotationRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    overlap_seconds: Annotated[int, msgspec.Meta(ge=0, le=int(MAX_OVERLAP.total_seconds()))] = int(
        OVERLAP.total_seconds()
    )


class KeyRevocationRequest(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    reason: Annotated[str, msgspec.Meta(max_length=500)] = ""


class SessionOnly(SessionAuthentication):
    def authenticate_header(self, request: Request) -> str:
        # Without it DRF turns every 401 into a 403.
        return "Session"


def _person(request: Request) -> Any:
    """Who is logged in: nobody else comes through."""
    return request.user


class _View(APIView):
    authentication_classes = (SessionOnly,)
    permission_classes = (IsAuthenticated,)
    http_method_names = ("get", "head", "post", "patch")

    def handle_exception(self, exc: Exception) -> Response:
        if isinstance(exc, DatabaseError):
            exc = StorageAway()
        return super().handle_exception(exc)

    def read(self, request: Request, decoder: msgspec.json.Decoder[Any]) -> Any:
        """The body. Raises InvalidRequest naming the field."""
        sent = request._request
        check_headers(
            {
                b"content-type": sent.META.get("CONTENT_TYPE", "").encode("latin-1"),
                b"content-encoding": sent.META.get("HTTP_CONTENT_ENCODING", "identity").encode("latin-1"),
            }
        )
        try:
            body = sent.body
        except RequestDataTooBig:
            raise BodyTooLarge(BODY_BYTES) from None
        if len(body) > BODY_BYTES:
            raise BodyTooLarge(BODY_BYTES)
        try:
            return decode(body or b"{}", decoder.decode)
        except InvalidRequest as error:
            if unknown := _UNKNOWN_FIELD.search(str(error)):
                raise InvalidRequest(
                    f"Unknown parameter: '{unknown[1]}'.", param=unknown[1], code="unknown_parameter"
                ) from None
            raise

    def key(self, request: Request, public_id: str) -> ApiKey:
        """A key that this person may see; for any other id there is none."""
        keys = ApiKey.objects.seen_by(_person(request)).select_related("project", "owner")
        # The database need not be asked for what cannot be one.
        found = keys.filter(public_id=public_id).first() if public_id.isalnum() else None
        if found is None:
            raise NotFound
        return found


class Projects(_View):
    """GET: the projects in which one has a role, and what their keys may do."""

    def get(self, request: Request) -> Response:
        memberships = Membership.objects.filter(user_id=_person(request).pk).select_related("project")
        data = [
            _project_object(membership.project, membership.role)
            for membership in memberships.order_by("project__name")
        ]
        return Response({"object": "list", "data": data})


class Keys(_View):
    """GET: the keys of one's projects, the newest first. POST: a new key of one's own."""

    def get(self, request: Request) -> Response:
        words = request.query_params
        for name in words:
            if name not in ("project", "limit", "after"):
                raise InvalidRequest(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
        limit = _number(words.get("limit") or str(PAGE), "limit", MOST_ON_A_PAGE)
        keys = (
            ApiKey.objects.seen_by(_person(request))
            .select_related("project", "owner")
            .prefetch_related("secrets")
            .order_by("-pk")
        )
        if words.get("project"):
            keys = keys.filter(project_id=_number(words["project"], "project", 2**62))
        if words.get("after"):
            keys = keys.filter(pk__lt=self.key(request, words["after"]).pk)
        page = list(keys[: limit + 1])
        roles = _roles(request.user)
        data = [_key_object(key, request.user, roles.get(key.project_id)) for key in page[:limit]]
        return Response(
            {
                "object": "list",
                "data": data,
                "first_id": data[0]["id"] if data else None,
                "last_id": data[-1]["id"] if data else None,
                "has_more": len(page) > limit,
            }
        )

    def post(self, request: Request) -> Response:
        asked: NewKeyRequest = self.read(request, _decode_key)
        # A project that one is not in is one that does not exist.
        project = Project.objects.filter(memberships__user_id=_person(request).pk, pk=asked.project).first()
        if project is None:
            raise InvalidRequest("There is no such project.", param="project", code="invalid_value")
        facts = _facts(asked) | {"project": project}
        with _in_our_words():
            key, text = issue_own_key(user=request.user, **facts)
        told = _key_object(key, request.user, role_in(request.user, project.pk))
        return Response({**told, "key": text}, status=201)


class OneKey(_View):
    """GET: one key, with its secrets and their last use. PATCH: change what it is called and may do."""

    def get(self, request: Request, public_id: str) -> Response:
        key = self.key(request, public_id)
        return Response(_key_object(key, request.user, role_in(request.user, key.project_id)))

    def patch(self, request: Request, public_id: str) -> Response:
        key = self.key(request, public_id)
        asked: KeyChangeRequest = self.read(request, _decode_change)
        with _in_our_words():
            key = change_own_key(user=request.user, api_key=key, changes=_facts(asked))
        return Response(_key_object(key, request.user, role_in(request.user, key.project_id)))


class RotateKey(_View):
    """POST: a new secret; the old ones work on for `overlap_seconds`."""

    def post(self, request: Request, public_id: str) -> Response:
        key = self.key(request, public_id)
        asked: KeyRotationRequest = self.read(request, _decode_rotation)
        overlap = timedelta(seconds=asked.overlap_seconds)
        text = rotate_own_key(user=request.user, api_key=key, overlap=overlap)
        told = _key_object(key, request.user, role_in(request.user, key.project_id))
        return Response({**told, "key": text})


class RevokeKey(_View):
    """POST: refuse the key everywhere within a second, for good."""

    def post(self, request: Request, public_id: str) -> Response:
        key = self.key(request, public_id)
        asked: KeyRevocationRequest = self.read(request, _decode_revocation)
        revoke_own_key(user=request.user, api_key=key, reason=asked.reason)
        return Response(_key_object(key, request.user, role_in(request.user, key.project_id)))


def _facts(asked: NewKeyRequest | KeyChangeRequest) -> dict[str, Any]:
    """What was said, by the names of the columns."""
    told = {
        name: value for name, value in msgspec.structs.asdict(asked).items() if value is not msgspec.UNSET
    }
    if "addresses" in told:
        told["cidrs"] = told.pop("addresses")
    expires_at = told.get("expires_at")
    if expires_at is not None and expires_at.tzinfo is None:
        told["expires_at"] = expires_at.replace(tzinfo=UTC)
    return told


@contextmanager
def _in_our_words() -> Iterator[None]:
    """A refusal names the field that was sent."""
    try:
        yield
    except InvalidInput as error:
        field = "addresses" if error.field == "cidrs" else error.field
        raise InvalidInput(field, error.message) from error


def _project_object(project: Project, role: str) -> dict[str, Any]:
    return {
        "id": project.pk,
        "object": "project",
        "name": project.name,
        "role": role,
        "may_issue_keys": may_issue(role),
        "time_zone": project.time_zone,
        "routes": project.routes,
        "scopes": project.scopes,
        "priority": project.priority,
        "key_days": project.key_days,
        "max_keys": project.max_keys,
    }


def _key_object(key: ApiKey, user: Any, role: str | None) -> dict[str, Any]:
    now = timezone.now()
    return {
        "id": key.public_id,
        "object": "api_key",
        "name": key.name,
        "shown": f"sk-{key.public_id}-…{key.last4}",
        "project": key.project_id,
        "project_name": key.project.name,
        "owner": key.owner.get_username() if key.owner is not None else None,
        "state": "revoked" if key.revoked_at else "usable" if key.usable(now) else "expired",
        "routes": key.routes,
        "scopes": key.scopes,
        "addresses": key.cidrs,
        "priority": key.priority,
        "metadata": key.metadata,
        "created_at": key.created_at,
        "expires_at": key.expires_at,
        "revoked_at": key.revoked_at,
        "last_used_at": key.last_used_at,
        "secrets": [
            {
                "last4": secret.last4,
                "created_at": secret.created_at,
                "expires_at": secret.expires_at,
                "last_used_at": secret.last_used_at,
                "works": key.usable(now) and secret.usable(now),
            }
            for secret in key.secrets.all()
        ],
        "may_change": may_change(user, key, role),
        "may_rotate": may_rotate(user, key, role),
        "may_revoke": may_revoke(user, key, role),
    }


def _roles(user: Any) -> dict[int, str]:
    return dict(Membership.objects.filter(user_id=user.pk).values_list("project_id", "role"))


def _number(text: str, name: str, most: int) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 18 and 1 <= int(text) <= most):
        raise InvalidRequest(f"'{name}' must be from 1 to {most}.", param=name, code="invalid_value")
    return int(text)


_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `(.{1,100}?)`")
_decode_key = msgspec.json.Decoder(NewKeyRequest)
_decode_change = msgspec.json.Decoder(KeyChangeRequest)
_decode_rotation = msgspec.json.Decoder(KeyRotationRequest)
_decode_revocation = msgspec.json.Decoder(KeyRevocationRequest)

urlpatterns: list[URLPattern] = [
    path("projects", Projects.as_view()),
    path("keys", Keys.as_view()),
    path("keys/<slug:public_id>", OneKey.as_view()),
    path("keys/<slug:public_id>/rotate", RotateKey.as_view()),
    path("keys/<slug:public_id>/revoke", RevokeKey.as_view()),
]
