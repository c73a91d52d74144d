"""When the thread that runs the model dies, the engine's process says so and ends, and its supervisor reports
a worker that crashed: control then starts another (tests of reconcile)."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx
import msgspec
import pytest

from inference.engines.server import EXIT_UNHEALTHY
from inference.protocol import Cause
from inference.worker.endings import classify_end
from inference.worker.spec import EngineFailed, EngineMessage, EngineReady
from tests.engines.tiny_model import make_tiny_llama
from tests.engines.tiny_models import make_tiny_t5

SECRET = "worker-s3cret"
PAGED = """
from inference.engines.transformers import batcher
made = batcher._manager
def dying(loaded, slots):
    manager = made(loaded, slots)
    forward = loaded.model.forward
    loaded.model.forward = lambda *args, **kwargs: forward(*args, **kwargs) if count() else fail()
    return manager
batcher._manager = dying
"""
STATIC = """
from inference.engines.transformers import static
made = static._plain_generation
def dying(model, pad):
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs) if count() else fail()
    return made(model, pad)
static._plain_generation = dying
"""
MAIN = """
import sys
steps = 0
def count():
    global steps
    steps += 1
    return steps < 20
def fail():
    raise RuntimeError("the device is gone")
exec(sys.argv.pop(1))
from inference.engines.server import main
main()
"""


@pytest.mark.full
@pytest.mark.parametrize("kind", ["paged", "static"])
def test_a_process_whose_thread_died_says_so_and_ends(tmp_path: Path, kind: str) -> None:
    paged = kind == "paged"
    folder = (make_tiny_llama if paged else make_tiny_t5)(tmp_path / "model")
    arguments = {"device": "cpu", "dtype": "float32"}
    spec = {
        "engine": "transformers", "slots": 2, "served_name": "m", "model_path": str(folder),
        "arguments": arguments,
    }  # fmt: skip
    listener = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair()
    ours.settimeout(120)
    sockets = (f"--fd={listener.fileno()}", f"--control={theirs.fileno()}")
    process = subprocess.Popen(
        [sys.executable, "-c", MAIN, PAGED if paged else STATIC, *sockets],
        stdin=subprocess.PIPE,
        pass_fds=(listener.fileno(), theirs.fileno()),
        env={**os.environ, "ROUNDHOUSE_WORKER_SECRET": SECRET},
    )
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.close()
    theirs.close()
    try:
        assert process.stdin is not None
        process.stdin.write(json.dumps(spec).encode())
        process.stdin.close()
        with ours, ours.makefile("rb") as lines:
            messages = (msgspec.json.decode(line, type=EngineMessage) for line in lines)
            assert any(isinstance(message, EngineReady) for message in messages)
            asked = {"model": "m", "prompt": "on and on", "max_tokens": 200, "ignore_eos": True}
            reply = httpx.post(
                f"{url}/v1/completions", json=asked, headers={"Authorization": f"Bearer {SECRET}"}, timeout=60
            )
            assert reply.status_code >= 500
            assert "device" not in reply.text
            told = next(message for message in messages if isinstance(message, EngineFailed))
        assert process.wait(30) == EXIT_UNHEALTHY
    finally:
        process.kill()
        process.wait()
    assert told.cause is Cause.CRASHED
    cause, detail = classify_end(told=told, exit_code=EXIT_UNHEALTHY, log_tail=[], killed_for_memory=False)
    assert (cause, detail) == (Cause.CRASHED, told.detail)
