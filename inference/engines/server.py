"""The engine child of a worker: `python -m inference.engines.server --fd N [--control M] < spec.json`.

It takes over the listening socket N, reads its `EngineProcessSpec` from stdin and serves the engine
behind the guard. The port answers `/load` while the model loads; generation is refused until then.

Over the control socket M it tells its supervisor how loading goes and why it ends, and hears whether
to accept new requests. When the supervisor is gone, so is this process: on Linux the kernel sees to
it at once, elsewhere the closed control socket does.

Exit codes: 0 control socket closed, `EXIT_UNLOADED` the model could not be loaded, `EXIT_UNHEALTHY`
the engine can never answer again, `EXIT_TERMINATED` asked by SIGTERM or SIGINT.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import msgspec

from inference.engines import create_engine
from inference.engines.base import Engine, EngineSpec, LoadError, Model
from inference.protocol import Cause, Message, Progress
from inference.worker.guard import Guard
from inference.worker.spec import (
    EngineAdmission,
    EngineFailed,
    EngineOrder,
    EngineProcessSpec,
    EngineProgress,
    EngineReady,
    encode_line,
)

if TYPE_CHECKING:
    from inference.engines.http import WorkerApp

logger = logging.getLogger(__name__)

EXIT_UNHEALTHY = 70
EXIT_UNLOADED = 78
EXIT_TERMINATED = 143

_HEALTH_SECONDS = 0.25
_CLOSE_SECONDS = 3.0
_KEEP_ALIVE_SECONDS = 75
"""Longer than gateways keep an idle connection, so that it is always they who close it."""

_PR_SET_PDEATHSIG = 1


class _Control:
    """This end of the control socket; without one, nobody is told and nobody orders."""

    def __init__(self) -> None:
        self._writer: asyncio.StreamWriter | None = None
        self._reader: asyncio.StreamReader | None = None

    async def open(self, fd: int | None) -> None:
        if fd is not None:
            pair = socket.socket(fileno=fd)
            pair.setblocking(False)
            self._reader, self._writer = await asyncio.open_connection(sock=pair)

    def tell(self, message: Message) -> None:
        if self._writer is not None:
            self._writer.write(encode_line(message))

    async def flush(self) -> None:
        if self._writer is not None:
            with contextlib.suppress(ConnectionError):
                await self._writer.drain()

    async def obey(self, app: WorkerApp) -> None:
        """Carry out orders until the supervisor is gone."""
        if self._reader is None:
            await asyncio.Event().wait()
            return
        while line := await self._reader.readline():
            order = msgspec.json.decode(line, type=EngineOrder)
            app.accepting = order.accept
            self.tell(EngineAdmission(accept=order.accept))


async def _run(spec: EngineProcessSpec, listener: socket.socket, control_fd: int | None) -> int:
    control = _Control()
    await control.open(control_fd)
    try:
        engine = create_engine(
            spec.engine,
            EngineSpec(
                model_path=Path(spec.model_path) if spec.model_path is not None else None,
                slots=spec.slots,
                chat_template=spec.chat_template,
                arguments=spec.arguments,
                upstream=spec.upstream,
            ),
        )
        return await _serve(engine, spec, listener, control)
    except LoadError as error:
        logger.error("event=load_failed cause=%s %s", error.cause, error.detail)
        control.tell(EngineFailed(cause=error.cause, detail=error.detail))
        await control.flush()
        return EXIT_UNLOADED


def _app_for(engine: Model, spec: EngineProcessSpec) -> WorkerApp:
    """The HTTP face that fits what the engine does."""
    if spec.engine == "embedding":
        from inference.engines.embedding.app import EmbeddingApp
        from inference.engines.embedding.engine import EmbeddingEngine

        return EmbeddingApp(cast(EmbeddingEngine, engine), slots=spec.slots, served_name=spec.served_name)
    if spec.engine == "upstream":
        from inference.engines.upstream.app import UpstreamApp
        from inference.engines.upstream.engine import UpstreamEngine

        return UpstreamApp(cast(UpstreamEngine, engine), slots=spec.slots, served_name=spec.served_name)
    from inference.engines.app import EngineApp

    return EngineApp(cast(Engine, engine), slots=spec.slots, served_name=spec.served_name)


async def _serve(engine: Model, spec: EngineProcessSpec, listener: socket.socket, control: _Control) -> int:
    # Imported here so that a wrong engine name or argument is told in a quarter of the time.
    import uvicorn

    class Server(uvicorn.Server):
        """Leaves the signals to us: uvicorn would raise them again and skip the engine's close."""

        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

    app = _app_for(engine, spec)
    server = Server(
        uvicorn.Config(
            Guard(app.asgi),
            lifespan="off",
            ws="none",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_keep_alive=_KEEP_ALIVE_SECONDS,
            timeout_graceful_shutdown=1,
        )
    )
    loop = asyncio.get_running_loop()
    told = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, told.set)

    serving = asyncio.create_task(server.serve(sockets=[listener]))
    obeying = asyncio.create_task(control.obey(app))
    stopping = asyncio.create_task(told.wait())
    living = asyncio.create_task(_load_and_watch(engine, app, control, loop))
    tasks = {serving, obeying, stopping, living}
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    try:
        if living.done():
            return living.result()
        return EXIT_TERMINATED if stopping.done() else 0
    finally:
        server.should_exit = True
        for task in tasks - {serving}:
            task.cancel()
        # What still runs is told to stop; a failed shutdown must not hide why we end.
        await asyncio.gather(*tasks, return_exceptions=True)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(engine.close(), _CLOSE_SECONDS)


