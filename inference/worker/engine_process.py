"""The engine child as its supervisor sees it: start, listen to, ask, stop."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import IO, cast

import aiohttp
import msgspec

from inference.protocol import Load
from inference.worker.endings import memory_kills
from inference.worker.files import EngineLog
from inference.worker.guard import SECRET_VARIABLE
from inference.worker.spec import (
    LOG_FILE,
    EngineAdmission,
    EngineFailed,
    EngineMessage,
    EngineOrder,
    EngineProcessSpec,
    EngineProgress,
    EngineReady,
    WorkerSpec,
    encode_line,
)

TERMINATE_SECONDS = 5.0
"""How long an engine may take to end after SIGTERM; then SIGKILL."""

_LAST_WORDS_SECONDS = 0.5
"""How long after a child's end its log and messages are read on: a grandchild may hold them open."""

_LOAD_REPLY_SECONDS = 2.0
_ORDER_SECONDS = 2.0
_BACKLOG = 2048

_NOT_FOR_ENGINES = (
    *("ROUNDHOUSE_", "DJANGO_", "CELERY_", "PG", "DATABASE_URL", "REDIS_URL"),
    *("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"),
)
"""Variables of the control plane, and the hub's token, which only the fetching needs: an engine runs
other people's code on other people's text."""


class PortTaken(Exception):
    """The address to listen on is not to be had."""


def engine_environment(base: Mapping[str, str], extra: Mapping[str, str], secret: str) -> dict[str, str]:
    """The child's environment: ours without the control plane's, then the deployment's. The agent's mark,
    by which it finds what a dead worker left running, stays."""
    kept = {name: value for name, value in base.items() if not name.startswith(_NOT_FOR_ENGINES)}
    return {**kept, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **extra, SECRET_VARIABLE: secret}


