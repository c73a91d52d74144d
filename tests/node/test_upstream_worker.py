"""The upstream engine as a whole worker: a supervisor and its engine as real processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest

from inference.agent.loop import WITHOUT_WEIGHTS
from inference.protocol import Assignment, Cause, ModelSpec, Upstream, Wish
from inference.protocol import WorkerPhase as Phase
from inference.worker.spec import WorkerSpec
from tests.node.engine_tools import SECRET, question, until
from tests.node.test_worker import CHAT, Gateway, Worker, gateway, run
from tests.node.upstreams import ANSWER, KEY, Foreign, foreign

__all__ = ["gateway", "run"]  # fixtures


@pytest.fixture
def start(
    run: Callable[[WorkerSpec], Worker], gateway: Gateway, tmp_path: Path
) -> Callable[[Foreign], Worker]:
    def start(server: Foreign) -> Worker:
        spec = WorkerSpec(
            assignment=Assignment(
                worker_id=7,
                epoch=3,
                name="w",
                wish=Wish.RUN,
                engine="upstream",
                model=ModelSpec(id=1, name="m", source="upstream"),
                slots=4,
                secret=SECRET,
                served_name="served",
                arguments={"url": server.url},
                upstream=Upstream(key=KEY),
            ),
            gateway_url=gateway.url,
            folder=str(tmp_path),
            beat_seconds=0.2,
            fence_seconds=60,
        )
        return run(spec)

    return start


async def test_it_answers_and_its_key_is_in_one_file_only(
    gateway: Gateway, start: Callable[[Foreign], Any]
) -> None:
    card = {"data": [{"id": "theirs", "max_model_len": 99}]}
    async with foreign(answer=ANSWER, models=card) as server:
        worker = start(server)
        await until(gateway.heard(Phase.READY), "the worker is ready")
        beat = gateway.last()
        assert beat is not None
        assert beat.context_length == 99
        assert "endpoint:chat" in beat.capabilities
        async with worker.post("Hi") as reply:
            assert (await reply.json())["choices"][0]["message"]["content"] == "Hello there"
        async with aiohttp.ClientSession() as stranger:
            url = worker.state().url + CHAT
            async with stranger.post(
                url, json=question("Hi"), headers={"Authorization": f"Bearer {KEY}"}
            ) as no:
                assert no.status == 401
        server.answer, server.status = {"error": {"message": KEY}}, 429
        async with worker.post("Hi") as reply:
            assert reply.status == 503
        for process in [psutil.Process(worker.process.pid), *psutil.Process(worker.process.pid).children()]:
            assert KEY not in str(process.environ())
            assert KEY not in str(process.cmdline())
        worker.process.terminate()
        assert await worker.exit_code() == 0
    holding = [file.name for file in worker.folder.iterdir() if KEY.encode() in file.read_bytes()]
    assert holding == ["spec.json"]
    assert all(KEY not in repr(beat) for _, beat in gateway.beats)


async def test_a_refused_key_fails_it_with_its_reason(
    gateway: Gateway, start: Callable[[Foreign], Any]
) -> None:
    async with foreign(answer={}, status=401) as server:
        worker = start(server)
        await until(gateway.heard(Phase.READY), "the worker is ready")
        async with worker.post("Hi") as reply:
            assert reply.status == 503
        beat = await worker.final_beat(Phase.FAILED)
        assert (beat.cause, beat.detail) == (Cause.BAD_ARGUMENT, "The server refuses the key (401).")


async def test_while_the_server_is_away_it_waits_and_says_so(
    gateway: Gateway, start: Callable[[Foreign], Any]
) -> None:
    async with foreign(answer=ANSWER, models_status=502) as server:
        start(server)
        await until(lambda: any(beat.progress for _, beat in gateway.beats), "it says what it waits for")
        beat = gateway.last()
        assert beat is not None
        assert beat.phase is Phase.LOADING
        assert beat.progress is not None
        assert "answers 502" in beat.progress.step
        server.models_status = 200
        await until(gateway.heard(Phase.READY), "the worker is ready")


def test_no_files_are_fetched_for_it() -> None:
    assert "upstream" in WITHOUT_WEIGHTS
