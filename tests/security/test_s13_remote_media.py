"""S13: no address that a client names is fetched: each is refused in every part of a message."""

from __future__ import annotations

import json
from typing import Any

import pytest

from openai_api.endpoints import CHAT
from openai_api.errors import InvalidRequest
from registry.models import UsageEvent
from tests.api.conftest import Served, Worker, facts, say, served, worker  # noqa: F401

ADDRESSES = [
    "http://169.254.169.254/latest/meta-data/",
    "https://example.com/a.png",
    "HTTPS://EXAMPLE.COM/a.png",
    " \t\nhttp://localhost/",
    "\x01http://localhost/",
    "http:\\\\localhost",
    "http://[::ffff:127.0.0.1]/",
    "http://0.0.0.0:8000/",
    "http://2130706433/",
    "//example.com/a.png",
    "\\\\host\\share",
    "file:///etc/passwd",
    "ftp://example.com/a",
    "gopher://localhost:6379/_x",
    "dict://localhost:11211/",
    "ldap://localhost/",
    "jar:http://localhost!/",
    "s3://bucket/key",
    "blob:http://localhost/x",
    "javascript:alert(1)",
    "xdata:text/plain,x",
]
PARTS: list[Any] = [
    lambda url: {"type": "image_url", "image_url": {"url": url}},
    lambda url: {"type": "image_url", "image_url": url},
    lambda url: {"type": "input_image", "image_url": url},
    lambda url: {"type": "audio_url", "audio_url": {"url": url}},
    lambda url: {"type": "video_url", "video_url": {"url": url}},
    lambda url: {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}},
    lambda url: {"type": "file", "file": {"file_data": url}},
    lambda url: {"type": "input_file", "file_url": url},
    lambda url: {"type": "image", "source": {"type": "url", "url": url}},
    lambda url: {"type": "text", "text": "x", "image_url": {"url": url}},
    lambda url: {"type": "image_url", "image_url": {"detail": "low", "more": [{"url": url}]}},
]


@pytest.mark.parametrize("address", ADDRESSES)
@pytest.mark.parametrize("role", ["user", "system", "assistant", "tool"])
def test_an_address_in_any_part_is_refused(address: str, role: str) -> None:
    for part in PARTS:
        message = {
            "role": role,
            "tool_call_id": "c",
            "content": [{"type": "text", "text": "x"}, part(address)],
        }
        # A control character in a text is refused as such where it is NUL only.
        body = json.dumps({"model": "m", "messages": [message]}).encode()
        with pytest.raises(InvalidRequest) as caught:
            CHAT.parse(body)
        assert caught.value.code == "remote_media_disabled"
        assert (caught.value.param or "").startswith("messages[0].content[1].")


@pytest.mark.django_db(transaction=True)
def test_a_refused_address_costs_nothing_and_a_text_may_name_one(
    served: Served,  # noqa: F811
    worker: Worker,  # noqa: F811
) -> None:
    before = worker.load()["steps"]
    for part in PARTS:
        answer = served.chat(
            say("x") | {"messages": [{"role": "user", "content": [part("http://127.0.0.1:1/")]}]}
        )
        assert answer.status == 400
        assert answer.error()["code"] == "remote_media_disabled"
    assert worker.load()["steps"] == before
    assert not UsageEvent.objects.exists()
    text = [{"type": "text", "text": "what is http://127.0.0.1:1/ ?"}]
    assert served.chat(say("x") | {"messages": [{"role": "user", "content": text}]}).status == 200
