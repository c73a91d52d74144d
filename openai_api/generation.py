"""One request for a worker, top to bottom: chat, completions, embeddings, reranking.

1. Authenticate, before the body is read.
2. Read the body, bounded.
3. Parse it.
4. Resolve the route; what none of its engines honours is refused by name, the endpoint itself included.
5. Authorize: may this key use this route?
6. Admit it by the limits; open the ledger's entry, from here on the request has exactly one usage event;
   set aside what it may cost, where a hard budget concerns it.
7. Dispatch: a lease on a worker. One that fails before its first byte is replaced by another.
8. Forward. The first event is taken before the status line is sent.
9. Relay, counting tokens before the client sees them. A stream whose worker dies goes on elsewhere.
10. Settle lease, entry and log line, whatever happened, in a `finally`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import aclosing, asynccontextmanager

import msgspec
from django.db import Error as DatabaseError

from inference.dispatch.demand import NO_DEMAND, Demand
from inference.dispatch.explanations import Explanation, Step
from inference.dispatch.leases import Lease
from inference.dispatch.queue import Wish
from inference.dispatch.retries import pause
from inference.dispatch.views import RouteView, WorkerView
from inference.errors import NoCapacity, Poisonous, WorkerBroke, WorkerRefused, WorkerUnreachable
from inference.http import ClientGone, HttpConsumer, Request
from inference.protocol import LORA
from inference.sse import DONE
from openai_api import limits
from openai_api.admission import Admitted
from openai_api.answered import Answered
from openai_api.auth import Key
from openai_api.continuation import GoingOn, Said, says_nothing
from openai_api.counting import Counts, Usage, is_error, prompt_tokens_in, usage_in
from openai_api.dialects import Dialect, dialect_of, field_meant, for_model
from openai_api.endpoints import CHAT, Endpoint
from openai_api.errors import (
    ForbiddenModel,
    StorageAway,
    TimeIsUp,
    UnknownModel,
    WrongEndpoint,
    answer_to,
    row_of,
)
from openai_api.gateway import Gateway
from openai_api.parsing import SESSION_HEADER, check_headers, check_session, unsupported
from openai_api.protocol import Call
from openai_api.protocol.call import Size
from registry.actions.budgets import reserve
from registry.figures import oddity
from registry.rights import PRIORITY_ORDER
from registry.spool import Closed, Entry, Opened, SpoolFull
from registry.states import Outcome
from registry.threads import in_database

logger = logging.getLogger("roundhouse.request")


class Generation:
    """One request on its way. `run` or `run_as` is called once; `client_left` when the client leaves."""

    def __init__(
        self,
        gateway: Gateway,
        consumer: Answered,
        endpoint: Endpoint = CHAT,
        *,
        on_wait: Callable[[int, float | None], None] | None = None,
    ) -> None:
        """`on_wait` is called when it has to wait for a worker, and every second then: how many are served
        before it, and in about how many seconds its turn comes, None while that cannot be said."""
        self._gateway = gateway
        self._on_wait = on_wait
        self._endpoint = endpoint
        self._consumer = consumer
        self._http: HttpConsumer | None = None
        self._started = False
        self._ended = False
        """The last of a stream was sent."""
        self._counted: tuple[int, int] | None = None
        """What was counted when `keep_alive` was last called."""
        self._comment: asyncio.Task[None] | None = None
        self._began = time.monotonic()
        self._request_id = ""
        self._key: Key | None = None
        self._model = ""
        self._base = ""
        """The route that the model is an adapter of."""
        self._stream = False
        self._most_tokens: int | None = None
        """What was asked for at most, over all answers."""
        self._demand = NO_DEMAND
        self._session: str | None = None
        self._admitted: Admitted | None = None
        self._entry: Entry | None = None
        self._lease: Lease | None = None
        self._worker: WorkerView | None = None
        self._attempts = 0
        self._queued = 0.0
        self._place: int | None = None
        """In the queue, when it began to wait."""
        self._known_at = self._began
        self._asked_at = self._began
        """When its key was known, and when the last worker was asked."""
        self._first_at: float | None = None
        self._status = 500
        self._error: BaseException | None = None
        self._counts = Counts()
        self._continuations = 0
        self._abort: asyncio.Task[None] | None = None
        self._task: asyncio.Task[object] | None = None
        self._cut: Exception | None = None
        """Why the gateway ends it."""
        self._cutting: asyncio.Task[None] | None = None
        self._time_is_up: asyncio.TimerHandle | None = None
        self._steps: list[Step] = []
        """How it was dispatched."""

    async def run(self, request: Request, consumer: HttpConsumer) -> None:
        """Answer a client. Raises what it is told by `answer_to`, as long as nothing was sent."""
        self._request_id = request.request_id
        self._http = consumer
        async with self._settled():
            self._key = await self._gateway.keys.admit(request, self._endpoint.scope)  # 1
            self._known_at = time.monotonic()
            check_headers(request.headers)
            session = request.headers.get(SESSION_HEADER)
            if session is not None:
                self._session = check_session(session)
            # No name for it here: `_answer` lets it go once it is parsed, however long the answer takes.
            await self._answer(self._key, await consumer.read_body(limits.BODY_BYTES))  # 2

    async def run_as(self, key: Key, body: bytes, *, request_id: str) -> None:
        """Answer somebody whom we know already (a person in the chat): the same from step 3 on."""
        self._request_id = request_id
        async with self._settled():
            self._key = key
            key.check_scope(self._endpoint.scope)
            await self._answer(key, body)

    async def _answer(self, key: Key, body: bytes) -> None:
        call = self._endpoint.parse(body)  # 3
        del body
        self._model, self._stream = call.model or "", call.streamed
        fields = call.needs()
        needs = self._endpoint.needs | fields if fields else self._endpoint.needs
        route = self._resolve(key, call, needs)  # 4, 5
        self._base = route.base
        if route.adapter:
            needs |= {LORA + route.adapter}
        if self._endpoint.prepare is not None:
            await self._endpoint.prepare(call, key)
        if self._endpoint.adapter is not None:
            self._consumer = self._endpoint.adapter(self._consumer, call, key, self._request_id)
        forwarded = call.forwarded(fields)
        if route.adapter:
            forwarded = for_model(forwarded, LORA + route.adapter)
        counted = self._endpoint.counted
        size = call.size(len(forwarded)) if counted else Size(0)
        if size.most_tokens is not None:
            self._most_tokens = size.most_tokens * size.answers
        session = self._session or call.session
        self._demand = Demand(
            forwarded,
            most_tokens=size.most_tokens,
            answers=size.answers,
            session=hash((key.public_id, session)) if session is not None else 0,
        )
        if key.rules:
            await self._admit(key, size, len(forwarded) if counted else 0)  # 6
        self._entry = self._counts.entry = self._open(key)
        self._gateway.enter(self, key)
        if (total := route.timeouts.total) is not None:
            left = self._began + total - time.monotonic()
            self._time_is_up = asyncio.get_running_loop().call_later(left, self.cut, TimeIsUp(total))
        if counted and (budgets := key.budgets_for(self._model, self._base)):
            await self._reserve(budgets, self._entry, route, size)
        if not self._stream:
            async with self._cuttable():
                await self._answer_whole(route, needs, forwarded)  # 7, 8, 9
            return
        if self._http is not None:
            self._gateway.waiting.add(self)
        try:
            async with self._cuttable():
                await self._answer_stream(route, needs, forwarded, call)
        except Exception as error:
            if not self._started or self._consumer.client_gone or isinstance(error, ClientGone):
                raise
            # It was told to wait already, or had some of its answer: the status line is out.
            if self._counts.goes_on and isinstance(error, NoCapacity | WorkerUnreachable):
                error = WorkerBroke("No other worker could go on with the answer.")
            self._error = error
            await self._end_with(error)

    @asynccontextmanager
    async def _settled(self) -> AsyncIterator[None]:
        try:
            yield
        except BaseException as error:
            self._error = error
            if isinstance(error, WorkerRefused):
                error.param = field_meant(error, self._endpoint.asked)
            raise
        finally:
            await self._settle()  # 10
            # An error knows the frames that it came through, and so this object and a body of megabytes:
            # in a circle they would wait for the collector, which rarely comes.
            self._error = self._cut = None

    @asynccontextmanager
    async def _cuttable(self) -> AsyncIterator[None]:
        """What is within and breaks off because of `cut` raises the error that was given there."""
        self._task = asyncio.current_task()
        try:
            yield
        except ClientGone:
            raise
        except asyncio.CancelledError:
            if self._cut is None or self._task is None or self._task.uncancel() > 0:
                raise  # by the client or the server
            raise self._cut from None
        except Exception:
            if self._cut is None:
                raise
            raise self._cut from None
        finally:
            self._task = None

    def cut(self, error: Exception) -> None:
        """End it from our side: the worker is told to stop, and the client gets `error`, within a stream as
        its last event. Returns at once. One that has just ended stays as it is."""
        if self._cutting is None:
            self._cut = error
            self._cutting = asyncio.create_task(self._end_early())

    async def _end_early(self) -> None:
        await self.client_left()
        if self._task is not None:
            self._task.cancel()

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and completion tokens counted so far."""
        return self._counts.prompt, self._counts.completion

    async def client_left(self) -> None:
        """Tell the worker to stop, while its connection is still open: only then it says what the request
        had cost. Returns within about a second."""
        if self._lease is not None and self._abort is None:
            self._abort = asyncio.create_task(self._tell_worker(self._lease.worker))
            await asyncio.shield(self._abort)

    def keep_alive(self) -> None:
        """Called every few seconds (`gateway.KEEP_ALIVE_SECONDS`) while a stream is open. One that said
        nothing since the last call gets a comment, so that no proxy on the way takes it for dead; it then
        has begun, and what goes wrong afterwards is told within it."""
        before, self._counted = self._counted, self.tokens
        if self._counted != before or self._consumer.client_gone:
            return
        if self._comment is None or self._comment.done():  # else the client does not read
            self._comment = asyncio.create_task(self._say_alive())

    async def _say_alive(self) -> None:
        try:
            await self._begin()
            if self._http is not None:
                await self._http.stream_events([b": keep-alive\n\n"])
        except Exception:
            # It ended in this moment: its own task tells what there is to tell.
            logger.debug("a stream took no comment", exc_info=True)

    async def _begin(self, prompt_tokens: int = 0) -> None:
        if not self._started:
            self._started = True
            self._status = 200
            await self._consumer.stream_start(prompt_tokens)

    async def _end_with(self, error: Exception) -> None:
        if self._ended:
            return
        self._ended = True
        payload = msgspec.json.encode(answer_to(error)[1])
        await self._consumer.stream_end(b"data: " + payload + b"\n\n")

    async def _tell_worker(self, worker: WorkerView) -> None:
        reply = await self._gateway.client.abort(worker, self._request_id)
        if reply is not None:
            self._counts.add(reply.prompt_tokens, reply.completion_tokens)

    # -- 4, 5, 6

    def _resolve(self, key: Key, call: Call, needs: frozenset[str]) -> RouteView:
        model = self._model
        route = self._gateway.fleet.route(model)
        if route is None:
            raise UnknownModel(model)
        if not (key.may_use(model) or (route.base and key.may_use(route.base))):
            raise ForbiddenModel(model, key.project_name)
        nobody = True
        for deployment, _ in route.targets:
            for worker in deployment.workers:
                if needs <= worker.capabilities:
                    return route
                nobody = False
        if not nobody:
            raise self._lacking(route, call, needs)
        return route  # whose workers may be back in a moment: dispatch says what it means

    def _lacking(self, route: RouteView, call: Call, needs: frozenset[str]) -> Exception:
        """Why none of the workers can take it: names what the most capable of them lacks."""
        workers = [worker for deployment, _ in route.targets for worker in deployment.workers]
        answering = [worker for worker in workers if self._endpoint.needs <= worker.capabilities]
        if not answering:
            return WrongEndpoint(self._model)
        _, field = min((len(lacks), min(lacks)) for lacks in (needs - one.capabilities for one in answering))
        return unsupported(call.given_as(field), self._model)

    async def _admit(self, key: Key, size: Size, prompt_bytes: int) -> None:
        self._admitted = await self._gateway.admission.admit(
            key,
            self._model,
            prompt_bytes=prompt_bytes,
            max_tokens=size.most_tokens,
            choices=size.answers,
            request_id=self._request_id,
            base=self._base,
        )
        if self._admitted is not None:
            if self._http is not None:
                self._http.answer_headers += self._admitted.headers
            self._gateway.limited.add(self)

    def true_up(self) -> None:
        """Tell the limits what was used so far. Called now and then while the request is open."""
        if self._admitted is not None:
            self._admitted.progress(*self.tokens)

    async def _reserve(self, budgets: tuple[int, ...], entry: Entry, route: RouteView, size: Size) -> None:
        contexts = [deployment.context_length or limits.UNKNOWN_CONTEXT for deployment, _ in route.targets]
        context = max(contexts, default=limits.UNKNOWN_CONTEXT)
        most = context if size.most_tokens is None else min(size.most_tokens, context)
        try:
            await in_database(
                reserve,
                budget_ids=budgets,
                request_id=self._request_id,
                route=self._model,
                prompt_tokens=min(size.prompt_tokens, context * size.prompts),
                completion_tokens=most * size.answers,
                started_at=entry.opened.started_at,
                gateway=self._gateway.name,
                base=self._base,
            )
        except DatabaseError as error:
            logger.warning("a hard budget could not be asked", extra={"event": "budget_away"})
            raise StorageAway from error

    def _open(self, key: Key) -> Entry:
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
                    base=self._base,
                    endpoint=self._endpoint.path,
                    stream=self._stream,
                )
            )
        except (SpoolFull, OSError) as error:
            logger.error("the ledger takes no entry: %s", error, extra={"event": "spool_refused"})
            raise StorageAway from error

    # -- 7, 8

    async def _next_worker(
        self, route: RouteView, needs: frozenset[str], avoid: frozenset[int]
    ) -> WorkerView:
        if self._gateway.dispatcher.poison.refuses(self._fingerprint):
            raise Poisonous("Two workers died while they had this request.")
        key = self._key
        wish = Wish(
            avoid=avoid,
            needs=needs,
            rank=PRIORITY_ORDER[key.priority] if key is not None else 1,
            project=key.project_id if key is not None else 0,
            demand=self._demand,
            last_try=self._attempts == limits.WORKERS_TRIED - 1,
            told=self._waits if self._on_wait is not None or self._http is not None else None,
        )
        lease = self._lease = await self._gateway.dispatcher.acquire(route, wish)
        self._steps.append(Step(lease.choice, lease.queue_seconds))
        self._queued += lease.queue_seconds
        self._attempts += 1
        self._worker = lease.worker
        self._asked_at = time.monotonic()
        return lease.worker

    def _waits(self, place: int, seconds: float | None) -> bool:
        """True: it wants to hear more of it. HTTP has one place to say it, before the answer."""
        if self._on_wait is not None:
            self._on_wait(place, seconds)
            return True
        if self._http is not None and self._place is None:
            self._place = place
            if not self._started:
                self._http.answer_headers.append((b"x-queue-position", b"%d" % (place + 1)))
                if seconds is not None:
                    self._http.answer_headers.append((b"x-queue-estimate", b"%.1f" % seconds))
        return False

    def _note_first(self) -> None:
        """The worker's first byte is here: tell where the time until then went, if it is not too late."""
        self._first_at = first = time.monotonic()
        if self._http is None or self._started:
            return
        auth, queue = self._known_at - self._began, self._queued
        dispatch, upstream = self._asked_at - self._known_at - queue, first - self._asked_at
        times = b"auth;dur=%.2f, queue;dur=%.2f, dispatch;dur=%.2f, upstream;dur=%.2f" % (
            *(auth * 1000, queue * 1000, dispatch * 1000, upstream * 1000),
        )
        self._http.answer_headers.append((b"server-timing", times))

    async def _let_go(self, worker: WorkerView, error: WorkerUnreachable | WorkerBroke) -> bool:
        """A worker failed this request: what does that say of it, and of the request? True when it is gone.
        Raises where nobody waits for another's answer."""
        if self._consumer.client_gone:
            raise ClientGone from error  # perhaps it failed because we told it to stop
        if self._cut is not None:
            raise self._cut from None
        if self._steps:
            self._steps[-1].failed = str(error)
        about = {"request_id": self._request_id, "worker": worker.name, "attempt": self._attempts}
        began = isinstance(error, WorkerBroke)
        logger.warning(
            "a worker broke off its answer: %s" if began else "a worker failed before its first byte: %s",
            error,
            extra={"event": "worker_broke" if began else "worker_failed"} | about,
        )
        gone = error.gone or not await self._gateway.client.is_there(worker)
        if gone:
            self._gateway.fleet.mark_unreachable(worker)
        poison = self._gateway.dispatcher.poison
        if gone and error.took_it and poison.note_death(self._fingerprint(), worker.id, worker.epoch):
            logger.error("two workers died of a request", extra={"event": "request_poisonous"} | about)
        if self._lease is not None:
            if self._lease.failed():
                logger.warning("a worker fails too often", extra={"event": "worker_ejected"} | about)
            self._lease.release()
            self._lease = None
        return gone

    async def _give_up(self, worker: WorkerView, error: WorkerUnreachable) -> None:
        """Go on to another worker, or raise: too many were tried, or nobody waits any more."""
        gone = await self._let_go(worker, error)
        if self._attempts >= limits.WORKERS_TRIED:
            raise error
        # One that could not be connected to has had nothing of the request: to ask another is no second try.
        # All that one had when it died is asked once more, too: others' slots bound what comes to them, and
        # should one of the requests have been its death, `poison` knows at the second one.
        if error.took_it:
            if not (gone and self._attempts == 1) and not self._gateway.dispatcher.retries.take():
                raise error
            await asyncio.sleep(pause())

    def _fingerprint(self) -> int:
        """Of who asks what; in this process only."""
        who = self._key.public_id if self._key is not None else ""
        return hash((who, self._endpoint.path, self._demand.body))

    async def _answer_whole(self, route: RouteView, needs: frozenset[str], body: bytes) -> None:
        avoid: frozenset[int] = frozenset()
        while True:
            worker = await self._next_worker(route, needs, avoid)
            try:
                answer = await self._gateway.client.complete(
                    worker,
                    self._endpoint.asked,
                    body,
                    request_id=self._request_id,
                    timeouts=route.timeouts,
                )
                usage, answer = self._read(answer, worker)
                break
            except WorkerUnreachable as error:
                await self._give_up(worker, error)
                avoid |= {worker.id}
        self._note_first()
        self._counts.add_usage(usage)
        # Free before the client has read it all: the worker's part is done.
        if self._lease is not None:
            self._lease.succeeded()
            self._lease.release()
        if self._cut is not None:
            raise self._cut
        self._status = 200
        if self._entry is not None:
            self._entry.answered()
        await self._consumer.send_json(200, answer)

    def _read(self, answer: bytes, worker: WorkerView) -> tuple[Usage, bytes]:
        """The usage in a whole answer, and the answer for the client. Raises WorkerUnreachable for what
        is no answer."""
        try:
            if (dialect := dialect_of(worker.engine, self._endpoint.asked, self._model)) is not None:
                answer = dialect.whole(answer)
            usage = usage_in(answer) if self._endpoint.counted else Usage()
            reshape = self._endpoint.reshape
            return usage, answer if reshape is None else reshape(answer)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise WorkerUnreachable(f"{worker.name} sent an answer that is none.") from error

    async def _answer_stream(self, route: RouteView, needs: frozenset[str], body: bytes, call: Call) -> None:
        shows_usage = call.shows_usage
        asked = self._endpoint.asked
        avoid: frozenset[int] = frozenset()
        said = Said()
        writers: set[int] = set()
        """Revisions of deployments whose workers wrote what was said."""
        going_on: GoingOn | None = None
        while True:
            more = going_on.needs if going_on is not None else frozenset[str]()
            worker = await self._next_worker(route, needs | more, avoid)
            if going_on is not None:
                same_model = writers == {worker.revision_id}
                body_left = going_on.body_for(worker.capabilities, same_model=same_model)
                if body_left is None:
                    raise WorkerBroke("No worker of the same model could go on with the answer.")
                body = body_left
            events = self._gateway.client.stream(
                worker, asked, body, request_id=self._request_id, timeouts=route.timeouts
            )
            async with aclosing(events):
                try:
                    batch = await anext(events)
                    if is_error(batch[0]):
                        raise WorkerUnreachable(f"{worker.name} answered with an error event.")
                    dialect = dialect_of(worker.engine, asked, self._model, call.samples)
                    if dialect is not None:
                        batch = _in_dialect(dialect, batch)
                except StopAsyncIteration:
                    nothing = WorkerUnreachable(f"{worker.name} answered with nothing.")
                    await self._give_up(worker, nothing)
                except (msgspec.DecodeError, UnicodeDecodeError):
                    broken = WorkerUnreachable(f"{worker.name} sent an event that is none.")
                    await self._give_up(worker, broken)
                except WorkerUnreachable as error:
                    await self._give_up(worker, error)
                else:
                    if self._first_at is None:
                        self._note_first()
                    await self._begin(prompt_tokens_in(batch[0]))
                    writers.add(worker.revision_id)
                    broke = await self._relay(batch, events, dialect, said, shows_usage)
                    if broke is None:
                        return
                    await self._let_go(worker, broke)
                    going_on = self._going_on(route, said)
                    if going_on is None:
                        self._gateway.meter.interrupted += 1
                        raise broke
                    self._gateway.meter.continued += 1
                    if going_on.tokens_left == 0 or said.finished:
                        await self._finish(said, shows_usage)
                        return
            avoid |= {worker.id}

    # -- 9

    async def _relay(
        self,
        batch: list[bytes],
        events: AsyncGenerator[list[bytes]],
        dialect: Dialect | None,
        said: Said,
        shows_usage: bool,
    ) -> WorkerBroke | None:
        """Pass events on, those that came together in one piece. Returns what broke the answer off, None when
        it is whole."""
        send, counts = self._consumer.stream_events, self._counts
        if self._counts.goes_on and says_nothing(batch[0]):
            del batch[0]
        try:
            while True:
                ended = batch[-1:] == [DONE]
                if ended:
                    batch.pop()
                told, broke = counts.taken_from(batch, said, shows_usage)
                if told:
                    await send(told)
                if broke is not None:
                    return broke
                if ended:
                    break
                batch = await anext(events)
                if dialect is not None:
                    batch = _in_dialect(dialect, batch)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return WorkerBroke("The worker sent an event that is none.")
        except WorkerBroke as error:
            return error
        except StopAsyncIteration:
            return WorkerBroke("The stream ended early.")
        if not said.ends():
            return WorkerBroke("The stream ended without a finish reason.")
        if self._cut is not None:
            raise self._cut
        await self._end_whole()
        return None

    async def _end_whole(self) -> None:
        self._ended = True
        if self._lease is not None:
            self._lease.succeeded()
        if self._entry is not None:
            self._entry.answered()
        await self._consumer.stream_end(b"data: [DONE]\n\n")

    def _going_on(self, route: RouteView, said: Said) -> GoingOn | None:
        """How the next worker can go on, if one can."""
        if not route.continues or self._continuations >= limits.CONTINUATIONS:
            return None
        self._continuations += 1
        self._counts.go_on()
        try:
            return said.continued(self._demand.body, tokens=self._counts.completion)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None

    async def _finish(self, said: Said, shows_usage: bool) -> None:
        """All tokens were sent; what the worker died over is the end of the stream."""
        told = [] if said.finished else [said.ending(usage=shows_usage) + b"\n\n"]
        if shows_usage:
            told.append(said.usage(*self.tokens) + b"\n\n")
        if told:
            await self._consumer.stream_events(told)
        await self._end_whole()

    # -- 10

    async def _settle(self) -> None:
        """Never raises, except a cancellation: then all the same everything is settled."""
        try:
            if self._abort is not None:
                # The answer ended because of the abort: its reply, with the counts, is about to come.
                await asyncio.shield(self._abort)
        finally:
            outcome, status = self._outcome()
            if self._lease is not None:
                self._lease.release()
            if self._time_is_up is not None:
                self._time_is_up.cancel()
            if self._steps:
                self._gateway.explanations.note(self._request_id, self._explanation(status))
            if self._admitted is not None:
                self._gateway.limited.discard(self)
                self._admitted.settle(*self.tokens)
            if self._entry is not None:
                self._gateway.waiting.discard(self)
                if self._comment is not None:
                    self._comment.cancel()
                if self._key is not None:
                    self._gateway.leave(self, self._key)
                self._entry.close(self._closed(outcome, status))
            self._gateway.meter.note(
                self._model if self._entry is not None else "",
                self._endpoint.path,
                status,
                time.monotonic() - self._began,
                self._first_at - self._began if self._stream and self._first_at is not None else None,
                self._queued,
                self._counts.prompt,
                self._counts.cached,
                self._counts.completion,
            )
            self._log(outcome, status)

    def _explanation(self, status: int) -> Explanation:
        now = time.monotonic()
        return Explanation(
            route=self._model,
            endpoint=self._endpoint.path,
            status=status,
            auth_seconds=self._known_at - self._began,
            first_seconds=None if self._first_at is None else self._first_at - self._began,
            total_seconds=now - self._began,
            prompt_tokens=self._demand.prompt_tokens,
            session=bool(self._demand.session),
            steps=self._steps,
        )

    def _outcome(self) -> tuple[Outcome, int]:
        error = self._error
        # After our last word the client hangs up: that it was cut is older news.
        cut = self._cut is not None and error is self._cut
        if not cut and (self._consumer.client_gone or isinstance(error, ClientGone)):
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
            prompt_tokens=self._counts.prompt,
            cached_tokens=self._counts.cached,
            completion_tokens=self._counts.completion,
            flagged=oddity(
                completion_tokens=self._counts.completion, characters=None, most_tokens=self._most_tokens
            ),
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
                "endpoint": self._endpoint.path,
                "route": self._model[:120],
                "worker": self._worker.name if self._worker else None,
                "status": status,
                "outcome": outcome.value,
                "stream": self._stream,
                "prompt_tokens": self._counts.prompt,
                "completion_tokens": self._counts.completion,
                "attempts": self._attempts,
                "queue_ms": round(self._queued * 1000),
                "ttft_ms": self._milliseconds(self._first_at),
                "duration_ms": self._milliseconds(time.monotonic()),
            },
        )


def _in_dialect(dialect: Dialect, events: list[bytes]) -> list[bytes]:
    """Raises DecodeError or UnicodeDecodeError."""
    return [event if event == DONE else dialect.event(event) for event in events]
