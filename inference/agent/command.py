"""`manage.py node`: joins a gateway when this machine has not, then becomes the agent."""

from __future__ import annotations

import argparse
import asyncio
import ipaddress
import os
import socket
import sys
from pathlib import Path
from urllib.parse import urlsplit

import aiohttp
import msgspec

from inference.agent.identity import (
    Identity,
    default_cache,
    default_data,
    node_folder,
    read_identity,
    write_identity,
)
from inference.agent.inventory import version
from inference.agent.processes import clean_environment
from inference.protocol import JoinReply, JoinRequest

JOIN_SECONDS = 15.0


class JoinError(Exception):
    """Why this machine could not become a node, in one sentence."""


def main(argv: list[str]) -> int:
    """Join if needed and turn into `python -m inference.agent`. Returns only on failure."""
    arguments = _parser().parse_args(argv)
    data, cache = arguments.data.resolve(), arguments.cache.resolve()
    try:
        ensure_joined(
            data=data,
            url=arguments.url,
            token=arguments.join,
            name=arguments.name,
            address=arguments.address,
        )
    except JoinError as error:
        print(error, file=sys.stderr)
        return 1
    command = [sys.executable, "-m", "inference.agent", "--data", str(data), "--cache", str(cache)]
    # Celery loads Django whenever DJANGO_SETTINGS_MODULE is set, and an agent runs without it.
    os.execve(command[0], command, clean_environment())  # noqa: S606 - no shell is wanted


def ensure_joined(
    *, data: Path, url: str | None, token: str | None, name: str | None = None, address: str | None = None
) -> Identity:
    """The identity of this data folder, joining when there is none for `url`. Raises JoinError.

    A token is used only when it is needed. One for another gateway than before moves the node
    there: what the old gateway ordered is stopped by the first orders of the new one.
    """
    _check_writable(data)
    try:
        identity = read_identity(data)
    except ValueError as error:
        raise JoinError(str(error)) from None
    url = _checked_url(url) if url else None
    if identity is not None and url in (None, identity.url):
        return identity
    if url is None:
        raise JoinError("Which gateway? Give --url URL, and --join TOKEN to join it.")
    if not token:
        known = f"This node belongs to {identity.url}. " if identity is not None else ""
        raise JoinError(f"{known}To join {url}, give --join TOKEN; the admin makes join tokens.")
    request = JoinRequest(
        name=name or (identity.name if identity is not None else socket.gethostname().partition(".")[0]),
        address=_checked_address(address) if address else _own_address(url),
        version=version(),
    )
    reply = asyncio.run(_join(url, token, request))
    identity = Identity(
        url=url,
        node_id=reply.node_id,
        name=request.name,
        address=request.address,
        secret=reply.secret,
        broker_url=reply.broker_url,
        broker_prefix=reply.broker_prefix,
    )
    write_identity(data, identity)
    return identity


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="manage.py node", description="Make this machine a node of a gateway, and run its agent."
    )
    parser.add_argument("--join", metavar="TOKEN", help="join token from the admin; once per node")
    parser.add_argument("--url", help="the gateway, as in http://192.0.2.1:8000; once per node")
    parser.add_argument("--name", help="the node's name, default this machine's")
    parser.add_argument("--address", metavar="IP", help="where gateways reach this node's workers")
    parser.add_argument("--data", type=Path, default=default_data(), metavar="DIR")
    parser.add_argument("--cache", type=Path, default=default_cache(), metavar="DIR")
    return parser


async def _join(url: str, token: str, request: JoinRequest) -> JoinReply:
    timeout = aiohttp.ClientTimeout(total=JOIN_SECONDS)
    try:
        async with (
            aiohttp.ClientSession(timeout=timeout) as session,
            session.post(
                f"{url}/fleet/join",
                data=msgspec.json.encode(request),
                headers={"authorization": f"Bearer {token}", "content-type": "application/json"},
                allow_redirects=False,
            ) as response,
        ):
            content = await response.read()
    except TimeoutError:
        raise JoinError(f"The gateway {url} did not answer within {JOIN_SECONDS:.0f} s.") from None
    except aiohttp.ClientConnectorError as error:
        raise JoinError(f"The gateway {url} cannot be reached: {error.strerror or error}.") from None
    except aiohttp.ClientError as error:
        raise JoinError(f"The gateway {url} did not answer: {error}.") from None
    if not 200 <= response.status < 300:
        raise JoinError(_refusal(url, response.status, content))
    try:
        return msgspec.json.decode(content, type=JoinReply)
    except msgspec.DecodeError:
        raise JoinError(f"{url} answered, but not as a Roundhouse gateway does.") from None


class _ErrorBody(msgspec.Struct):
    message: str


class _Refusal(msgspec.Struct):
    error: _ErrorBody


def _refusal(url: str, status: int, content: bytes) -> str:
    try:
        message = msgspec.json.decode(content, type=_Refusal).error.message
    except msgspec.DecodeError:
        message = f"status {status}."
    return f"The gateway {url} refused this node: {message}"


def _checked_url(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
        raise JoinError(f"--url must be like http://192.0.2.1:8000, not {url!r}.")
    return url.rstrip("/")


def _checked_address(address: str) -> str:
    try:
        return str(ipaddress.ip_address(address))
    except ValueError:
        raise JoinError(f"--address must be an IP address, not {address!r}.") from None


def _own_address(url: str) -> str:
    """This machine's address on the way to the gateway. Nothing is sent to find it."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        family, kind, _, _, target = socket.getaddrinfo(parts.hostname, port, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)
            return str(probe.getsockname()[0])
    except OSError as error:
        raise JoinError(f"The gateway {url} cannot be reached: {error.strerror}.") from None


def _check_writable(data: Path) -> None:
    """Before the token is spent: it may be good for one use only."""
    folder = node_folder(data)
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise JoinError(f"The data folder {data} cannot be written: {error.strerror}.") from None
