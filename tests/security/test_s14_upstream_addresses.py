"""S1, S13, S14: where an upstream may be. What may not be asked is not even connected to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from django.core.exceptions import ValidationError

from inference.engines.base import LoadError
from inference.engines.upstream.addresses import Addresses
from inference.engines.upstream.arguments import read_arguments, read_url
from inference.engines.upstream.remote import Remote
from inference.protocol import Cause, Upstream
from registry.validators import validate_upstream_url
from tests.node.upstreams import ANSWER, KEY, foreign, serving

FORMS = [
    "",
    "models.example.com",
    "ftp://models.example.com/v1",
    "file:///etc/passwd",
    "gopher://models.example.com/",
    "unix:///run/docker.sock",
    "http:///v1",
    "http://user@models.example.com/v1",
    "http://user:secret@models.example.com/v1",
    "http://models.example.com@evil.example.net/v1",
    "http://models.example.com/v1?to=http://evil.example.net",
    "http://models.example.com/v1#fragment",
    "http://models.example.com\\@evil.example.net/v1",
    "http://models.example.com:99999/v1",
    "http://models.example.com:0/v1",
    "http://models.example.com/v1/../admin",
    "http://models.example.com/\r\nX-Evil: 1",
    "http://models.example.com/\x00",
    "http://ｍodels.example.com/v1",
    "http://" + "a" * 600,
]
ADDRESSES = [
    "169.254.169.254",
    "2852039166",  # the same as one number
    "0xA9FEA9FE",
    "0251.0376.0251.0376",
    "169.254.43518",
    "[::ffff:169.254.169.254]",
    "[::ffff:a9fe:a9fe]",
    "[64:ff9b::a9fe:a9fe]",
    "[2002:a9fe:a9fe::1]",
    "[fe80::1]",
    "[fd00:ec2::254]",
    "[ff02::1]",
    "[::]",
    "0.0.0.0",
    "0",
    "100.100.100.200",
    "168.63.129.16",
    "224.0.0.1",
    "255.255.255.255",
]
ALLOWED = ["127.0.0.1", "10.1.2.3", "192.168.0.4", "8.8.8.8", "::1", "2001:4860:4860::8888", "fc00::1"]
"""Private ones too: an operator says so."""


@pytest.mark.parametrize("url", FORMS)
def test_urls_of_odd_forms_are_refused_when_they_are_written(url: str) -> None:
    with pytest.raises(LoadError) as error:
        read_url(url)
    assert error.value.cause is Cause.BAD_ARGUMENT
    with pytest.raises(ValidationError):
        validate_upstream_url(url)


@contextlib.asynccontextmanager
async def tripwire() -> AsyncIterator[tuple[int, list[Any]]]:
    """A port that every address of this machine reaches, and whoever connected to it."""
    met: list[Any] = []
    server = await asyncio.start_server(lambda _, writer: met.append(writer), ["0.0.0.0", "::"], 0)
    try:
        yield server.sockets[0].getsockname()[1], met
    finally:
        for writer in met:
            writer.close()
        server.close()


async def outcome(url: str, allowed: tuple[str, ...] = ()) -> str:
    """What looking for the server ends with."""
    arguments = read_arguments({"url": url, "model": "m"})
    remote = Remote(arguments, Upstream(key=KEY, allowed=list(allowed)))
    await remote.open()
    try:
        await remote.models()
    except LoadError as error:
        return error.detail
    finally:
        await remote.close()
    return ""


@pytest.mark.parametrize("host", ADDRESSES)
async def test_forbidden_addresses_are_not_connected_to(host: str) -> None:
    async with tripwire() as (port, met):
        assert "may not be asked" in await outcome(f"http://{host}:{port}/v1")
        assert met == []


async def test_a_name_that_comes_to_mean_another_address_is_refused(monkeypatch: Any) -> None:
    answers = ["127.0.0.1", "169.254.169.254"]

    def flips(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        address = answers.pop(0) if host == "flips.example.com" else host
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", flips)
    async with foreign(answer=ANSWER) as server:
        url = server.url.replace("127.0.0.1", "flips.example.com")
        assert await outcome(url) == ""
        assert "may not be asked" in await outcome(url)
        assert len(server.looked) == 1


async def test_redirects_are_not_followed_and_get_no_key() -> None:
    async with foreign(answer=ANSWER) as server, tripwire() as (port, met):
        async with serving(server, model="theirs") as worker:
            server.headers = {"Location": f"http://127.0.0.1:{port}/v1/chat/completions"}
            for status in (301, 302, 303, 307, 308):
                server.status = status
                assert (await worker.chat())[0] == 503
        server.models_status = 307
        assert "redirect" in await outcome(server.url)
        assert met == []


async def test_proxies_of_the_environment_are_not_used(monkeypatch: Any) -> None:
    async with foreign(answer=ANSWER) as server, tripwire() as (port, met):
        for name in ("http_proxy", "HTTP_PROXY", "https_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        async with serving(server) as worker:
            assert (await worker.chat())[0] == 200
        assert met == []


async def test_an_allow_list_leaves_the_rest_out() -> None:
    async with tripwire() as (port, met), foreign() as server:
        url = f"http://127.0.0.1:{port}/v1"
        assert "ROUNDHOUSE_UPSTREAM_HOSTS" in await outcome(url, ("10.0.0.0/8", "models.example.com"))
        assert met == []
        assert await outcome(server.url, ("127.0.0.0/8",)) == ""
        named = server.url.replace("127.0.0.1", "localhost")
        assert await outcome(named, ("localhost",)) == ""
        assert "ROUNDHOUSE_UPSTREAM_HOSTS" in await outcome(named, ("other.example.com",))


def test_what_operators_have_is_allowed() -> None:
    for address in ALLOWED:
        assert Addresses().refusal(address, "host") is None, address
    assert Addresses(["host"]).refusal("169.254.169.254", "host") is not None