async def _load_and_watch(
    engine: Model, app: WorkerApp, control: _Control, loop: asyncio.AbstractEventLoop
) -> int:
    def progress(step: Progress) -> None:
        # Engines load in threads of their own and report from there.
        loop.call_soon_threadsafe(control.tell, EngineProgress(progress=step))

    await engine.load(progress)
    # What loading made stays: to walk through all of it for garbage holds every answer up for a while.
    gc.collect()
    gc.freeze()
    app.ready = True
    logger.info("event=ready context_length=%d", engine.context_length)
    control.tell(EngineReady(capabilities=sorted(engine.capabilities), context_length=engine.context_length))
    while engine.healthy():  # noqa: ASYNC110 - engines may fail in a thread of their own
        await asyncio.sleep(_HEALTH_SECONDS)
    detail = "The engine failed in a way that it cannot recover from."
    logger.error("event=unhealthy %s", detail)
    control.tell(EngineFailed(cause=Cause.CRASHED, detail=detail))
    await control.flush()
    return EXIT_UNHEALTHY


def _die_with_parent() -> None:
    """Have the kernel end this process when its supervisor's ends, however that happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def _event_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for every system; asyncio's own loop serves as well, slower
        return None
    factory: Any = uvloop.new_event_loop
    return factory  # type: ignore[no-any-return]


def main() -> None:
    _die_with_parent()
    parser = argparse.ArgumentParser(prog="python -m inference.engines.server", description="One engine.")
    parser.add_argument("--fd", type=int, required=True, help="listening socket to take over")
    parser.add_argument("--control", type=int, help="socket of the supervisor")
    options = parser.parse_args()
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s"
    )
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    spec = msgspec.json.decode(sys.stdin.buffer.read(), type=EngineProcessSpec)
    listener = socket.socket(fileno=options.fd)
    if hasattr(socket, "TCP_NOTSENT_LOWAT"):
        # A gateway that does not read, since its client does not, soon holds the answer up: the kernel would
        # keep some megabytes of each.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, 64 * 1024)
    with asyncio.Runner(loop_factory=_event_loop()) as runner:
        try:
            code = runner.run(_run(spec, listener, options.control))
        except Exception:
            logger.exception("event=crashed")
            code = 1
        sys.stdout.flush()
        logging.shutdown()
        # Threads of an engine that will not stop must not keep a dead worker in the process list.
        os._exit(code)


if __name__ == "__main__":
    main()
