"""The ledger's way in: whatever a gateway promised is accounted exactly once, whenever it is killed."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from datetime import UTC, datetime
from pathlib import Path

import pytest
from django.db import IntegrityError, OperationalError
from hypothesis import given, settings
from hypothesis import strategies as st

from registry import spool as spool_module
from registry.actions.usage import record_usage
from registry.models import UsageEvent
from registry.spool import CHUNK_SLOTS, Closed, Opened, Spool, SpoolFull, record_durably, recover_all
from registry.states import Outcome
from registry.threads import in_database

ROOT = Path(__file__).resolve().parents[2]
needs_ledger = pytest.mark.django_db(transaction=True)


def opened(name: str, **facts) -> Opened:
    defaults = {
        "request_id": name,
        "started_at": 1_700_000_000.5,
        "project_id": 1,
        "project_name": "project",
        "key_public_id": "key",
        "key_name": "key",
        "route": "chat",
        "endpoint": "/v1/chat/completions",
        "stream": True,
    }
    return Opened(**defaults | facts)


def closed(**facts) -> Closed:
    return Closed(**{"status": 200, "outcome": Outcome.OK, "prompt_tokens": 5} | facts)


class Ledger:
    """A recorder that keeps events by request id, as the table does."""

    def __init__(self) -> None:
        self.events: dict[str, UsageEvent] = {}
        self.brought: list[str] = []
        self.error: Exception | None = None

    def __call__(self, events) -> None:
        if self.error is not None:
            raise self.error
        for event in events:
            self.brought.append(event.request_id)
            self.events.setdefault(event.request_id, event)


def die(spool: Spool) -> None:
    """What a killed process leaves: its files as they are, its lock free."""
    spool._lock.close()


async def until(condition, seconds: float = 5.0) -> None:
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - polled, with a deadline
            await asyncio.sleep(0.005)


@needs_ledger
async def test_a_closed_request_is_in_the_ledger_soon(tmp_path):
    spool = Spool(tmp_path, "gateway-1")
    await spool.start()
    entry = spool.open(opened("r1", key_name="my key"))
    entry.count(prompt_tokens=5, completion_tokens=1)
    began = time.monotonic()
    entry.close(
        closed(
            deployment="d", worker="d-0", attempts=2, queue_ms=3, ttft_ms=40, duration_ms=70,
            cached_tokens=4, completion_tokens=9,
        )
    )  # fmt: skip
    entry.close(closed(completion_tokens=1000))
    await until(lambda: spool.pending == 0)
    # A quarter of a second is promised; the rest is for a busy test machine.
    assert time.monotonic() - began < 1.0
    event = await in_database(UsageEvent.objects.get)
    assert (event.request_id, event.gateway, event.key_name) == ("r1", "gateway-1", "my key")
    assert (event.prompt_tokens, event.cached_tokens, event.completion_tokens) == (5, 4, 9)
    assert (event.status, event.outcome, event.worker, event.attempts) == (200, "ok", "d-0", 2)
    assert (event.queue_ms, event.ttft_ms, event.duration_ms) == (3, 40, 70)
    assert event.started_at == datetime.fromtimestamp(1_700_000_000.5, UTC)
    await spool.stop()
    assert list(tmp_path.iterdir()) == []


@needs_ledger
def test_what_a_dead_gateway_left_is_settled_once(tmp_path):
    spool = Spool(tmp_path, "gateway-1")
    spool.open(opened("ended")).close(closed(completion_tokens=7))
    streaming = spool.open(opened("streaming"))
    for tokens in range(300):
        streaming.count(prompt_tokens=12, completion_tokens=tokens, cached_tokens=3)
    spool.open(opened("silent"))
    whole = spool.open(opened("whole"))
    whole.count(prompt_tokens=12, completion_tokens=9, cached_tokens=4)
    whole.answered()
    assert recover_all(tmp_path) == 0, "it lives"
    die(spool)
    assert recover_all(tmp_path) == 4
    assert recover_all(tmp_path) == 0
    assert list(tmp_path.iterdir()) == []
    events = {event.request_id: event for event in UsageEvent.objects.all()}
    assert (events["ended"].outcome, events["ended"].completion_tokens) == (Outcome.OK, 7)
    assert (events["streaming"].outcome, events["streaming"].status) == (Outcome.INTERRUPTED, 500)
    assert (events["streaming"].prompt_tokens, events["streaming"].completion_tokens) == (12, 299)
    assert events["streaming"].cached_tokens == 3
    assert (events["silent"].outcome, events["silent"].completion_tokens) == (Outcome.INTERRUPTED, 0)
    assert (events["whole"].outcome, events["whole"].status) == (Outcome.OK, 200), "its client saw the end"
    assert (events["whole"].cached_tokens, events["whole"].completion_tokens) == (4, 9)
    assert {event.gateway for event in events.values()} == {"gateway-1"}


@needs_ledger
async def test_a_running_gateway_settles_what_a_dead_one_left(tmp_path):
    dead = Spool(tmp_path, "gateway-1")
    dead.open(opened("r1"))
    die(dead)
    spool = Spool(tmp_path, "gateway-1")
    await spool.start()
    await until(lambda: not dead.folder.exists())
    assert await in_database(UsageEvent.objects.count) == 1
    await spool.stop()


@needs_ledger
def test_gateways_killed_at_any_moment_lose_nothing_and_count_nothing_twice(tmp_path):
    seed = random.randrange(1_000_000)
    subprocess.run(
        [sys.executable, "-m", "tests.integration.spool_victims", str(tmp_path), "20", str(seed)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}"},
        check=True,
        timeout=60,
    )
    # What the victims' own ledger accepted before they died; of a torn line nothing was.
    for line in (tmp_path / "ledger").read_bytes().splitlines():
        if line.endswith(b"]"):
            rows = json.loads(line)
            for row in rows:
                row["started_at"] = datetime.fromisoformat(row["started_at"])
            record_usage([UsageEvent(**row) for row in rows])
    brought = UsageEvent.objects.count()
    recover_all(tmp_path / "spool")
    recover_all(tmp_path / "spool")

    promised: dict[str, tuple[str, int]] = {}
    for line in (tmp_path / "promises").read_text().splitlines():
        if line.endswith("."):
            what, name, tokens, _ = line.split()
            promised[name] = (what, int(tokens))
    events = {event.request_id: event for event in UsageEvent.objects.all()}
    assert len(events) == UsageEvent.objects.count()
    assert promised.keys() <= events.keys(), f"seed {seed}"
    for name, (what, tokens) in promised.items():
        event = events[name]
        # A step may have been done and its promise not yet written: never more than one.
        assert tokens <= event.completion_tokens <= tokens + 200, f"seed {seed}: {name}"
        assert event.prompt_tokens == 11 or event.completion_tokens == 0
        if what == "closed":
            assert (event.outcome, event.completion_tokens) == (Outcome.OK, tokens), f"seed {seed}: {name}"
    # The drill was one: some were moved while alive, some settled later, some cut in mid-answer.
    assert brought > 0
    assert len(events) > 200
    assert {Outcome.OK, Outcome.INTERRUPTED} <= {event.outcome for event in events.values()}
    assert [path.name for path in (tmp_path / "spool").iterdir() if not path.name.startswith(".")] == []


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["open", "count", "count", "answered", "close", "move"]),
        st.integers(0, 5),
        st.integers(1, 300),
    ),
    max_size=60,
)


@given(steps=STEPS, torn=st.integers(0, 400))
@settings(max_examples=120, deadline=None)
def test_a_crash_after_any_step_leaves_what_was_promised(steps, torn):
    with tempfile.TemporaryDirectory() as place, pytest.MonkeyPatch.context() as patch:
        patch.setattr(spool_module, "SEGMENT_BYTES", 900)
        asyncio.run(_crash(Path(place), steps, torn))


async def _crash(place: Path, steps, torn: int) -> None:
    ledger = Ledger()
    spool = Spool(place / "live", "gateway", record=ledger)
    running: list = []
    promised: dict[str, tuple[int, bool]] = {}
    for step, which, tokens in steps:
        if step == "open":
            name = f"r{len(promised)}"
            running.append(spool.open(opened(name)))
            promised[name] = (0, False)
        elif step == "move":
            assert await spool._move()
            spool._drop_segments()
        elif running:
            entry = running[which % len(running)]
            name = entry.opened.request_id
            counted = promised[name][0] + tokens
            if step == "count":
                entry.count(prompt_tokens=5, completion_tokens=counted, cached_tokens=2)
                promised[name] = (counted, promised[name][1])
            elif step == "answered":
                entry.answered()
                promised[name] = (promised[name][0], True)
            else:
                running.remove(entry)
                entry.close(closed(completion_tokens=counted))
                promised[name] = (counted, True)
    # The image of its disk at this instant, with a write in it that did not get through.
    shutil.copytree(spool.folder, place / "after" / spool.folder.name)
    torn_line = (b'{"record":"open","number":99999,"slot":0,"opened":{"request_id":"torn' + b"x" * 400)[:torn]
    last = sorted((place / "after" / spool.folder.name).glob("*.log"))[-1]
    last.write_bytes(last.read_bytes() + torn_line)

    recover_all(place / "after", record=ledger)

    assert ledger.events.keys() == promised.keys()
    for name, (counted, ended) in promised.items():
        event = ledger.events[name]
        assert event.completion_tokens == counted
        assert event.outcome == (Outcome.OK if ended else Outcome.INTERRUPTED)
        assert event.cached_tokens in (0, 2)
    die(spool)


def test_a_record_torn_in_mid_file_costs_only_itself(tmp_path):
    ledger = Ledger()
    spool = Spool(tmp_path, "gateway")
    for name in ("a", "b", "c"):
        spool.open(opened(name)).close(closed(completion_tokens=3))
    [segment] = spool.folder.glob("*.log")
    lines = segment.read_bytes().splitlines(keepends=True)
    # The disk lost the block with the end of "b"; its opening stands.
    lines[3] = b"\x00" * (len(lines[3]) - 1) + b"\n"
    segment.write_bytes(b"".join(lines))
    die(spool)
    recover_all(tmp_path, record=ledger)
    assert {name: event.outcome for name, event in ledger.events.items()} == {
        "a": Outcome.OK,
        "b": Outcome.INTERRUPTED,
        "c": Outcome.OK,
    }


def test_a_slot_is_used_again_and_never_shows_the_figures_of_another(tmp_path):
    ledger = Ledger()
    spool = Spool(tmp_path, "gateway")
    first = spool.open(opened("first"))
    first.count(prompt_tokens=9, completion_tokens=999)
    first.close(closed(completion_tokens=999))
    second = spool.open(opened("second"))
    assert second.slot == first.slot
    # A late word of the first changes nothing.
    first.count(prompt_tokens=9, completion_tokens=5000)
    second.count(prompt_tokens=5, completion_tokens=2)
    # A power cut took the end of "first" and the opening of "second", not the counters.
    [segment] = spool.folder.glob("*.log")
    segment.write_bytes(segment.read_bytes().splitlines(keepends=True)[0])
    die(spool)
    recover_all(tmp_path, record=ledger)
    assert ledger.events.keys() == {"first"}
    assert ledger.events["first"].completion_tokens == 0


def test_more_open_requests_than_slots_grow_the_counters(tmp_path):
    ledger = Ledger()
    spool = Spool(tmp_path, "gateway")
    entries = [spool.open(opened(f"r{number}")) for number in range(CHUNK_SLOTS + 10)]
    assert len(list(spool.folder.glob("*.counters"))) == 2
    for number, entry in enumerate(entries):
        entry.count(prompt_tokens=1, completion_tokens=number)
    die(spool)
    assert recover_all(tmp_path, record=ledger) == CHUNK_SLOTS + 10
    assert all(ledger.events[f"r{number}"].completion_tokens == number for number in range(CHUNK_SLOTS + 10))


def test_too_many_open_requests_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "MAX_SLOTS", CHUNK_SLOTS)
    spool = Spool(tmp_path, "gateway")
    entries = [spool.open(opened(f"r{number}")) for number in range(CHUNK_SLOTS)]
    with pytest.raises(SpoolFull):
        spool.open(opened("one more"))
    entries[0].close(closed())
    spool.open(opened("one more"))
    die(spool)


async def test_segments_are_deleted_when_all_of_theirs_is_in_the_ledger(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "SEGMENT_BYTES", 2000)
    ledger = Ledger()
    spool = Spool(tmp_path, "gateway", record=ledger)
    long = spool.open(opened("long"))
    for number in range(100):
        spool.open(opened(f"r{number}")).close(closed())
    segments = sorted(spool.folder.glob("*.log"))
    assert len(segments) > 10
    assert await spool._move()
    spool._drop_segments()
    # The one with the opening of "long", and the present one.
    assert sorted(spool.folder.glob("*.log")) == [segments[0], segments[-1]]
    long.close(closed())
    assert await spool._move()
    spool._drop_segments()
    assert sorted(spool.folder.glob("*.log")) == [segments[-1]]
    await spool.stop()
    assert list(tmp_path.iterdir()) == []


@needs_ledger
async def test_while_the_ledger_is_away_usage_waits_and_then_arrives_once(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(spool_module, "RETRY_SECONDS", 0.01)
    away = threading.Event()
    tries = []

    def record(events) -> None:
        tries.append(len(events))
        if away.is_set():
            raise OperationalError("the server closed the connection")
        record_durably(events)

    spool = Spool(tmp_path, "gateway", record=record)
    await spool.start()
    away.set()
    for number in range(20):
        spool.open(opened(f"r{number}")).close(closed(completion_tokens=number))
    await until(lambda: len(tries) > 5)
    assert spool.pending == 20
    assert caplog.text.count("event=ledger_away") == 1
    away.clear()
    await until(lambda: spool.pending == 0)
    assert await in_database(UsageEvent.objects.count) == 20
    await spool.stop()


@needs_ledger
async def test_a_gateway_that_ends_without_the_ledger_leaves_its_usage_for_others(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "STOP_SECONDS", 0.05)
    ledger = Ledger()
    ledger.error = OperationalError("away")
    spool = Spool(tmp_path, "gateway", record=ledger)
    spool.open(opened("r1")).close(closed(completion_tokens=3))
    await spool.stop()
    with pytest.raises(OperationalError):
        await in_database(recover_all, tmp_path, record=ledger)
    assert await in_database(recover_all, tmp_path) == 1
    assert (await in_database(UsageEvent.objects.get)).completion_tokens == 3


async def test_a_gateway_that_ends_with_open_requests_keeps_its_lock_until_the_process_is_gone(tmp_path):
    ledger = Ledger()
    spool = Spool(tmp_path, "gateway", record=ledger)
    entry = spool.open(opened("r1"))
    await spool.stop()
    assert recover_all(tmp_path, record=ledger) == 0
    entry.close(closed(completion_tokens=8))
    die(spool)
    assert recover_all(tmp_path, record=ledger) == 1
    assert ledger.events["r1"].completion_tokens == 8


@needs_ledger
def test_two_that_recover_at_once_bring_everything_once(tmp_path):
    ledger = Ledger()
    counts: list[int] = []
    for number in range(10):
        spool = Spool(tmp_path, f"gateway-{number}")
        for request in range(20):
            spool.open(opened(f"{number}-{request}")).close(closed())
        die(spool)
    threads = [
        threading.Thread(target=lambda: counts.append(recover_all(tmp_path, record=ledger))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(counts) == 200
    assert len(ledger.brought) == len(set(ledger.brought)) == 200
    assert list(tmp_path.iterdir()) == []


async def test_two_gateways_of_one_name_have_a_folder_each(tmp_path):
    ledger = Ledger()
    one, two = (Spool(tmp_path, "host-8000", record=ledger) for _ in range(2))
    assert one.folder != two.folder
    one.open(opened("r1")).close(closed())
    two.open(opened("r2"))
    assert recover_all(tmp_path, record=ledger) == 0
    die(two)
    assert recover_all(tmp_path, record=ledger) == 1
    await one.stop()
    assert {event.gateway for event in ledger.events.values()} == {"host-8000"}


def test_a_folder_that_is_being_made_or_deleted_is_nobodys(tmp_path):
    ledger = Ledger()
    spool = Spool(tmp_path, "gateway")
    spool.open(opened("r1"))
    die(spool)
    half_made = spool.folder.rename(tmp_path / f".new-{spool.folder.name}")
    assert recover_all(tmp_path, record=ledger) == 0
    assert half_made.exists()
    os.utime(half_made, (0, 0))
    assert recover_all(tmp_path, record=ledger) == 0
    assert not half_made.exists()
    half_deleted = tmp_path / ".done-gateway~1"
    half_deleted.mkdir()
    (half_deleted / "000001.log").write_text("{}")
    assert recover_all(tmp_path, record=ledger) == 0
    assert not half_deleted.exists()
    assert recover_all(tmp_path / "nothing here", record=ledger) == 0


@needs_ledger
def test_an_event_that_the_ledger_refuses_does_not_hold_up_the_others(tmp_path, caplog):
    def record(events) -> None:
        if any(event.request_id == "bad" for event in events):
            raise IntegrityError("usage_outcome_is_known")
        record_durably(events)

    spool = Spool(tmp_path, "gateway")
    for name in ("a", "bad", "b"):
        spool.open(opened(name)).close(closed())
    die(spool)
    assert recover_all(tmp_path, record=record) == 3
    assert set(UsageEvent.objects.values_list("request_id", flat=True)) == {"a", "b"}
    [kept] = (tmp_path / "refused.jsonl").read_text().splitlines()
    assert json.loads(kept)["request_id"] == "bad"
    assert "usage_refused" in caplog.text


@needs_ledger
def test_figures_and_texts_out_of_all_bounds_are_cut_to_what_the_ledger_takes(tmp_path):
    spool = Spool(tmp_path, "gateway~with/odd name" + "x" * 100)
    wild = spool.open(opened("wild", route="r" * 500, key_name="nul\x00", project_name="p" * 500))
    wild.count(prompt_tokens=2**40, completion_tokens=-5, cached_tokens=2**33)
    wild.close(
        closed(prompt_tokens=3, cached_tokens=9, completion_tokens=2**40, attempts=10**6, duration_ms=-1)
    )
    still_open = spool.open(opened("open"))
    still_open.count(prompt_tokens=2**40, completion_tokens=2**32 - 1, cached_tokens=7)
    die(spool)
    assert recover_all(tmp_path) == 2
    event = UsageEvent.objects.get(request_id="wild")
    assert (event.prompt_tokens, event.cached_tokens, event.completion_tokens) == (3, 3, 2**31 - 1)
    assert (event.attempts, event.duration_ms, event.key_name) == (2**15 - 1, 0, "nul")
    assert UsageEvent.objects.get(request_id="open").completion_tokens == 2**31 - 1


@needs_ledger
def test_one_request_id_twice_in_a_batch_counts_once(tmp_path):
    spool = Spool(tmp_path, "gateway")
    spool.open(opened("same")).close(closed(completion_tokens=1))
    spool.open(opened("same")).close(closed(completion_tokens=2))
    die(spool)
    recover_all(tmp_path)
    assert UsageEvent.objects.get().completion_tokens == 1


async def test_a_full_disk_refuses_new_requests_and_loses_no_running_one(tmp_path, monkeypatch):
    ledger = Ledger()
    spool = Spool(tmp_path, "gateway", record=ledger)
    running, crashing = spool.open(opened("running")), spool.open(opened("crashing"))
    real_write = os.write

    def half_written(fd: int, data: bytes) -> int:
        return real_write(fd, data[: len(data) // 2])

    with monkeypatch.context() as patch:
        patch.setattr(spool_module.os, "write", half_written)
        with pytest.raises(OSError, match="space") as refused:
            spool.open(opened("refused"))
        assert refused.value.errno == errno.ENOSPC
        crashing.close(closed(completion_tokens=6))
    # There is room again, and a kill before anything is moved.
    running.count(prompt_tokens=5, completion_tokens=4)
    image = tmp_path / "image"
    shutil.copytree(spool.folder, image / spool.folder.name)
    after = Ledger()
    recover_all(image, record=after)
    assert {name: event.completion_tokens for name, event in after.events.items()} == {
        "running": 4,
        "crashing": 6,
    }
    # And without one.
    running.close(closed(completion_tokens=5))
    assert await spool._move()
    assert {name: event.outcome for name, event in ledger.events.items()} == {
        "running": Outcome.OK,
        "crashing": Outcome.OK,
    }
    slots = {spool.open(opened(f"next-{number}")).slot for number in range(2)}
    assert slots == {running.slot, crashing.slot}
    die(spool)


def test_a_spool_that_cannot_be_written_is_an_error_at_the_start(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Spool(tmp_path / "file", "gateway")
