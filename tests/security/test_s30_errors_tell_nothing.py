"""S30: what is refused tells nothing of us, however it was made."""

from __future__ import annotations

import json
import random
import re
from typing import Any

import msgspec
import pytest

from openai_api.document import document
from openai_api.endpoints import ENDPOINTS, Endpoint
from openai_api.errors import ApiError, answer_to
from tests.api.conftest import Served, facts, say, served, worker  # noqa: F401

TELLTALE = re.compile(
    r"(?:^|[\s'\"(])/(?:home|usr|work|var|tmp|opt|root|etc|srv)/|0x[0-9a-f]{6}|Traceback|"
    r"File \"|SELECT |INSERT |\.py\b|localhost|127\.0\.0\.1|psycopg|sqlite|msgspec|Struct"
)

ODD: list[Any] = [
    None, True, -1, 0, 1.5, 1e308, 2**63, -(2**63) - 1, "", "x", "\x1b[31m", "é" * 50, "{{7*7}}", "' OR 1=1",
    [], [[]], [None], {}, {"": None}, {"type": "text"}, [{"role": "user", "content": "x"}], [1, "a"],
    [{"role": "tool"}], ["x"] * 40, {"a": {"b": [{}]}}, "x" * 500,
]  # fmt: skip


def told_of(endpoint: Endpoint, body: bytes) -> dict[str, Any] | None:
    """What a client would be told; None: the body is accepted."""
    try:
        endpoint.parse(body)
    except ApiError as error:
        status, payload, _ = answer_to(error)
    else:
        return None
    assert status == 400, body[:200]
    told: dict[str, Any] = payload["error"]
    return told


def bodies(endpoint: Endpoint, count: int) -> list[bytes]:
    """Bodies with odd values in the endpoint's own fields, some of them broken off or bent."""
    chance = random.Random(30)
    fields = [field.encode_name for field in msgspec.structs.fields(endpoint.request)]
    path: Any = document()["paths"][endpoint.path]["post"]
    example = path["requestBody"]["content"]["application/json"]["example"]
    made = []
    for _ in range(count):
        body = dict(example)
        for name in chance.sample(fields, k=min(len(fields), chance.randint(1, 3))):
            body[name] = chance.choice(ODD)
        text = json.dumps(body).encode()
        if chance.random() < 0.25:
            at = chance.randrange(len(text))
            text = text[:at] + chance.choice([b"", b"\xff", b"\x00", b"}", b'"', b"NaN"]) + text[at + 1 :]
        made.append(text)
    return made


def test_ten_thousand_bad_bodies_are_told_nothing_of_us() -> None:
    each = 10_000 // len(ENDPOINTS) + 1
    refused = 0
    for endpoint in ENDPOINTS:
        for body in bodies(endpoint, each):
            told = told_of(endpoint, body)
            if told is None:
                continue
            refused += 1
            message = told["message"]
            assert len(message) < 1000
            assert not TELLTALE.search(message), (body[:300], message)
            assert set(told) == {"message", "type", "param", "code"}
    assert refused > 4000


@pytest.mark.django_db(transaction=True)
def test_so_are_some_through_the_socket(served: Served) -> None:  # noqa: F811
    for endpoint in ENDPOINTS:
        for body in bodies(endpoint, 12):
            answer = served.request("POST", endpoint.path, body)
            assert 200 <= answer.status < 500 or answer.status == 503, (body, answer.body)
            if answer.status != 200:
                assert not TELLTALE.search(answer.body.decode()), (body, answer.body)
    assert served.chat(say("hi")).status == 200
