"""What the fleet says to a gateway: `/fleet/join`, `/fleet/node`, `/fleet/worker`.

Each proves itself with its own bearer token before its body is read. A worker's beat touches no
database; a node's report is one hop to a database thread.
"""

from __future__ import annotations

import hmac
import logging
import re
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import msgspec
from django.conf import settings
from django.db import DatabaseError, InterfaceError, transaction
from django.urls import URLPattern, path
from django.utils import timezone

from inference.beats import BeatBook, clean_exit_code, clean_lines, clean_text
from inference.broker import BrokerRefused, broker_of, check_reachable
from inference.http import Header, HttpConsumer, Request, error_payload
from inference.protocol import (
    Assignment,
    Beat,
    BeatReply,
    Cause,
    CopyPhase,
    CopyReport,
    JoinReply,
    JoinRequest,
    ModelSpec,
    NodeOrders,
    NodeReport,
    ProcessReport,
    UnwantedCopy,
    Upstream,
    Wish,
)
from registry.actions.language_models import note_deleted_copy, record_copy
from registry.actions.nodes import join_node, node_of_secret, record_node_beat
from registry.actions.workers import move_worker
from registry.errors import InvalidInput, InvalidTransition, JoinRefused
from registry.keys import redis_prefix, worker_secret
from registry.models import ModelCopy, Node, Worker
from registry.querysets import database_now
from registry.states import WORKER_TERMINAL, CopyState, EngineName, WorkerState
from registry.threads import in_database
from registry.upstreams import unseal, url_of

if TYPE_CHECKING:
    from inference.dispatch.fleet import Fleet

log = logging.getLogger("roundhouse.fleet")

T = TypeVar("T")

BODY_BYTES = 1024 * 1024
TOKEN_BYTES = 256

JOINS_AT_ONCE = 2
REPORTS_AT_ONCE = 32
"""More are refused until these are done, so that a flood of them leaves the database to the others."""

COPY_SECONDS = timedelta(seconds=1)
"""A copy's progress is written at most this often; a change of its state at once."""


def fleet_routes(fleet: Fleet, beats: BeatBook) -> list[URLPattern]:
    """The fleet's URLs, for Channels' URLRouter."""
    joins, reports = Gate(JOINS_AT_ONCE), Gate(REPORTS_AT_ONCE)
    consumers = [
        ("fleet/join", JoinConsumer.as_asgi(gate=joins)),
        ("fleet/node", NodeConsumer.as_asgi(gate=reports)),
        ("fleet/worker", WorkerConsumer.as_asgi(fleet=fleet, beats=beats)),
    ]
    return [path(url, consumer) for url, consumer in consumers]


class FleetError(Exception):
    """A refusal with its status; the message is a sentence for whoever set the sender up."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Gate:
    """At most so many at once; one more is told to come again."""

    def __init__(self, most: int) -> None:
        self._free = most

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        if self._free == 0:
            raise FleetError(429, "Too many of these at once; try again in a second.")
        self._free -= 1
        try:
            yield
        finally:
            self._free += 1


class FleetConsumer(HttpConsumer):
    """What the three have in common: bounded JSON in, JSON out, errors with a message."""

    methods: ClassVar[frozenset[str]] = frozenset({"POST"})

    def error_response(self, error: Exception) -> tuple[int, object, list[Header]]:
        if isinstance(error, FleetError):
            headers = [(b"retry-after", b"1")] if error.status in (429, 503) else []
            kind = "server_error" if error.status >= 500 else "invalid_request_error"
            return error.status, error_payload(str(error), kind), headers
        if isinstance(error, DatabaseError | InterfaceError):
            log.warning(
                "the fleet is not heard: the database does not answer (%s)",
                type(error).__name__,
                extra={"event": "fleet_unheard"},
            )
            return (
                503,
                error_payload("The database does not answer; try again.", "server_error"),
                [(b"retry-after", b"1")],
            )
        return super().error_response(error)

    def token(self, request: Request) -> str:
        token = request.bearer
        if token is None or len(token) > TOKEN_BYTES:
            raise FleetError(401, "Send the secret as `Authorization: Bearer …`.")
        return token

    async def message(self, request: Request, kind: type[T]) -> T:
        """The body as a message of this kind."""
        body = await request.body(BODY_BYTES)
        try:
            return msgspec.json.decode(body, type=kind)
        except msgspec.DecodeError as error:
            raise FleetError(400, f"The body is not a {kind.__name__}: {error}.") from error


class JoinConsumer(FleetConsumer):
    """A machine becomes a node, with a join token."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    async def handle(self, request: Request) -> None:
        token = self.token(request)
        message = await self.message(request, JoinRequest)
        async with self._gate.enter():
            reply = await in_database(join, token, message, request.client_address)
        await self.send_json(200, reply)


