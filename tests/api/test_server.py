"""The server around the application: its bounds, its start, its end."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from openai_api import limits
from registry.models import UsageEvent
from registry.states import Outcome
from tests.api.conftest import ROOT, Served, eventually, process_serving, say

pytestmark = pytest.mark.django_db(transaction=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_header_that_never_ends_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.5)
    for start in (b"", b"GET /v1/models HTTP/1.1\r\nHost: loc"):
        answer = served.raw(start)
        assert answer.status == 408
        assert answer.seconds < 4
        assert json.loads(answer.body)["error"]["type"] == "invalid_request_error"


def test_a_body_that_never_ends_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.5)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        f"Authorization: Bearer {served.api_key}\r\n\r\n"
    )
    answer = served.raw(head.encode() + b'{"model"')
    assert answer.status == 408
    assert answer.seconds < 4
    assert not UsageEvent.objects.exists()


def test_a_long_answer_and_an_idle_connection_are_not_cut_by_the_time_limits(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.2)
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.2)
    body = json.dumps(say("!tokens 4 !slow 0.3")).encode()
    request = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        f"Authorization: Bearer {served.api_key}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connected:
        for pause in (1.5, 0.0):
            connected.sendall(request)
            received = b""
            while b"usage" not in received:
                part = connected.recv(65536)
                assert part, "closed too early"
                received += part
            # Between two requests a connection may rest.
            time.sleep(pause)


@pytest.mark.parametrize("pieces", [1, 40])
def test_a_header_block_beyond_the_bound_is_431(served: Served, pieces: int) -> None:
    line = b"X-Long: " + b"x" * (limits.HEADER_BLOCK_BYTES // pieces + 8) + b"\r\n"
    answer = served.raw(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n" + line * pieces + b"\r\n")
    assert answer.status == 431


def test_what_is_no_http_is_400_in_json(served: Served) -> None:
    answer = served.raw(b"\x16\x03\x01 hello\r\n\r\n")
    assert answer.status == 400
    assert "error" in json.loads(answer.body)


def test_a_busy_port_is_told_in_one_sentence(served: Served) -> None:
    ended = subprocess.run(
        [sys.executable, str(ROOT / "manage.py"), "gateway", "--port", str(served.port)],
        env={**os.environ, "ROUNDHOUSE_DATA": os.environ["ROUNDHOUSE_DATA"]},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "is in use by another program" in ended.stderr
    assert len(ended.stderr.strip().splitlines()) == 1


def test_sigterm_lets_a_stream_finish_and_the_ledger_have_it(facts: str, tmp_path: Path) -> None:
    port = free_port()
    command = (str(ROOT / "manage.py"), "gateway", "--port", str(port))
    with process_serving(*command, port=port, data=tmp_path) as gateway:
        served = Served(port, facts)
        # Complete at the first request: the fleet was known before it listened.
        assert [model["id"] for model in served.request("GET", "/v1/models").json()["data"]]
        assert served.chat(say("hi")).status == 200
        answers: list[bytes] = []
        streaming = threading.Thread(
            target=lambda: answers.append(served.chat(say("!tokens 20 !slow 0.05", stream=True)).body)
        )
        streaming.start()
        time.sleep(0.3)
        gateway.send_signal(signal.SIGTERM)
        streaming.join(10)
        assert gateway.wait(15) == 0
        assert b"data: [DONE]" in answers[0]
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            raise AssertionError("it still listens")
    events = list(UsageEvent.objects.order_by("id"))
    assert [(event.outcome, event.completion_tokens) for event in events][-1] == (Outcome.OK, 20)
    assert len(events) == 2


def test_a_gateway_killed_in_mid_stream_leaves_the_tokens_to_the_next_one(facts: str, tmp_path: Path) -> None:
    port = free_port()
    command = (str(ROOT / "manage.py"), "gateway", "--port", str(port))
    with process_serving(*command, port=port, data=tmp_path) as gateway:
        seen: list[bytes] = []

        def read() -> None:
            with socket.create_connection(("127.0.0.1", port), timeout=10) as connected:
                body = json.dumps(say("!tokens 100 !slow 0.03", stream=True)).encode()
                connected.sendall(
                    f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer {facts}"
                    f"\r\nContent-Length: {len(body)}\r\n\r\n".encode()
                    + body
                )
                with contextlib.suppress(ConnectionError):
                    while part := connected.recv(65536):
                        seen.append(part)

        reading = threading.Thread(target=read)
        reading.start()
        eventually(lambda: b"".join(seen).count(b'"content":" ') >= 8, "some tokens came")
        gateway.kill()
        reading.join(10)
    tokens = b"".join(seen).count(b'{"content":')
    with process_serving(*command, port=port, data=tmp_path):
        event = eventually(lambda: UsageEvent.objects.first(), "the next gateway settles it", seconds=15)
    assert event.outcome == Outcome.INTERRUPTED
    assert event.completion_tokens >= tokens


def test_runserver_serves_the_same(facts: str, tmp_path: Path) -> None:
    port = free_port()
    command = (str(ROOT / "manage.py"), "runserver", "--noreload", str(port))
    with process_serving(*command, port=port, data=tmp_path):
        served = Served(port, facts)
        assert served.chat(say("hi")).status == 200
        assert served.request("GET", "/v1/models").status == 200
        assert served.chat(b"{").error()["type"] == "invalid_request_error"
        assert served.chat(say("hi"), key=None).status == 401
