"""S28: no answer, to whomever, holds a secret, nor what another person wrote."""

from __future__ import annotations

import base64
import json
import re
import threading
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import get_resolver
from django.urls.resolvers import URLPattern, URLResolver

from openai_api.document import document
from openai_api.endpoints import ENDPOINTS
from registry.keys import worker_secret
from registry.models import ApiKey, Deployment, Node, Worker
from registry.models import LanguageModel as Model
from tests.api.conftest import ROUTE, Answer, Served, facts, served, worker  # noqa: F401
from tests.factories import make_api_key, make_project
from webchat.models import Conversation
from webchat.models import Message as Said
from webchat.models import Role as Speaker

pytestmark = pytest.mark.django_db(transaction=True)

PASSWORD = "canary-password-a81f"
PROMPT = "canary-system-prompt-a81f"
SAID = "canary-message-a81f"


def seeded(served: Served) -> list[str]:  # noqa: F811
    """Facts with secrets in them, and what must never be seen of each."""
    _, other = make_api_key(name="other", project=make_project(name="elsewhere"))
    olga = User.objects.create_superuser("olga", password=PASSWORD)
    conversation = Conversation.objects.create(user=olga, model=ROUTE, settings={"system": PROMPT})
    Said.objects.create(conversation=conversation, role=Speaker.USER, content=SAID, position=0)
    keys = list(ApiKey.objects.all())
    found = [
        *(served.api_key, served.api_key[20:-4], other, other[20:-4], PASSWORD, PROMPT, SAID),
        *(settings.SECRET_KEY, *(pepper.hex() for pepper in settings.ROUNDHOUSE_KEY_PEPPERS.values())),
        *(base64.b64encode(pepper).decode() for pepper in settings.ROUNDHOUSE_KEY_PEPPERS.values()),
        *(secret.digest for key in keys for secret in key.secrets.all()),
        *(node.secret_digest for node in Node.objects.all()),
        *(worker_secret(settings.SECRET_KEY, one.pk, one.epoch) for one in Worker.objects.all()),
        olga.password,
        str(settings.ROUNDHOUSE_DATA),
    ]
    return [one for one in found if len(one) > 7]


def pages() -> list[str]:
    """The URL of each of Django's views, with something in place of what it is about."""
    known = {
        "model": (Model, "name"),
        "object_id": (Deployment, "pk"),
        "conversation_id": (Conversation, "pk"),
        "app_label": (None, "registry"),
    }

    def walk(patterns: list[Any], before: str) -> list[str]:
        urls = []
        for one in patterns:
            route = before + str(one.pattern)
            if isinstance(one, URLResolver):
                urls += walk(one.url_patterns, route)
            elif isinstance(one, URLPattern):
                urls.append(route)
        return urls

    def filled(route: str) -> str:
        def value(found: re.Match[str]) -> str:
            about, what = known.get(found[1], (Deployment, "pk"))
            return what if about is None else str(about.objects.values_list(what, flat=True).first() or "1")

        route = re.sub(r"<(?:\w+:)?(\w+)>", value, route)
        return "/" + re.sub(r"\(\?P<\w+>.*?\)|[\^$]|\\Z", "", route)

    return sorted(
        {filled(route) for route in walk(get_resolver().url_patterns, "")} - {"/admin/logout/", "/logout/"}
    )


def everything(served: Served, key: str | None, cookie: str | None) -> list[tuple[str, Answer]]:  # noqa: F811
    headers = [f"Cookie: sessionid={cookie}"] if cookie else []
    answers = [
        (path, served.request("GET", path, None, *headers, key=key))
        for path in [
            *pages(),
            *(
                "/healthz",
                "/readyz",
                "/health",
                "/version",
                "/metrics",
                "/v1/openapi.json",
                "/v1/responses/resp_x",
            ),
            *(
                "/v1/nothing",
                "/fleet/node",
                "/fleet/nothing",
                "/chat/api/conversations?q=canary",
                "/.env",
                "/var/",
            ),
            *(
                "/admin/registry/apikey/?q=canary",
                "/v1/models?debug=true",
                "/static/../config/settings/base.py",
            ),
        ]
    ]
    described = document()["paths"]
    for endpoint in ENDPOINTS:
        example = described[endpoint.path]["post"]["requestBody"]["content"]["application/json"]["example"]
        for body in (example | {"model": ROUTE}, example | {"model": "none"}, {"model": 7}, {}):
            sent = json.dumps(body).encode()
            answers.append((endpoint.path, served.request("POST", endpoint.path, sent, *headers, key=key)))
    for path in (
        "/fleet/join",
        "/fleet/node",
        "/fleet/worker",
        "/login/",
        "/admin/login/",
        "/chat/api/conversations",
    ):
        answers.append((path, served.request("POST", path, b"{}", *headers, key=key)))
    return answers


def session_of(user: User) -> str:
    client = Client()
    client.force_login(user)
    return client.cookies["sessionid"].value


@pytest.mark.parametrize("role", ["nobody", "key", "person", "staff"])
def test_no_answer_holds_a_secret(served: Served, role: str) -> None:  # noqa: F811
    secrets = seeded(served)
    assert len(secrets) > 14
    key, cookie = None, None
    if role == "key":
        key = make_api_key(name="reader", project=make_project(name="third"))[1]
    elif role == "person":
        cookie = session_of(get_user_model().objects.create_user("ann"))
    elif role == "staff":
        reader = get_user_model().objects.create_user("rita", is_staff=True)
        reader.user_permissions.set(Permission.objects.filter(codename__startswith="view_"))
        cookie = session_of(reader)
    answers = everything(served, key, cookie)
    assert len(answers) > 100
    assert threading.active_count() < 200
    if role == "staff":
        assert sum(answer.status == 200 for path, answer in answers if path.startswith("/admin/")) > 20
    if role == "key":
        assert any(answer.status == 200 for path, answer in answers if path == "/v1/chat/completions")
    for path, answer in answers:
        assert 200 <= answer.status < 500 or answer.status in (501, 503), (path, answer.status)
        whole = json.dumps(answer.headers) + answer.body.decode("utf-8", "replace")
        assert [secret for secret in secrets if secret in whole] == [], path