class EngineProcess:
    """One child, started once: an engine of ours, behind our own HTTP server."""

    def __init__(
        self,
        spec: WorkerSpec,
        session: aiohttp.ClientSession,
        *,
        on_progress: Callable[[EngineProgress], None],
        on_ready: Callable[[EngineReady], None],
    ) -> None:
        self.url = ""
        self.pid = 0
        self.exited: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        """The exit code, negative for a signal, as soon as the child has ended."""
        self.told: EngineFailed | None = None
        """Why the child ends, in its own words."""
        self._spec = spec
        self._session = session
        self._on_progress = on_progress
        self._on_ready = on_ready
        self._secret = spec.assignment.secret
        self._log = EngineLog(Path(spec.folder) / LOG_FILE, hide=self._secret)
        self._popen: subprocess.Popen[bytes] | None = None
        self._control: asyncio.StreamWriter | None = None
        self._readers: set[asyncio.Task[None]] = set()
        self._admission = True
        self._admitted = asyncio.Event()
        self._memory_kills = 0

    async def start(self) -> None:
        """Take the port and start the child. Raises PortTaken."""
        listener = self._take_port(listen=True)
        ours, theirs = socket.socketpair()
        ours.setblocking(False)
        read_fd, write_fd = os.pipe()
        assignment = self._spec.assignment
        # Our copies of the child's ends are closed at once: a child that dies then resets its clients'
        # connections by itself, and its log and control socket end with it.
        try:
            popen = self._start_child(
                [
                    sys.executable,
                    "-m",
                    "inference.engines.server",
                    f"--fd={listener.fileno()}",
                    f"--control={theirs.fileno()}",
                ],
                prints_to=write_fd,
                stdin=subprocess.PIPE,
                pass_fds=(listener.fileno(), theirs.fileno()),
                environment=engine_environment(os.environ, assignment.environment, self._secret),
            )
        finally:
            listener.close()
            theirs.close()
            os.close(write_fd)
        await self._follow_log(read_fd)
        await self._follow_messages(ours)
        spec = EngineProcessSpec(
            engine=assignment.engine,
            slots=assignment.slots,
            served_name=assignment.served_name,
            model_path=self._spec.model_path,
            chat_template=assignment.model.chat_template,
            arguments=assignment.arguments,
            upstream=assignment.upstream,
        )
        stdin = cast(IO[bytes], popen.stdin)  # PIPE above
        with contextlib.suppress(BrokenPipeError), stdin:  # a child that died already says so by its exit
            stdin.write(msgspec.json.encode(spec))

    async def read_load(self) -> Load | None:
        """The child's own report, or None when it gives none in time."""
        headers = {"Authorization": f"Bearer {self._secret}"}
        timeout = aiohttp.ClientTimeout(total=_LOAD_REPLY_SECONDS)
        try:
            async with self._session.get(f"{self.url}/load", headers=headers, timeout=timeout) as reply:
                if reply.status != 200:
                    return None
                return msgspec.json.decode(await reply.content.read(65536), type=Load)
        except (aiohttp.ClientError, TimeoutError, msgspec.DecodeError):
            return None

    async def admit(self, accept: bool) -> None:
        """Have new requests taken or refused; returns when that holds, or the child does not listen."""
        if self._control is None or accept == self._admission:
            return
        self._admission = accept
        self._admitted.clear()
        self._control.write(encode_line(EngineOrder(accept=accept)))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._admitted.wait(), _ORDER_SECONDS)

    async def stop(self, *, at_once: bool = False) -> int:
        """End the child: ask, wait, kill, wait. Returns its exit code."""
        if not at_once:
            self._signal(signal.SIGTERM)
            await asyncio.wait({self.exited}, timeout=TERMINATE_SECONDS)
        self._signal(signal.SIGKILL)
        return await self.exited

    def log_tail(self) -> list[str]:
        """The last lines that the child has printed so far."""
        return self._log.tail()

    async def last_words(self) -> list[str]:
        """Read what the ended child left behind; returns the last lines it printed."""
        if self._readers:
            _, open_still = await asyncio.wait(self._readers, timeout=_LAST_WORDS_SECONDS)
            for reader in open_still:
                reader.cancel()
            await asyncio.gather(*open_still, return_exceptions=True)
        if self._control is not None:
            self._control.close()
            self._control = None
        return self._log.tail()

    def killed_for_memory(self) -> bool:
        return memory_kills() > self._memory_kills

    def _start_child(
        self,
        command: list[str],
        *,
        prints_to: int,
        environment: Mapping[str, str],
        stdin: int = subprocess.DEVNULL,
        pass_fds: Collection[int] = (),
        own_group: bool = False,
    ) -> subprocess.Popen[bytes]:
        self._memory_kills = memory_kills()
        popen = self._popen = subprocess.Popen(
            command,
            stdin=stdin,
            stdout=prints_to,
            stderr=prints_to,
            pass_fds=pass_fds,
            env=environment,
            start_new_session=own_group,
        )
        self.pid = popen.pid
        self._watch_exit(popen)
        return popen

    def _take_port(self, *, listen: bool) -> socket.socket:
        """A socket at the worker's address, which `url` names from now on. Raises PortTaken."""
        host, port = self._spec.listen_host, self._spec.port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((host, port))
            if listen:  # here, not in the child: that settles at once who has the port
                listener.listen(_BACKLOG)
        except OSError as error:
            listener.close()
            reason = os.strerror(error.errno) if error.errno else "unknown reason"
            raise PortTaken(f"Cannot listen on {host} port {port or 'any'}: {reason}.") from None
        bound = listener.getsockname()[1]
        self.url = f"http://[{host}]:{bound}" if ":" in host else f"http://{host}:{bound}"
        return listener

    async def _follow_messages(self, control: socket.socket) -> None:
        messages, self._control = await asyncio.open_connection(sock=control, limit=1024 * 1024)
        self._readers.add(asyncio.create_task(self._hear(messages)))

    async def _follow_log(self, log_fd: int) -> None:
        lines = asyncio.StreamReader()
        await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(lines), os.fdopen(log_fd, "rb", buffering=0)
        )
        self._readers.add(asyncio.create_task(self._copy(lines)))

    async def _hear(self, messages: asyncio.StreamReader) -> None:
        with contextlib.suppress(ConnectionError):
            while line := await messages.readline():
                message: EngineMessage = msgspec.json.decode(line, type=EngineMessage)
                if isinstance(message, EngineProgress):
                    self._on_progress(message)
                elif isinstance(message, EngineReady):
                    self._on_ready(message)
                elif isinstance(message, EngineFailed):
                    self.told = message
                elif isinstance(message, EngineAdmission) and message.accept == self._admission:
                    self._admitted.set()

    async def _copy(self, lines: asyncio.StreamReader) -> None:
        while data := await lines.read(65536):
            self._printed(data)

    def _printed(self, data: bytes) -> None:
        self._log.write(data)

    def _watch_exit(self, popen: subprocess.Popen[bytes]) -> None:
        loop = asyncio.get_running_loop()

        def wait() -> None:
            code = popen.wait()
            with contextlib.suppress(RuntimeError):  # the loop is gone: nobody waits any more
                loop.call_soon_threadsafe(self._set_exited, code)

        # A daemon thread, because one of the executor would keep a failing supervisor from ending.
        threading.Thread(target=wait, name="engine-exit", daemon=True).start()

    def _set_exited(self, code: int) -> None:
        if not self.exited.done():
            self.exited.set_result(code)

    def _signal(self, number: signal.Signals) -> None:
        if self._popen is not None and not self.exited.done():
            with contextlib.suppress(ProcessLookupError):
                self._popen.send_signal(number)
