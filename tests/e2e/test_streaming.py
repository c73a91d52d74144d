"""Streams on real sockets: nothing buffers, and a client that leaves stops its generation."""

from __future__ import annotations

import itertools
import socket
import time
from urllib.parse import urlsplit

import pytest

from tests.e2e.conftest import Roundhouse, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def slow(roundhouse: Roundhouse) -> str:
    """A simulated model at 50 ms per token."""
    roundhouse.deploy_simulated("streamed", token_seconds=0.05)
    return "streamed"


def test_chunks_arrive_apart_as_they_are_made(roundhouse: Roundhouse, slow: str):
    stream = roundhouse.client().chat.completions.create(
        model=slow, messages=[{"role": "user", "content": "!tokens 20"}], stream=True
    )
    arrivals = [time.monotonic() for chunk in stream if chunk.choices and chunk.choices[0].delta.content]
    gaps = [later - earlier for earlier, later in itertools.pairwise(arrivals)]
    assert len(arrivals) == 20
    # Of each token's 50 ms at least 30 must be seen between it and the next.
    assert sorted(gaps)[len(gaps) // 10] >= 0.03, gaps


@pytest.mark.parametrize("model", ["streamed", "smollm2-135m-instruct"])
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "not streamed"])
def test_a_client_that_leaves_stops_the_engine_within_a_second(
    roundhouse: Roundhouse, slow: str, model: str, stream: bool
):
    address = urlsplit(roundhouse.credentials["base_url"])
    content = "!tokens 400" if model == "streamed" else "Count from 1 to 1000."
    body = (
        f'{{"model": "{model}", "stream": {str(stream).lower()}, "max_tokens": 1500, '
        f'"messages": [{{"role": "user", "content": "{content}"}}]}}'
    ).encode()
    worker = roundhouse.worker(model)
    with socket.create_connection((address.hostname, address.port)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\n"
            b"Content-Type: application/json\r\n"
            + f"Authorization: Bearer {roundhouse.credentials['api_key']}\r\n".encode()
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        if stream:
            received = b""
            while received.count(b"data: ") < 3:
                received += connection.recv(65536)
        eventually(lambda: roundhouse.running(worker) == 1, seconds=5, what="the engine works")
    left = time.monotonic()
    eventually(lambda: roundhouse.running(worker) == 0, seconds=1.0, what="the engine stopped", every=0.02)
    print(f"{model}: idle {1000 * (time.monotonic() - left):.0f} ms after the client left")
