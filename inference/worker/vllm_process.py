"""vLLM's API server as the worker's child: it owns the port, behind our guard, without a hop between."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import aiohttp
import msgspec

from inference.engines.base import LoadError
from inference.engines.vllm import command
from inference.engines.vllm.arguments import Arguments, read_arguments
from inference.engines.vllm.capabilities import capabilities
from inference.engines.vllm.endings import Telltales
from inference.engines.vllm.metrics import LoadReader
from inference.engines.vllm.preflight import preflight
from inference.engines.vllm.progress import ProgressReader
from inference.protocol import Cause, Load, Progress
from inference.worker.engine_process import EngineProcess, engine_environment
from inference.worker.guard import CLOSED_VARIABLE
from inference.worker.spec import EngineFailed, EngineProgress, EngineReady, WorkerSpec

_READY_POLL_SECONDS = 0.5
_REPLY_SECONDS = 2.0
_MAX_REPLY_BYTES = 4 * 1024 * 1024
_UNLOADED = 78
_CLOSED_FILE = "closed"


class _ModelCard(msgspec.Struct):
    max_model_len: int | None = None
    """None: of an adapter."""


class _Models(msgspec.Struct):
    data: list[_ModelCard]


class VllmProcess(EngineProcess):
    """The same for vLLM. It hears no orders: what it may take is told to the guard in front of it."""

    def __init__(
        self,
        spec: WorkerSpec,
        session: aiohttp.ClientSession,
        *,
        on_progress: Callable[[EngineProgress], None],
        on_ready: Callable[[EngineReady], None],
    ) -> None:
        super().__init__(spec, session, on_progress=on_progress, on_ready=on_ready)
        self._folder = Path(spec.folder)
        self._closed = self._folder / _CLOSED_FILE
        self._reservation: socket.socket | None = None
        self._telltales = Telltales(spec.assignment.arguments)
        self._loads = LoadReader()
        self._progress = ProgressReader()
        self._starting = True

    async def start(self) -> None:
        assignment = self._spec.assignment
        # Bound but not listening: nobody else is given the port until vLLM listens there, minutes later.
        self._reservation = self._take_port(listen=False)
        host, port = self._reservation.getsockname()[:2]
        own = {**assignment.environment, CLOSED_VARIABLE: str(self._closed)}
        environment = command.environment(engine_environment(os.environ, own, self._secret))
        try:
            if self._spec.model_path is None:
                raise LoadError(Cause.MISSING_FILE, "The vllm engine needs a model folder.")
            model = Path(self._spec.model_path)
            arguments = read_arguments(assignment.arguments)
            python = command.interpreter(os.environ, arguments.python_environment)
            self._on_progress(EngineProgress(progress=Progress(step="checking the machine")))
            found = await preflight(arguments, python=python, model=model, environment=environment)
        except LoadError as error:
            self.told = EngineFailed(cause=error.cause, detail=error.detail)
            self._set_exited(_UNLOADED)
            return
        self._log.write(f"{found}\n".encode())
        self._closed.unlink(missing_ok=True)
        read_fd, write_fd = os.pipe()
        line = command.command(
            arguments,
            python=python,
            model_path=self._spec.model_path,
            served_name=assignment.served_name,
            slots=assignment.slots,
            chat_template=self._written_template(),
            host=host,
            port=port,
            strict_tools=found.strict_tools,
        )
        try:
            self._start_child(
                [sys.executable, "-m", "inference.worker.tied", str(os.getpid()), *line],
                prints_to=write_fd,
                environment=environment,
                own_group=True,
            )
        finally:
            os.close(write_fd)
        await self._follow_log(read_fd)
        self._readers.add(asyncio.create_task(self._await_ready(arguments, model)))

    async def read_load(self) -> Load | None:
        page = await self._get("/metrics")
        try:
            return None if page is None else self._loads.read(page.decode())
        except ValueError:
            return None

    async def admit(self, accept: bool) -> None:
        if accept == self._admission:
            return
        self._admission = accept
        if accept:
            self._closed.unlink(missing_ok=True)
        else:
            self._closed.touch(mode=0o600)

    async def stop(self, *, at_once: bool = False) -> int:
        code = await super().stop(at_once=at_once)
        self._end_group()
        return code

    async def last_words(self) -> list[str]:
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None
        self._end_group()
        lines = await super().last_words()
        if self.told is None:
            self.told = self._telltales.found
        return lines

    def _end_group(self) -> None:
        """Its engine is a child of its own, which a killed server leaves behind with all the memory."""
        if self.pid:
            with contextlib.suppress(
                ProcessLookupError, PermissionError
            ):  # the second: macOS, for an empty one
                os.killpg(self.pid, signal.SIGKILL)

    def _printed(self, data: bytes) -> None:
        super()._printed(data)
        text = data.decode("utf-8", "replace")
        self._telltales.hear(text)
        if self._starting and (news := self._progress.hear(text)) is not None:
            self._on_progress(EngineProgress(progress=news))

    def _written_template(self) -> Path | None:
        template = self._spec.assignment.model.chat_template
        if template is None:
            return None
        path = self._folder / "chat_template.jinja"
        path.write_text(template)
        return path

    async def _await_ready(self, arguments: Arguments, model: Path) -> None:
        """Ask until it answers; then say so, once."""
        while (answer := await self._get("/v1/models")) is None:  # noqa: ASYNC110 - it tells nobody
            await asyncio.sleep(_READY_POLL_SECONDS)
        try:
            cards = msgspec.json.decode(answer, type=_Models).data
            context_length = next(card.max_model_len for card in cards if card.max_model_len is not None)
        except (msgspec.DecodeError, StopIteration):
            self.told = EngineFailed(cause=Cause.CRASHED, detail="vLLM does not say which model it serves.")
            self._signal(signal.SIGKILL)
            return
        self._starting = False
        chat = self._spec.assignment.model.chat_template is not None or has_template(model)
        self._on_ready(
            EngineReady(
                capabilities=sorted(capabilities(arguments, chat=chat)), context_length=context_length
            )
        )

    async def _get(self, path: str) -> bytes | None:
        """Its answer; None when it gives none in time, or another than 200."""
        headers = {"Authorization": f"Bearer {self._secret}"}
        timeout = aiohttp.ClientTimeout(total=_REPLY_SECONDS)
        try:
            async with self._session.get(f"{self.url}{path}", headers=headers, timeout=timeout) as reply:
                if reply.status != 200:
                    return None
                return await reply.content.read(_MAX_REPLY_BYTES)
        except (aiohttp.ClientError, TimeoutError):
            return None


def has_template(model: Path) -> bool:
    """The model's folder says how messages become a prompt."""
    if (model / "chat_template.jinja").exists() or (model / "chat_template.json").exists():
        return True
    try:
        return b'"chat_template"' in (model / "tokenizer_config.json").read_bytes()
    except OSError:
        return False