class NodeConsumer(FleetConsumer):
    """An agent's beat, answered with everything that its node should run."""

    def __init__(self, gate: Gate) -> None:
        super().__init__()
        self._gate = gate

    async def handle(self, request: Request) -> None:
        node_id, secret = _split(self.token(request), _NODE_TOKEN)
        async with self._gate.enter():
            node = await in_database(node_of_secret, int(node_id), secret)
        if node is None:
            raise FleetError(401, "No node has this secret; join again with a new join token.")
        report = await self.message(request, NodeReport)
        async with self._gate.enter():
            orders = await in_database(take_report, node, report)
        await self.send_json(200, orders)


class WorkerConsumer(FleetConsumer):
    """A worker's beat, answered from memory."""

    def __init__(self, fleet: Fleet, beats: BeatBook) -> None:
        super().__init__()
        self._fleet = fleet
        self._beats = beats

    async def handle(self, request: Request) -> None:
        number, epoch, secret = _split(self.token(request), _WORKER_TOKEN)
        expected = worker_secret(settings.SECRET_KEY, int(number), int(epoch))
        if not hmac.compare_digest(secret, expected):
            raise FleetError(401, "This is not the worker's secret.")
        beat = await self.message(request, Beat)
        if (beat.worker_id, beat.epoch) != (int(number), int(epoch)):
            raise FleetError(401, "The beat is of another worker than the secret.")
        self._beats.hear(beat)
        await self.send_json(200, BeatReply(order=self._fleet.order(beat.worker_id, beat.epoch)))


# Ids within what the database's integers hold, secrets in the letters of their own form.
_NODE_TOKEN = re.compile(r"([0-9]{1,18})\.([A-Za-z0-9_-]{20,100})")
_WORKER_TOKEN = re.compile(r"([0-9]{1,18})\.([0-9]{1,9})\.([0-9a-f]{64})")


def _split(token: str, form: re.Pattern[str]) -> tuple[str, ...]:
    match = form.fullmatch(token)
    if match is None:
        raise FleetError(401, "The bearer token has not the form of this sender's secret.")
    return match.groups()


# -- From here on in a database thread.


def join(token: str, request: JoinRequest, client_address: str) -> JoinReply:
    """Let a node join; a refusal uses nothing of the token up."""
    try:
        with transaction.atomic():
            node, secret = join_node(
                token=token,
                name=request.name,
                address=request.address,
                version=clean_text(request.version, 40),
            )
            check_reachable(client_address)
    except JoinRefused as error:
        raise FleetError(401, str(error)) from error
    except BrokerRefused as error:
        raise FleetError(409, str(error)) from error
    except InvalidInput as error:
        raise FleetError(400, str(error)) from error
    log.info(
        "node %s joined from %s", node, client_address, extra={"event": "node_joined", "node_id": node.pk}
    )
    prefix = redis_prefix(settings.SECRET_KEY)
    return JoinReply(node_id=node.pk, secret=secret, broker_url=broker_of(node), broker_prefix=prefix)


def take_report(node: Node, report: NodeReport) -> NodeOrders:
    """Note what an agent says of its node, and answer what the node should run."""
    now = database_now()
    record_node_beat(
        node=node,
        now=now,
        agent_pid=_small(report.agent_pid),
        version=clean_text(report.version, 40),
        cores=_small(report.cores),
        memory_bytes=_large(report.memory_bytes),
        memory_free_bytes=_large(report.memory_free_bytes),
    )
    _take_copies(node, report.copies)
    for gone in report.deleted:
        note_deleted_copy(
            node=node,
            model_name=clean_text(gone.name, 120),
            source=clean_text(gone.source, 1000),
            freed_bytes=_large(gone.freed_bytes),
        )
    workers = list(
        Worker.objects.live()
        .filter(node=node)
        .select_related("deployment", "revision", "revision__language_model")
        .order_by("id")
    )
    _take_processes(node, workers, report, now)
    unwanted = node.unwanted_copies.values_list("model_name", "source")
    return NodeOrders(
        assignments=[assignment_of(worker) for worker in workers if worker.state not in WORKER_TERMINAL],
        unwanted=[UnwantedCopy(name=name, source=source) for name, source in unwanted],
    )


