"""S4: nothing that is written oddly passes for somebody: not a Host, a path, a method, a header or a key."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator

import pytest

from tests.api.conftest import Answer, Served, Worker, facts, say, served, worker  # noqa: F401

pytestmark = pytest.mark.django_db(transaction=True)

BODY = json.dumps(say("hi")).encode()
GUARDED = [
    ("POST", "/v1/chat/completions"),
    ("GET", "/v1/models"),
    ("GET", "/v1/organization/usage/completions"),
    ("POST", "/tokenize"),
    ("POST", "/fleet/worker"),
    ("GET", "/admin/"),
    ("GET", "/chat/"),
]
"""Served by consumers, by DRF's views, by the fleet's own check and by sessions."""

HOSTS = [
    b"a/?x=", b"localhost/?x=", b"localhost?x=/healthz", b"localhost#", b"user@localhost", b"localhost@evil",
    b"localhost:80:80", b"localhost:x", b"localhost,evil", b"localhost evil", b"[::1", b"127.0.0.1.evil",
    b"local\xc0\xafhost", b"localhost\xad", b".localhost..", b"%6cocalhost", b"http://localhost", b"/healthz",
]  # fmt: skip


def paths(path: str) -> Iterator[bytes]:
    """The same path to somebody who reads URLs in another way."""
    raw = path.encode()
    first, rest = raw[1:].split(b"/", 1) if raw.count(b"/") > 1 else (raw[1:], b"")
    yield b"/" + raw
    yield b"@localhost" + raw
    yield raw[1:]
    yield b"//evil" + raw
    yield b"/." + raw
    yield b"/healthz/.." + raw
    yield b"/healthz%2f.." + raw
    yield b"/%2e" + raw
    yield b"/healthz;" + raw
    yield b"/" + first + b"%2f" + rest
    yield b"/" + first + b"%5c" + rest
    yield b"/" + first + b"\\" + rest
    yield b"/" + first + b"//" + rest
    yield raw + b"%00"
    yield raw + b"%0a"
    yield raw + b"%20"
    yield raw + b";x"
    yield raw + b"%3f"
    yield raw + b"/..;/"
    yield raw.upper()
    yield raw.replace(b"o", b"%6F", 1)
    yield b"http://localhost" + raw
    yield b"http://evil" + raw
    yield b"http:" + raw


def said(served: Served, method: bytes, path: bytes, *headers: bytes) -> Answer:  # noqa: F811
    sent = [method + b" " + path + b" HTTP/1.1", *headers]
    if method == b"POST":
        sent += [b"Content-Type: application/json", b"Content-Length: %d" % len(BODY)]
    return served.raw(
        b"\r\n".join([*sent, b"Connection: close", b"", b""]) + (BODY if method == b"POST" else b"")
    )


def test_a_path_written_oddly_is_no_way_in(served: Served) -> None:  # noqa: F811
    for method, path in GUARDED:
        for written in paths(path):
            answer = said(served, method.encode(), written, b"Host: localhost")
            assert 300 <= answer.status < 500, (method, written, answer.status, answer.body[:200])
        # These are the probe's, whatever follows: it answers, and nothing else does.
        for written in (b"/healthz?x=" + path.encode(), b"/healthz#" + path.encode()):
            answer = said(served, method.encode(), written, b"Host: localhost")
            assert answer.status == 405 or answer.json() == {"status": "ok"}, (written, answer.body[:200])


def test_a_host_written_oddly_is_refused_with_a_good_key_too(served: Served) -> None:  # noqa: F811
    for path in ("/v1/chat/completions", "/v1/models", "/login/"):
        refuse_hosts(served, path)
    assert said(served, b"GET", b"/login/", b"Host: localhost").status == 200


def refuse_hosts(served: Served, path: str) -> None:  # noqa: F811
    method = b"POST" if path.endswith("completions") else b"GET"
    key = b"Authorization: Bearer " + served.api_key.encode()
    for host in HOSTS:
        answer = said(served, method, path.encode(), b"Host: " + host, key)
        assert answer.status == 400, (host, answer.body[:200])
    for twice in (b"localhost\r\nHost: localhost", b"evil\r\nHost: localhost", b"localhost\r\n Host: evil"):
        assert said(served, method, path.encode(), b"Host: " + twice, key).status == 400, twice
    # What proxies add decides nothing.
    told = [b"X-Forwarded-Host: localhost", b"Forwarded: host=localhost", b"X-Original-URL: /healthz"]
    assert said(served, method, path.encode(), b"Host: evil", key, *told).status == 400


def odd_credentials(key: bytes) -> Iterator[tuple[bytes, ...]]:
    """Headers that hold the key, or nearly, and are no proof of it."""
    for odd in (b"\x85", b"\xa0", b"\x0b", b"\x0c", b"\x1c", b"\x1f", b"\x00", b"\xe2\x80\x83", b"\xff"):
        yield (b"Authorization: Bearer " + odd + key,)
        yield (b"Authorization: Bearer " + key + odd,)
        yield (b"Authorization: Bearer" + odd + key,)
        yield (b"Authorization: " + odd + b"Bearer " + key,)
        yield (b"x-api-key: " + key + odd,)
        yield (b"api-key: " + odd + key,)
    # Alike in its first characters, alike to somebody who folds case, digits or width.
    yield (b"Authorization: Bearer " + key[:20],)
    yield (b"Authorization: Bearer " + key[:-1],)
    yield (b"Authorization: Bearer " + key + key[-1:],)
    yield (b"Authorization: Bearer " + key.swapcase(),)
    yield (b"Authorization: Bearer " + key.replace(b"-", b"\xe2\x80\x90", 1),)
    yield (b"Authorization: Bearer " + key[:16] + b"A" * (len(key) - 16),)
    yield (b"Authorization: Bearer " + key.replace(b"sk-", b"SK-"),)
    for around in (b"%s,x", b"x,%s", b"%s x", b'"%s"', b"<%s>", b"%s;", b"%%%s", b"Bearer %s", b"\\%s"):
        yield (b"Authorization: Bearer " + around.replace(b"%s", key),)
    for scheme in (b"Basic", b"Bearer:", b"Token", b"Bear\xc4\xb1r", b"", b"Bearer,Bearer"):
        yield (b"Authorization: " + scheme + b" " + key,)
    # Two people in one request: none of them.
    yield (b"Authorization: Bearer x", b"Authorization: Bearer " + key)
    yield (b"Authorization: Bearer " + key, b"Authorization: Bearer x")
    yield (b"Authorization: Bearer x", b"x-api-key: " + key)
    yield (b"x-api-key: " + key, b"x-api-key: x")
    # Not the headers that carry keys.
    for name in (b"x_api_key", b"Proxy-Authorization", b"X-Forwarded-Authorization", b"Cookie", b"X-User-Id"):
        yield (name + b": Bearer " + key,)
        yield (name + b": " + key,)
    yield (b"Authorization : Bearer " + key,)
    yield (b"X-A: b\r\n Authorization: Bearer " + key,)
    yield (b"X-A: b\nAuthorization: Bearer " + key,)


def test_a_key_written_oddly_is_nobodys(served: Served, worker: Worker) -> None:  # noqa: F811
    refuse_credentials(served, worker, "POST", "/v1/chat/completions")
    # Served by Django, which reads headers in its own way.
    refuse_credentials(served, worker, "GET", "/v1/models")


def refuse_credentials(served: Served, worker: Worker, method: str, path: str) -> None:  # noqa: F811
    before = worker.load()["steps"]
    good = served.api_key.encode()
    tried = 0
    for headers in odd_credentials(good):
        answer = said(served, method.encode(), path.encode(), b"Host: localhost", *headers)
        # No HTTP at all, or nobody's key.
        assert answer.status in (400, 401), (headers, answer.status, answer.body[:200])
        tried += 1
    assert tried > 80
    for query in (b"?api_key=", b"?key=", b"?access_token=", b"?authorization=Bearer%20"):
        assert said(served, method.encode(), path.encode() + query + good, b"Host: localhost").status == 401
    assert worker.load()["steps"] == before
    # Blanks and tabs around it are HTTP's own, and the scheme may be written in any case.
    for written in (b"Authorization:\t bearer  " + good + b" \t", b"X-API-Key: " + good, b"api-key:" + good):
        answer = said(served, method.encode(), path.encode(), b"Host: localhost", written)
        assert answer.status == 200, (written, answer.body[:200])


def test_one_request_is_not_read_as_two(served: Served) -> None:  # noqa: F811
    """What a proxy before us would take for a body must not be a request of its own."""
    inner = b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\nAuthorization: Bearer %s\r\n\r\n" % (
        served.api_key.encode()
    )
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    for lengths in (
        b"Content-Length: 0\r\nTransfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n",
        b"Content-Length: 0\r\nContent-Length: 30\r\n",
        b"Content-Length: +0\r\n",
        b"Content-Length: 0x0\r\n",
        b"Content-Length: -1\r\n",
        b"Transfer-Encoding: xchunked\r\n",
        b"Transfer-Encoding: chunked, identity\r\n",
        b"Transfer-Encoding : chunked\r\n",
        b"Transfer-Encoding:\x0bchunked\r\n",
    ):
        received = b""
        with socket.create_connection(("127.0.0.1", served.port), timeout=2) as connected:
            connected.sendall(head + lengths + b"\r\n" + b"0\r\n\r\n" + inner)
            # To the end: an answer to what is inside would come behind the first one.
            while part := connected.recv(65536):
                received += part
        assert received.startswith(b"HTTP/1.1 400 "), (lengths, received[:300])
        assert received.count(b"HTTP/1.1 ") == 1, (lengths, received)
