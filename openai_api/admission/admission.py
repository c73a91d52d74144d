"""May this request go on? Asked before a request is forwarded, told when it has ended."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from django.conf import settings
from django.db import Error as DatabaseError

from inference.http import Header
from openai_api.admission.levels import Level, Levels, milliseconds
from openai_api.admission.line import Line, NoScript, RedisAway, Reply, bulk, command, connect
from openai_api.admission.pace import Pace
from openai_api.admission.rules import Rule
from openai_api.admission.scripts import ADMIT, AMEND, FIELDS, digest_of
from openai_api.admission.told import PARALLEL_WAIT_MS, Standing, headers_of, refusal
from openai_api.errors import LimitUnknown
from registry.actions.gateways import count_gateways
from registry.keys import redis_prefix
from registry.models import Metric, WhenAway
from registry.threads import in_database

if TYPE_CHECKING:
    from openai_api.auth import Key

logger = logging.getLogger("roundhouse.limits")

BYTES_PER_TOKEN = 4
"""By which input is estimated from a request's length, until the engine has counted it."""
OUTPUT_GUESS = 512
"""Output tokens of a request that does not say how many it wants at most."""
OUTPUT_MOST = 4096
"""No request is estimated to write more, per choice: most ask for far more than they get."""

SLOT_MS = 60_000
"""A slot of a parallel request is free again so long after its gateway died."""
HOLD_SECONDS = 20.0
"""Slots of requests that run are held anew this often."""
AGAIN_SECONDS = 1.0
"""Pause between attempts to reach Redis."""
BATCH_SECONDS = 0.02
BATCH = 200
"""Changes per script: so that no script keeps Redis from others."""
PLANS_KEPT = 10_000
COUNT_SECONDS = 5.0
"""Live gateways are counted this often while limits are used."""
TEND_SECONDS = 1.0
LEVELS_KEPT = 20_000
"""Beyond, buckets that have leaked empty are dropped."""
STOP_SECONDS = 1.0
ENDS_KEPT = 10_000
"""Slots to end that wait for Redis; beyond, it frees them by itself, after their time."""

_ADMIT_DIGEST = bulk(digest_of(ADMIT).encode())
_ADMIT_SCRIPT = bulk(ADMIT.encode())
_AMEND_DIGEST = digest_of(AMEND).encode()


class _Item:
    """A rule as it applies to a key and a model."""

    __slots__ = (
        *("counts_tokens", "level", "metric", "name", "output", "pace"),
        *("packed", "prompt", "rule"),
    )

    def __init__(self, rule: Rule, name: bytes, levels: Levels) -> None:
        self.rule = rule
        self.name = name
        self.metric = rule.metric
        self.pace = rule.pace
        self.level: Level | None = levels.level(name, rule.pace) if rule.pace is not None else None
        if rule.pace is None:
            numbers = (0, 0, rule.amount, SLOT_MS)
        else:
            numbers = (rule.pace.tick_ms, rule.pace.parts, rule.amount, rule.burst)
        self.packed = b"".join(bulk(b"%d" % number) for number in numbers)
        if rule.metric in (Metric.REQUESTS, Metric.PARALLEL):
            self.packed += bulk(b"1")
        self.prompt = 1 if rule.metric in (Metric.INPUT_TOKENS, Metric.TOKENS) else 0
        self.output = 1 if rule.metric in (Metric.OUTPUT_TOKENS, Metric.TOKENS) else 0
        self.counts_tokens = bool(self.prompt or self.output)

    def cost(self, prompt: int, output: int) -> int:
        """What a request is thought to use: never more than there can be room for."""
        if not self.counts_tokens:
            return 1
        return min(self.prompt * prompt + self.output * output, self.rule.burst)


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to ask for one key and one model."""

    rules: tuple[Rule, ...]
    """The key's, by which it is known to be still right."""
    items: tuple[_Item, ...]
    head: bytes
    """The script's command, up to its arguments, behind its name."""


