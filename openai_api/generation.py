"""One chat completion, top to bottom.

1. Authenticate, before the body is read.
2. Read the body, bounded.
3. Parse it.
4. Resolve the route; what none of its engines honours is refused by name.
5. Authorize: may this key use this route?
6. Open the ledger's entry: from here on the request has exactly one usage event.
7. Dispatch: a lease on a worker. One that fails before its first byte is replaced by another.
8. Forward. The first event is taken before the status line is sent.
9. Relay, counting tokens before the client sees them.
10. Settle lease, entry and log line, whatever happened, in a `finally`.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import msgspec

from inference.client import DONE
from inference.dispatch.leases import Lease
from inference.dispatch.views import RouteView, WorkerView
from inference.errors import InferenceError, WorkerBroke, WorkerUnreachable
from inference.http import ClientGone, HttpConsumer, Request
from inference.protocol import AbortReply
from openai_api import limits
from openai_api.auth import Key
from openai_api.errors import ForbiddenModel, StorageAway, UnknownModel, answer_to, row_of
from openai_api.gateway import Gateway
from openai_api.protocol import ChatCompletionRequest, parse_chat, unsupported
from registry.models import Route
from registry.spool import Closed, Entry, Opened, SpoolFull
from registry.states import Outcome
from registry.threads import in_database

logger = logging.getLogger("roundhouse.request")

ENDPOINT = "/v1/chat/completions"


class Generation:
    """One request on its way. `run` is called once; `client_left` when the client leaves meanwhile."""

    def __init__(self, gateway: Gateway, consumer: HttpConsumer) -> None:
        self._gateway = gateway
        self._consumer = consumer
        self._began = time.monotonic()
        self._request_id = ""
        self._key: Key | None = None
        self._model = ""
        self._stream = False
        self._entry: Entry | None = None
        self._lease: Lease | None = None
        self._worker: WorkerView | None = None
        self._attempts = 0
        self._queued = 0.0
        self._first_at: float | None = None
        self._status = 500
        self._error: BaseException | None = None
        self._prompt = 0
        self._cached = 0
        self._completion = 0
        self._abort: asyncio.Future[AbortReply | None] | None = None

    async def run(self, request: Request) -> None:
        """Answer the request. Raises what a client is told by `answer_to`, as long as nothing was sent."""
        self._request_id = request.request_id
        gateway = self._gateway
        try:
            key = self._key = await gateway.keys.authenticate(request.bearer)  # 1
            body = await self._consumer.read_body(limits.BODY_BYTES)  # 2
            chat = parse_chat(body)  # 3
            del body
            self._model, self._stream = chat.model or "", bool(chat.stream)
            needs = chat.needs()
            route = await self._resolve(key, chat, needs)  # 4, 5
            self._entry = self._open(key, chat)  # 6
            gateway.active += 1
            forwarded = chat.forwarded(needs)
            if chat.stream:
                await self._answer_stream(route, needs, forwarded, chat)  # 7, 8, 9
            else:
                await self._answer_whole(route, needs, forwarded)
        except BaseException as error:
            self._error = error
            raise
        finally:
            await self._settle()  # 10

    async def client_left(self) -> None:
        """Tell the worker to stop, while its connection is still open: only then it says what the request
        had cost. Returns within about a second."""
        lease = self._lease
        if lease is None or self._abort is not None:
            return
        self._abort = asyncio.ensure_future(self._gateway.client.abort(lease.worker, self._request_id))
        await self._abort

    # -- 4, 5, 6

    async def _resolve(self, key: Key, chat: ChatCompletionRequest, needs: frozenset[str]) -> RouteView:
        model = self._model
        route = self._gateway.fleet.route(model)
        if route is None:
            raise UnknownModel(model)
        if not key.may_use(model):
            raise ForbiddenModel(model, key.project_name)
        if needs:
            workers = [worker for deployment, _ in route.targets for worker in deployment.workers]
            if workers and not any(needs <= worker.capabilities for worker in workers):
                # Named is one that the most capable of them lacks.
                lacking = min((needs - worker.capabilities for worker in workers), key=len)
                raise unsupported(min(lacking), model)
        return route

    def _open(self, key: Key, chat: ChatCompletionRequest) -> Entry:
        try:
            return self._gateway.spool.open(
                Opened(
                    request_id=self._request_id,
                    started_at=time.time(),
                    project_id=key.project_id,
                    project_name=key.project_name,
                    key_public_id=key.public_id,
                    key_name=key.name,
                    route=self._model,
                    endpoint=ENDPOINT,
                    stream=self._stream,
                )
            )
        except (SpoolFull, OSError) as error:
            logger.error("the ledger takes no entry: %s", error, extra={"event": "spool_refused"})
            raise StorageAway from error

    # -- 7, 8

    async def _next_worker(self, route: RouteView, needs: frozenset[str], avoid: frozenset[int]) -> WorkerView:
        lease = self._lease = await self._gateway.dispatcher.acquire(route, avoid=avoid, needs=needs)
        self._queued += lease.queue_seconds
        self._attempts += 1
        self._worker = lease.worker
        return lease.worker

    def _give_up(self, worker: WorkerView, error: WorkerUnreachable) -> None:
        """Go on to another worker, or raise: too many tried, or nobody waits any more."""
        if self._lease is not None:
            self._lease.release()
            self._lease = None
        if error.gone:
            self._gateway.fleet.mark_unreachable(worker)
        logger.warning(
            "a worker failed before its first byte: %s",
            error,
            extra={
                "event": "worker_failed",
                "request_id": self._request_id,
                "worker": worker.name,
                "attempt": self._attempts,
            },
        )
        if self._consumer.client_gone:
            raise ClientGone from error
        if self._attempts >= limits.WORKERS_TRIED:
            raise error

    async def _answer_whole(self, route: RouteView, needs: frozenset[str], body: bytes) -> None:
        avoid: frozenset[int] = frozenset()
        while True:
            worker = await self._next_worker(route, needs, avoid)
            try:
                answer = await self._gateway.client.complete(
                    worker, ENDPOINT, body, request_id=self._request_id
                )
                break
            except WorkerUnreachable as error:
                self._give_up(worker, error)
                avoid |= {worker.id}
        self._first_at = time.monotonic()
        self._count_usage(_usage_of(answer))
        # Free before the client has read it all: the worker's part is done.
        if self._lease is not None:
            self._lease.release()
        self._status = 200
        await self._consumer.send_json(200, answer)

    async def _answer_stream(
        self, route: RouteView, needs: frozenset[str], body: bytes, chat: ChatCompletionRequest
    ) -> None:
        shows_usage = bool(chat.stream_options and chat.stream_options.include_usage)
        avoid: frozenset[int] = frozenset()
        while True:
            worker = await self._next_worker(route, needs, avoid)
            events = self._gateway.client.stream(worker, ENDPOINT, body, request_id=self._request_id)
            async with aclosing(events):
                try:
                    first = await anext(events)
                    if first.startswith(_ERROR):
                        raise WorkerUnreachable(f"{worker.name} answered with an error event.")
                except StopAsyncIteration:
                    self._give_up(worker, WorkerUnreachable(f"{worker.name} answered with nothing."))
                except WorkerUnreachable as error:
                    self._give_up(worker, error)
                else:
                    self._first_at = time.monotonic()
                    self._status = 200
                    await self._consumer.stream_start()
                    await self._relay(first, events, shows_usage)
                    return
            avoid |= {worker.id}

    # -- 9

    async def _relay(self, first: bytes, events: AsyncGenerator[bytes], shows_usage: bool) -> None:
        """Pass events on. Each carries the usage so far as its last key, cut off without parsing."""
        send = self._consumer.stream_chunk
        entry = self._entry
        usage_instead = b',"usage":null}\n\n' if shows_usage else b"}\n\n"
        event = first
        try:
            while event != DONE:
                tail = _TAIL.search(event, event.rfind(b',"usage":{'))
                if tail is not None and entry is not None:
                    self._prompt, self._completion = prompt, completion = int(tail[1]), int(tail[2])
                    entry.count(
                        prompt_tokens=prompt, completion_tokens=completion, cached_tokens=self._cached
                    )
                    at = tail.start()
                    if not event.endswith(_NO_CHOICES, 0, at):
                        await send(event[:at] + usage_instead)
                    elif shows_usage:
                        await send(event + b"\n\n")
                else:
                    await self._relay_other(event, shows_usage)
                event = await anext(events)
        except (WorkerBroke, StopAsyncIteration) as error:
            broke = error if isinstance(error, WorkerBroke) else WorkerBroke("The stream ended early.")
            self._error = broke
            logger.warning(
                "a worker broke off its answer: %s",
                broke,
                extra={"event": "worker_broke", "request_id": self._request_id},
            )
            payload = msgspec.json.encode(answer_to(broke)[1])
            await self._consumer.stream_end(b"data: " + payload + b"\n\n")
            return
        await self._consumer.stream_end(b"data: [DONE]\n\n")
        # The client has all of it; what follows only lets the connection be used again.
        await anext(events, None)

    async def _relay_other(self, event: bytes, shows_usage: bool) -> None:
        """An event whose usage is not where ours puts it: taken apart and put together again."""
        if event.startswith(_ERROR):
            raise WorkerBroke("The worker reported an error in mid-answer.")
        try:
            chunk = msgspec.json.decode(event[len(b"data: ") :])
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise WorkerBroke("The worker sent an event that is not JSON.") from error
        if not isinstance(chunk, dict) or chunk.get("error"):
            raise WorkerBroke("The worker sent an event that is no chunk.")
        usage = chunk.pop("usage", None)
        if isinstance(usage, dict):
            self._count_usage(usage)
            if not chunk.get("choices"):
                if not shows_usage:
                    return
                chunk["usage"] = usage
        if shows_usage:
            chunk.setdefault("usage", None)
        await self._consumer.stream_chunk(b"data: " + msgspec.json.encode(chunk) + b"\n\n")

    def _count_usage(self, usage: dict[str, Any] | None) -> None:
        if usage is None:
            return
        details = usage.get("prompt_tokens_details")
        cached = _number(details.get("cached_tokens")) if isinstance(details, dict) else 0
        self._count(_number(usage.get("prompt_tokens")), _number(usage.get("completion_tokens")), cached)

    def _count(self, prompt: int, completion: int, cached: int = 0) -> None:
        """Never less than before: what a client has seen is paid for."""
        self._prompt = max(self._prompt, prompt)
        self._completion = max(self._completion, completion)
        self._cached = min(max(self._cached, cached), self._prompt)
        if self._entry is not None:
            self._entry.count(
                prompt_tokens=self._prompt,
                completion_tokens=self._completion,
                cached_tokens=self._cached,
            )

    # -- 10

    async def _settle(self) -> None:
        """Never raises, except a cancellation: then all the same everything is settled."""
        try:
            if self._abort is not None:
                # The answer ended because of the abort: its reply, with the counts, is about to come.
                reply = await asyncio.shield(self._abort)
                if reply is not None:
                    self._count(reply.prompt_tokens, reply.completion_tokens)
            elif self._lease is not None and self._cut_by_the_end():
                reply = await asyncio.shield(
                    self._gateway.client.abort(self._lease.worker, self._request_id)
                )
                if reply is not None:
                    self._count(reply.prompt_tokens, reply.completion_tokens)
        finally:
            outcome, status = self._outcome()
            if self._lease is not None:
                self._lease.release()
            if self._entry is not None:
                self._gateway.active -= 1
                self._entry.close(self._closed(outcome, status))
            self._log(outcome, status)

    def _cut_by_the_end(self) -> bool:
        return isinstance(self._error, asyncio.CancelledError) and not self._consumer.client_gone

    def _outcome(self) -> tuple[Outcome, int]:
        error = self._error
        if self._consumer.client_gone or isinstance(error, ClientGone):
            return Outcome.ABORTED, 499
        if error is None:
            return Outcome.OK, 200
        if self._status == 200:
            return Outcome.INTERRUPTED, 200
        if isinstance(error, asyncio.CancelledError):
            return Outcome.INTERRUPTED, 503
        return Outcome.FAILED, row_of(error).status

    def _closed(self, outcome: Outcome, status: int) -> Closed:
        return Closed(
            status=status,
            outcome=outcome.value,
            deployment=self._worker.deployment_name if self._worker else "",
            worker=self._worker.name if self._worker else "",
            attempts=self._attempts,
            queue_ms=round(self._queued * 1000),
            ttft_ms=self._milliseconds(self._first_at),
            duration_ms=self._milliseconds(time.monotonic()),
            prompt_tokens=self._prompt,
            cached_tokens=self._cached,
            completion_tokens=self._completion,
        )

    def _milliseconds(self, instant: float | None) -> int | None:
        return None if instant is None else round((instant - self._began) * 1000)

    def _log(self, outcome: Outcome, status: int) -> None:
        if not logger.isEnabledFor(logging.INFO):
            return
        logger.info(
            "request",
            extra={
                "event": "request",
                "request_id": self._request_id,
                "key": self._key.public_id if self._key else None,
                "route": self._model[:120],
                "worker": self._worker.name if self._worker else None,
                "status": status,
                "outcome": outcome.value,
                "stream": self._stream,
                "prompt_tokens": self._prompt,
                "completion_tokens": self._completion,
                "attempts": self._attempts,
                "queue_ms": round(self._queued * 1000),
                "ttft_ms": self._milliseconds(self._first_at),
                "duration_ms": self._milliseconds(time.monotonic()),
            },
        )


_ERROR = b'data: {"error"'
_NO_CHOICES = b'"choices":[]'
_TAIL = re.compile(rb',"usage":\{"prompt_tokens":(\d+),"completion_tokens":(\d+),"total_tokens":\d+\}\}\Z')
"""How our workers end each chunk. Within a JSON string the quotes would be escaped, so it cannot be text."""
