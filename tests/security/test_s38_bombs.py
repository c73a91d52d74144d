"""S38: what is small on the wire and huge once unpacked is refused packed."""

from __future__ import annotations

import base64
import gzip
import json
import zlib

import psutil
import pytest

from openai_api.errors import InvalidRequest
from openai_api.parsing import check_headers
from registry.models import UsageEvent
from tests.api.conftest import Served, facts, say, served, worker  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)


def test_a_packed_body_is_never_unpacked(served: Served) -> None:  # noqa: F811
    zeros = b" " * 50_000_000
    packed = {
        "gzip": gzip.compress(zeros),
        "deflate": zlib.compress(zeros),
        "br": b"\x00" * 50,
        "zstd": b"(\xb5",
    }
    del zeros
    served.chat(say("warm"))
    before = psutil.Process().memory_info().rss
    for coding, body in packed.items():
        answer = served.chat(body, f"Content-Encoding: {coding}")
        assert answer.status in (400, 415), coding
        answer.error()
        with pytest.raises(InvalidRequest, match="Compressed"):
            check_headers({b"content-encoding": coding.encode()})
    assert psutil.Process().memory_info().rss - before < 50e6


def test_an_image_is_not_opened(served: Served) -> None:  # noqa: F811
    # A picture of 60,000 by 60,000 points of one colour, in 40 kB.
    rows = zlib.compress(b"\x00" * 40_000_000, 9)
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR\x00\x00\xea`\x00\x00\xea`\x08\x02\x00\x00\x00"
    url = "data:image/png;base64," + base64.b64encode(head + rows).decode()
    served.chat(say("warm"))
    before = psutil.Process().memory_info().rss
    for part in (
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "video_url", "video_url": {"url": url.replace("image/png", "video/mp4")}},
        {"type": "input_audio", "input_audio": {"data": url.partition(",")[2], "format": "wav"}},
        {"type": "file", "file": {"file_data": url.replace("image/png", "application/zip")}},
    ):
        for _ in range(5):
            body = json.dumps(say("x") | {"messages": [{"role": "user", "content": [part]}]}).encode()
            answer = served.chat(body)
            assert (answer.status, answer.error()["code"]) == (400, "unsupported_value")
            assert len(answer.body) < 500
    assert psutil.Process().memory_info().rss - before < 50e6
    assert UsageEvent.objects.count() <= 1