class Admitted:
    """A request that was let through. Belongs to its gateway's loop."""

    __slots__ = ("_admission", "_charged", "_items", "_request_id", "_settled", "headers")

    def __init__(
        self,
        admission: Admission,
        items: Sequence[_Item],
        charged: list[int],
        request_id: str,
        headers: list[Header],
    ) -> None:
        self.headers = headers
        """How much is left, for the client."""
        self._admission = admission
        self._items = items
        self._charged = charged
        self._request_id = request_id
        self._settled = False

    def progress(self, prompt_tokens: int, completion_tokens: int) -> None:
        """So many tokens were used so far. Never waits, never raises."""
        if self._settled:
            return
        for at, item in enumerate(self._items):
            if not item.counts_tokens:
                continue
            before = self._charged[at]
            if item.output:
                # Until the end it may still become what was thought.
                now = max(before, item.prompt * prompt_tokens + completion_tokens)
            else:
                # The engine has counted it all before its first token.
                now = prompt_tokens or before
            self._charge(at, now)

    def settle(self, prompt_tokens: int, completion_tokens: int) -> None:
        """It has ended, and used this. Never waits, never raises; the second time does nothing."""
        if self._settled:
            return
        self._settled = True
        for at, item in enumerate(self._items):
            if item.counts_tokens:
                self._charge(at, item.prompt * prompt_tokens + item.output * completion_tokens)
            elif item.pace is None:
                self._admission.end_slot(item.name, self._request_id)

    def _charge(self, at: int, now: int) -> None:
        more = now - self._charged[at]
        if more:
            self._charged[at] = now
            self._admission.add(self._items[at], more)


