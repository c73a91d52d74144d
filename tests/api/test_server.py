"""The server around the application: its bounds, its start, its end."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from tests.api.conftest import ROOT, Answer, Served, eventually, process_serving, say

pytestmark = pytest.mark.django_db(transaction=True)


def refusal(answer: Answer, status: int) -> None:
    """What the server itself says is told as anything else is."""
    assert (answer.status, answer.error()["type"]) == (status, "invalid_request_error")
    assert re.fullmatch(r"req_[0-9a-f]{32}", answer.headers["x-request-id"])
    assert answer.headers["openai-version"] == "2020-10-01"
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["connection"] == "close"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_a_header_that_never_ends_is_closed(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "HEADER_SECONDS", 0.5)
    for start in (b"", b"GET /v1/models HTTP/1.1\r\nHost: loc"):
        answer = served.raw(start)
        refusal(answer, 408)
        assert answer.seconds < 4


def test_a_body_that_never_ends_is_closed(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "roundhouse")
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.5)
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        f"Authorization: Bearer {served.api_key}\r\n\r\n"
    )
    answer = served.raw(head.encode() + b'{"model"')
    refusal(answer, 408)
    assert answer.seconds < 4
    # The request's own line in the log has the id that the client was told.
    eventually(lambda: [line for line in caplog.records if line.message == "request"], "it is logged")
    ids = [getattr(line, "request_id", "") for line in caplog.records if line.message == "request"]
    assert ids == [answer.headers["x-request-id"]]
    assert not UsageEvent.objects.exists()


@pytest.mark.parametrize("part", ["header", "body"])
def test_many_that_send_a_byte_now_and_then_are_cut_and_nobody_waits(
    served: Served, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    # Each byte is a sign of life, and none of them gives more time.
    monkeypatch.setattr(limits, f"{part.upper()}_SECONDS", 1.0)
    start = b"GET /v1/models HTTP/1.1\r\nX-Slow: "
    if part == "body":
        start = (
            "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100000\r\n"
            f"Authorization: Bearer {served.api_key}\r\n\r\n"
        ).encode()
    served.chat(say("warm"))
    slow = [socket.create_connection(("127.0.0.1", served.port), timeout=5) for _ in range(200)]
    try:
        for connection in slow:
            connection.sendall(start)
            connection.setblocking(False)
        cut: dict[socket.socket, bytes] = {}
        seconds = []
        deadline = time.monotonic() + 10
        while len(cut) < len(slow):
            assert time.monotonic() < deadline, f"{len(cut)} of {len(slow)} were cut"
            for connection in slow:
                if connection in cut:
                    continue
                with contextlib.suppress(BlockingIOError):
                    cut[connection] = connection.recv(65536)
                    continue
                with contextlib.suppress(ConnectionError):
                    connection.send(b"x")
            answer = served.chat(say("hi", max_tokens=1))
            assert answer.status == 200
            seconds.append(answer.seconds)
            time.sleep(0.1)
    finally:
        for connection in slow:
            connection.close()
    assert all(told.startswith(b"HTTP/1.1 408 ") for told in cut.values())
    assert sorted(seconds)[len(seconds) // 2] < 0.25
    assert limits.HEADER_SECONDS <= 10
    assert limits.BODY_SECONDS <= 30


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
    refusal(answer, 431)


def test_what_is_no_http_is_400_in_json(served: Served) -> None:
    refusal(served.raw(b"\x16\x03\x01 hello\r\n\r\n"), 400)


def test_what_is_no_http_after_a_request_has_an_id_of_its_own(served: Served) -> None:
    request = (
        "POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n"
        f"Authorization: Bearer {served.api_key}\r\n\r\n{{}}"
    ).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connected:
        connected.sendall(request)
        first = Answer.of(connected.recv(65536), 0.0)
        connected.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        second = Answer.of(connected.recv(65536), 0.0)
    assert first.status == 400
    refusal(second, 400)
    assert first.headers["x-request-id"] != second.headers["x-request-id"]


def test_anthropics_clients_are_refused_in_their_words(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = b"X-Long: " + b"x" * limits.HEADER_BLOCK_BYTES + b"\r\n"
    long = served.raw(b"POST /v1/messages HTTP/1.1\r\nHost: localhost\r\n" + line + b"\r\n")
    monkeypatch.setattr(limits, "BODY_SECONDS", 0.5)
    head = (
        "POST /v1/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n"
        f"x-api-key: {served.api_key}\r\n\r\n"
    )
    for answer, status in ((long, 431), (served.raw(head.encode() + b"{"), 408)):
        assert answer.status == status
        payload = answer.json()
        assert (payload["type"], payload["error"]["type"]) == ("error", "invalid_request_error")
        assert payload["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]


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