def assignment_of(worker: Worker) -> Assignment:
    """What a node needs to know to run this worker."""
    revision = worker.revision
    return Assignment(
        worker_id=worker.pk,
        epoch=worker.epoch,
        name=worker.name,
        # A lost worker may come back, until it is replaced.
        wish=Wish.DRAIN if worker.state == WorkerState.DRAINING else Wish.RUN,
        engine=revision.engine,
        model=ModelSpec(
            id=revision.language_model_id,
            name=revision.language_model.name,
            source=revision.source,
            chat_template=revision.chat_template or None,
        ),
        slots=revision.slots,
        secret=worker_secret(settings.SECRET_KEY, worker.pk, worker.epoch),
        served_name=worker.deployment.name,
        arguments=revision.arguments,
        environment={name: str(value) for name, value in revision.environment.items()},
        drain_seconds=float(worker.deployment.drain_seconds),
        upstream=_upstream_of(worker),
    )


def _upstream_of(worker: Worker) -> Upstream | None:
    """The key goes with the URL that it was given for, and with no older revision's."""
    if worker.revision.engine != EngineName.UPSTREAM:
        return None
    key = unseal(worker.deployment.upstream_key, url_of(worker.revision))
    return Upstream(key=key, allowed=list(settings.ROUNDHOUSE_UPSTREAM_HOSTS))


def _take_copies(node: Node, reports: Iterable[CopyReport]) -> None:
    """Write what is news: agents repeat themselves with every beat."""
    known = {copy.language_model_id: copy for copy in ModelCopy.objects.filter(node=node)}
    now = timezone.now()
    for report in reports:
        facts = _copy_facts(report)
        state = CopyState(report.phase.value)
        before = known.get(report.model_id)
        if before is not None and before.state == state:
            changed = any(getattr(before, name) != value for name, value in facts.items())
            if not changed or now - before.updated_at < COPY_SECONDS:
                continue
        record_copy(node=node, language_model_id=report.model_id, state=state, **facts)


def _copy_facts(report: CopyReport) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "size_bytes": _large(report.size_bytes),
        "sha256": clean_text(report.sha256, 64),
        "detail": clean_text(report.detail, 1000),
    }
    if report.progress is not None:
        facts |= {
            "step": clean_text(report.progress.step, 100),
            "done": _large(report.progress.done),
            "total": _large(report.progress.total),
            "unit": clean_text(report.progress.unit, 16),
            "files_done": _large(report.progress.files_done),
            "files_total": _large(report.progress.files_total),
        }
    return facts


def _take_processes(node: Node, workers: list[Worker], report: NodeReport, now: datetime) -> None:
    """Move workers by what their agent sees: taken up, started, ended."""
    by_key = {(worker.pk, worker.epoch): worker for worker in workers}
    seen = {(process.worker_id, process.epoch): process for process in report.processes}
    making = {
        copy.model_id for copy in report.copies if copy.phase in (CopyPhase.FETCHING, CopyPhase.CONVERTING)
    }
    by = f"agent {node.name}"
    for key, worker in by_key.items():
        process = seen.get(key)
        try:
            if process is not None and not process.running:
                _note_end(worker, process, by)
            elif process is not None and _not_yet_heard(worker):
                _note_start(worker, process, by, now)
            elif worker.state == WorkerState.REQUESTED and worker.revision.language_model_id in making:
                move_worker(
                    worker=worker,
                    to=WorkerState.LAUNCHING,
                    reason="its model's files are being made ready",
                    by=by,
                )
        except InvalidTransition:
            # Its own beat, or reconcile, moved it in this moment.
            worker.refresh_from_db(fields=["state"])


def _not_yet_heard(worker: Worker) -> bool:
    return worker.state == WorkerState.REQUESTED or (
        worker.state == WorkerState.LAUNCHING and worker.heartbeat_at is None
    )


def _note_start(worker: Worker, process: ProcessReport, by: str, now: datetime) -> None:
    # From now on the worker has to speak for itself: the reaper counts from this heartbeat.
    facts = {"pid": _small(process.pid) if process.pid is not None else None, "heartbeat_at": now}
    if worker.state == WorkerState.REQUESTED:
        move_worker(
            worker=worker, to=WorkerState.LAUNCHING, reason="its process was started", by=by, facts=facts
        )
    else:
        Worker.objects.filter(pk=worker.pk, state=WorkerState.LAUNCHING).update(**facts)


def _note_end(worker: Worker, process: ProcessReport, by: str) -> None:
    cause = process.cause or Cause.CRASHED
    to = WorkerState.STOPPED if cause == Cause.STOPPED else WorkerState.FAILED
    move_worker(
        worker=worker,
        to=to,
        reason=clean_text(process.detail, 500) or "its process ended",
        by=by,
        facts={
            "cause": cause.value,
            "exit_code": clean_exit_code(process.exit_code),
            "log_tail": "\n".join(clean_lines(process.log_tail)),
        },
    )


def _small(number: int) -> int:
    return max(0, min(number, 2**31 - 1))


def _large(number: int) -> int:
    return max(0, min(number, 2**62))