class Admission:
    """All limits of one gateway. One event loop owns it.

    A key without limits costs nothing here. One with limits costs one question to Redis, which checks all
    of them and debits all, or none. While Redis is away nobody waits for it: each limit says what holds.
    """

    def __init__(self, redis_url: str | None, *, count_gateways: Callable[[], int] = count_gateways) -> None:
        self._redis_url = redis_url
        self._ask_gateways = count_gateways
        self._prefix = f"{redis_prefix(settings.SECRET_KEY)}limit:".encode()
        self._epoch_key = self._prefix + b"epoch"
        self._epoch = 0
        """The one in which Redis was last told what it must know."""
        self._line: Line | None = None
        """None while Redis is away."""
        self._warned = False
        self._restoring: asyncio.Task[None] | None = None
        self._levels = Levels()
        self._plans: dict[tuple[str, str, str], _Plan] = {}
        self._to_add: dict[bytes, tuple[Pace, int]] = {}
        """Tokens by bucket that Redis has not heard of."""
        self._to_end: dict[tuple[bytes, str], None] = {}
        """Slots that are free and that Redis still counts."""
        self._to_write = asyncio.Event()
        self._sweep_beyond = LEVELS_KEPT
        self._gateways = 1
        self._used = False
        """Was there a limit to ask since the gateways were last counted?"""
        self._tasks: list[asyncio.Task[None]] = []

    # -- life

    async def start(self) -> None:
        """Redis may be away: then it is tried again and again."""
        if self._tasks:
            return
        self._tasks = [asyncio.create_task(self._count_forever(), name="limits' gateways")]
        if self._redis_url is not None:
            await self._reach()
            self._tasks += [
                asyncio.create_task(self._reach_forever(), name="limits' connection"),
                asyncio.create_task(self._write_forever(), name="limits' writer"),
                asyncio.create_task(self._hold_forever(), name="limits' slots"),
            ]

    async def stop(self) -> None:
        """Tell Redis what is left to tell, if it listens, and end."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._restoring is not None:
            self._restoring.cancel()
            await asyncio.gather(self._restoring, return_exceptions=True)
            self._restoring = None
        if self._line is not None:
            with contextlib.suppress(RedisAway, TimeoutError):
                async with asyncio.timeout(STOP_SECONDS):
                    await self._write_all()
        if self._line is not None:
            line, self._line = self._line, None
            line.end("The gateway ends.")

    @property
    def away(self) -> bool:
        """Is there a Redis, and does it not answer?"""
        return self._redis_url is not None and self._line is None

    # -- a request

    async def admit(
        self,
        key: Key,
        model: str,
        *,
        prompt_bytes: int,
        max_tokens: int | None,
        choices: int = 1,
        request_id: str,
        base: str = "",
    ) -> Admitted | None:
        """Let a request through, or raise RateLimited (LimitUnknown, where a limit cannot be asked).

        `prompt_bytes` is the length of the request; `max_tokens` what it wants at most, None when it does
        not say, 0 for what writes nothing; `base` the model that this one is an adapter of. None: no limit
        concerns it. Otherwise `settle` must follow.
        """
        if not key.rules:
            return None
        plan = self._plan(key, model, base)
        if not plan.items:
            return None
        self._used = True
        prompt = -(-prompt_bytes // BYTES_PER_TOKEN)
        output = min(OUTPUT_GUESS if max_tokens is None else max_tokens, OUTPUT_MOST) * choices
        costs = [item.cost(prompt, output) for item in plan.items]
        line = self._line
        if line is not None:
            try:
                reply = await self._ask(line, plan, costs, request_id)
                if reply[1] == 0:
                    # Somebody emptied Redis: first it must know again what was used.
                    await self._restored()
                    reply = await self._ask(line, plan, costs, request_id)
                if reply[1] != 0:
                    return self._take(plan, costs, reply, model, request_id)
            except RedisAway as error:
                self._note_away(line, error)
        return self._decide(plan, costs, model, request_id)

    def _plan(self, key: Key, model: str, base: str) -> _Plan:
        found = self._plans.get((key.public_id, model, base))
        if found is not None and found.rules is key.rules:
            return found
        if len(self._plans) >= PLANS_KEPT:
            self._plans.clear()
        items = tuple(
            _Item(rule, self._prefix + bucket.encode(), self._levels)
            for rule in key.rules
            if (bucket := rule.bucket_for(model, base)) is not None
        )
        names = [self._epoch_key, *(item.name for item in items)]
        head = b"".join(bulk(part) for part in (b"%d" % len(names), *names))
        plan = self._plans[key.public_id, model, base] = _Plan(key.rules, items, head)
        return plan

    async def _ask(self, line: Line, plan: _Plan, costs: list[int], request_id: str) -> Reply:
        number = line.next_number()
        told = request_id.encode()
        arguments = b"%b$%d\r\n%d\r\n$%d\r\n%b\r\n" % (plan.head, len(str(number)), number, len(told), told)
        for item, cost in zip(plan.items, costs, strict=True):
            arguments += item.packed
            if item.counts_tokens:
                arguments += b"$%d\r\n%d\r\n" % (len(str(cost)), cost)
        # The script's name or text, the number of keys, the keys, and the arguments.
        count = 3 + 1 + len(plan.items) + 2 + FIELDS * len(plan.items)

        def unwanted(reply: Reply) -> None:
            if len(reply) > 2 and reply[2]:
                self._held(plan, costs, request_id, []).settle(0, 0)

        try:
            reply: Reply = await line.ask(
                b"*%d\r\n$7\r\nEVALSHA\r\n%b%b" % (count, _ADMIT_DIGEST, arguments), number, unwanted
            )
        except NoScript:
            reply = await line.ask(
                b"*%d\r\n$4\r\nEVAL\r\n%b%b" % (count, _ADMIT_SCRIPT, arguments), number, unwanted
            )
        return reply

    def _take(self, plan: _Plan, costs: list[int], reply: Reply, model: str, request_id: str) -> Admitted:
        """Redis has decided."""
        if reply[1] != self._epoch:
            # Another gateway began anew after Redis was emptied: what we know is to be added.
            self._restore_soon()
        now = milliseconds()
        levels = reply[3:]
        for item, level in zip(plan.items, levels, strict=True):
            if item.level is not None:
                item.level.set(level, now)
        if reply[2] != 1:
            raise refusal(
                model,
                [
                    _standing(item.rule, level, cost)
                    for item, cost, level in zip(plan.items, costs, levels, strict=True)
                ],
            )
        headers = headers_of(
            [
                Standing(item.rule, item.pace.remaining(level), item.pace.reset_ms(level))
                for item, level in zip(plan.items, levels, strict=True)
                if item.pace is not None
            ]
        )
        return self._held(plan, costs, request_id, headers)

    def _held(self, plan: _Plan, costs: list[int], request_id: str, headers: list[Header]) -> Admitted:
        for item in plan.items:
            if item.pace is None:
                self._levels.take_slot(item.name, request_id)
        return Admitted(self, plan.items, costs, request_id, headers)

    # -- a request, without Redis

    def _decide(self, plan: _Plan, costs: list[int], model: str, request_id: str) -> Admitted:
        """This gateway decides alone, as if each of the others let through as much as it does.

        At least one at a time is always let through, however many gateways there are.
        """
        items = [
            (item, cost, min(cost * self._gateways, item.rule.burst))
            for item, cost in zip(plan.items, costs, strict=True)
            if not (self.away and item.rule.when_away == WhenAway.OPEN)
        ]
        if self.away and any(item.rule.when_away == WhenAway.CLOSED for item, _, _ in items):
            raise LimitUnknown
        now = milliseconds()
        standings = []
        refused = False
        for item, cost, weight in items:
            if item.level is None:
                level = self._levels.slots_taken(item.name)
                share = max(1, item.rule.amount // self._gateways)
                room = level < share
                wait = 0 if room else PARALLEL_WAIT_MS
                standings.append(Standing(item.rule, share - level, 0, level, 1, wait))
            else:
                level, pace = item.level.now(now), item.level.pace
                room = pace.fits(level, weight)
                wait = 0 if room else pace.wait_ms(level, weight)
                left, used = pace.remaining(level) // self._gateways, pace.used(level)
                standings.append(Standing(item.rule, left, pace.reset_ms(level), used, cost, wait))
            refused = refused or not room
        if refused:
            raise refusal(model, standings)
        standings = []
        for item, _, weight in items:
            if item.level is not None:
                item.level.add(weight, now)
                level, pace = item.level.level, item.level.pace
                left = pace.remaining(level) // self._gateways
                standings.append(Standing(item.rule, left, pace.reset_ms(level)))
        charged = {item.name: weight // self._gateways for item, _, weight in items}
        # What an open limit does not hold back it still counts, for the time when it does again.
        costs = [charged.get(item.name, 0) for item in plan.items]
        return self._held(plan, costs, request_id, headers_of(standings))

    # -- changes

    def add(self, item: _Item, count: int) -> None:
        """So many tokens more than was thought, or less."""
        if item.level is None:
            return
        if self._line is None:
            item.level.add(count * self._gateways, milliseconds())
            return
        item.level.add(count, milliseconds())
        before = self._to_add.get(item.name)
        self._to_add[item.name] = (item.level.pace, count + (before[1] if before is not None else 0))
        self._to_write.set()

    def end_slot(self, name: bytes, request_id: str) -> None:
        """A parallel request has ended."""
        self._levels.end_slot(name, request_id)
        if self._redis_url is not None and len(self._to_end) < ENDS_KEPT:
            self._to_end[name, request_id] = None
            self._to_write.set()

    async def _write_forever(self) -> None:
        while True:
            await self._to_write.wait()
            # What ends together goes together.
            await asyncio.sleep(BATCH_SECONDS)
            line = self._line
            if line is None:
                await asyncio.sleep(AGAIN_SECONDS)
                continue
            self._to_write.clear()
            try:
                await self._write_all()
            except RedisAway as error:
                self._note_away(line, error)
                self._to_write.set()

    async def _write_all(self) -> None:
        # Whether a change that failed was done is not known: tokens are not added twice, for they are in
        # our own levels too, which Redis is told when it is back. A slot may be ended any number of times.
        adds, self._to_add = self._to_add, {}
        await self._amend(
            (name, (b"add", b"%d" % pace.tick_ms, b"%d" % pace.parts, b"%d" % pace.amount, b"%d" % count))
            for name, (pace, count) in adds.items()
        )
        ends = list(self._to_end)
        await self._amend((name, (b"end", request_id.encode(), b"", b"", b"")) for name, request_id in ends)
        for one in ends:
            self._to_end.pop(one, None)

    async def _amend(
        self, changes: Iterable[tuple[bytes, tuple[bytes, ...]]], *, epoch: int = 0, line: Line | None = None
    ) -> int:
        """Have Redis make these changes; returns the epoch there. `epoch` is begun if there is none."""
        everything = list(changes)
        found = 0
        for start in range(0, len(everything) or (1 if epoch else 0), BATCH):
            part = everything[start : start + BATCH]
            last = start + BATCH >= len(everything)
            asked = line or self._line
            if asked is None:
                raise RedisAway("There is no connection.")
            number = asked.next_number()
            packed = [
                *(b"%d" % (len(part) + 1), self._epoch_key, *(name for name, _ in part)),
                *(b"%d" % number, b"%d" % (epoch if last else 0)),
                *(field for _, fields in part for field in fields),
            ]
            try:
                reply = await asked.ask(command(b"EVALSHA", _AMEND_DIGEST, *packed), number)
            except NoScript:
                reply = await asked.ask(command(b"EVAL", AMEND.encode(), *packed), number)
            found = reply[1]
        return found

    # -- Redis comes and goes

    async def _reach_forever(self) -> None:
        while True:
            await asyncio.sleep(AGAIN_SECONDS)
            if self._line is None:
                await self._reach()

    async def _reach(self) -> None:
        """Connect, and tell Redis what it must know; only then it is asked."""
        if self._redis_url is None:
            return
        try:
            line = await connect(self._redis_url, (ADMIT, AMEND), self._lost)
            try:
                await self._tell(line)
            except BaseException:
                line.end("It could not be told what it must know.")
                raise
        except (RedisAway, OSError) as error:
            self._warn(error)
            return
        self._line = line
        self._to_write.set()
        if self._warned:
            self._warned = False
            logger.info("Redis counts for the limits again", extra={"event": "limits_back"})

    def _lost(self, line: Line) -> None:
        if self._line is line:
            self._line = None

    def _note_away(self, line: Line, error: Exception) -> None:
        """Nobody asks it again before it was reached anew."""
        self._warn(error)
        line.end("Redis did not answer what it was asked.")

    def _warn(self, error: Exception) -> None:
        if not self._warned:
            logger.warning(
                "Redis does not count for the limits (%s); each does now what it says for this",
                type(error).__name__,
                extra={"event": "limits_away"},
            )
        self._warned = True

    async def _tell(self, line: Line) -> None:
        """Bring Redis up to what is known here: the higher of both counts, so any number may do so."""
        known = self._levels.snapshot()
        changes: list[tuple[bytes, tuple[bytes, ...]]] = [
            (
                name,
                (b"raise", b"%d" % pace.tick_ms, b"%d" % pace.parts, b"%d" % pace.amount, b"%d" % level),
            )
            for name, pace, level in known.levels
        ]
        changes += [_hold(name, request_id) for name, request_id in known.slots]
        self._epoch = await self._amend(changes, epoch=secrets.randbelow(2**50) + 1, line=line)

    def _restore_soon(self) -> asyncio.Task[None]:
        if self._restoring is None or self._restoring.done():
            self._restoring = asyncio.create_task(self._restore(), name="limits restored")
        return self._restoring

    async def _restored(self) -> None:
        await asyncio.shield(self._restore_soon())

    async def _restore(self) -> None:
        line = self._line
        if line is None:
            return
        try:
            await self._tell(line)
        except RedisAway as error:
            self._note_away(line, error)
        else:
            logger.warning(
                "Redis was emptied; it knows again what was used", extra={"event": "limits_restored"}
            )

    async def _hold_forever(self) -> None:
        while True:
            await asyncio.sleep(HOLD_SECONDS)
            line = self._line
            if line is not None:
                try:
                    await self._amend(_hold(name, request_id) for name, request_id in self._levels.running())
                except RedisAway as error:
                    self._note_away(line, error)

    async def _count_forever(self) -> None:
        await self._count_gateways()
        counted_at = time.monotonic()
        while True:
            await asyncio.sleep(TEND_SECONDS)
            now = time.monotonic()
            if self._used and now - counted_at >= COUNT_SECONDS:
                counted_at, self._used = now, False
                await self._count_gateways()
            if len(self._levels) > self._sweep_beyond:
                if self._levels.forget_empty():
                    self._plans.clear()
                # Where most are in use it is not looked for the few that are not each second.
                self._sweep_beyond = max(LEVELS_KEPT, 2 * len(self._levels))

    async def _count_gateways(self) -> None:
        try:
            self._gateways = max(1, await in_database(self._ask_gateways))
        except DatabaseError:
            # The last count stands.
            logger.info("live gateways could not be counted", extra={"event": "gateways_not_counted"})


def _hold(name: bytes, request_id: str) -> tuple[bytes, tuple[bytes, ...]]:
    return name, (b"hold", request_id.encode(), b"%d" % SLOT_MS, b"", b"")


def _standing(rule: Rule, level: int, cost: int) -> Standing:
    """How Redis found a limit that a request of this cost did not pass, or another did not."""
    pace = rule.pace
    if pace is None:
        wait = PARALLEL_WAIT_MS if level >= rule.amount else 0
        return Standing(rule, max(0, rule.amount - level), 0, level, cost, wait)
    wait = 0 if pace.fits(level, cost) else pace.wait_ms(level, cost)
    return Standing(rule, pace.remaining(level), pace.reset_ms(level), pace.used(level), cost, wait)
