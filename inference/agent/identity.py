"""Who this node is: what it was given at joining, kept in `<data>/node/identity.json`."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """A node as its gateway knows it. `secret` never leaves this machine but as a bearer token."""

    url: str
    """The gateway, without a slash at its end."""
    node_id: int
    name: str
    address: str
    """Where gateways reach this node's workers."""
    secret: str
    broker_url: str | None = None
    """Where nudges arrive; None: the agent only asks by itself."""
    broker_prefix: str = ""
    """Before the names of queues there: others may use it too."""

    @property
    def bearer(self) -> str:
        return f"{self.node_id}.{self.secret}"


def node_folder(data: Path) -> Path:
    """Where the agent of this data folder keeps its files."""
    return data / "node"


def read_identity(data: Path) -> Identity | None:
    """The stored identity, or None when this node has not joined.

    Raises ValueError, with a sentence, when there is one that cannot be read.
    """
    path = node_folder(data) / "identity.json"
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}.") from None
    try:
        return msgspec.json.decode(content, type=Identity)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is damaged ({error}); remove it and join again.") from None


def write_identity(data: Path, identity: Identity) -> None:
    folder = node_folder(data)
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    write_private(folder / "identity.json", msgspec.json.encode(identity))


def write_private(path: Path, content: bytes) -> None:
    """Put `content` at `path` whole or not at all, readable by its owner only."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    draft.replace(path)


def default_data() -> Path:
    return Path(os.environ.get("ROUNDHOUSE_DATA") or "var")


def default_cache() -> Path:
    """`ROUNDHOUSE_CACHE`, else `roundhouse` in the user's cache folder."""
    given = os.environ.get("ROUNDHOUSE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "roundhouse"
