"""A thousand streams that say nothing (F46): others are answered beside them, and their end leaves nothing.
How much memory ten thousand take is the benchmark's matter (`python -m bench --only idle`)."""

from __future__ import annotations

import pytest

from bench.idle import raise_file_limit, sleeping
from bench.stage import stage
from tests.e2e.conftest import eventually
from tests.services import missing

pytestmark = [pytest.mark.e2e, pytest.mark.full, pytest.mark.timeout(300)]

STREAMS = 1000
FILES = 2 * STREAMS + 250


def test_others_are_answered_beside_a_thousand_idle_streams() -> None:
    if raise_file_limit(FILES) < FILES:
        missing("too few open files are allowed here")
    with stage() as bench:
        bench.deploy("idle", slots=STREAMS + 1)
        worker = bench.roundhouse.worker("idle")
        assert worker is not None
        before = bench.settled_events()
        with sleeping(bench, STREAMS):
            assert bench.roundhouse.running(worker) == STREAMS
            # The last slot: each of these waits for nobody.
            for _ in range(20):
                assert bench.roundhouse.answers("idle")
        eventually(lambda: bench.roundhouse.running(worker) == 0, seconds=20, what="the worker runs nothing")
        eventually(
            lambda: bench.events() - before == 20 + STREAMS, seconds=20, what="each is in the ledger, once"
        )
        ((aborted,),) = bench.roundhouse.rows(
            "SELECT count(*) FROM registry_usageevent WHERE outcome = 'aborted'"
        )
        assert aborted == STREAMS
