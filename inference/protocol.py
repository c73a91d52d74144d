"""Messages between gateway, agent, worker and engine: JSON over HTTP, typed here and nowhere else.

Who says what to whom:

    agent  -> gateway   POST /fleet/join            JoinRequest -> JoinReply      join token
    agent  -> gateway   POST /fleet/node            NodeReport  -> NodeOrders     node secret
    worker -> gateway   POST /fleet/worker          Beat        -> BeatReply      worker secret
    gateway -> worker   POST /v1/chat/completions, GET /load, POST /abort         worker secret

Every secret travels as `Authorization: Bearer`. A node proves itself with `<node id>.<secret>`,
a worker with `<worker id>.<epoch>.<secret>`.
Structs accept unknown fields, so that an older process can talk to a newer one.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgspec

BEAT_SECONDS = 2.0
"""A worker and an agent say "still alive" this often, give or take 20 % so that they spread out."""

FENCE_SECONDS = 8.0
"""A worker not heard by any gateway for this long accepts nothing new; it finishes what it has."""

HUNG_SECONDS = 15.0
"""Requests running and no engine step for this long means hung, whatever `/health` says."""

LOG_TAIL_LINES = 40
"""How many of a process's last log lines travel with its end."""


class Message(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Base of all messages; unknown fields are ignored."""


class Cause(StrEnum):
    """Why a worker ended or a model copy failed. `PERMANENT` ones are not retried by themselves."""

    BAD_ARGUMENT = "bad_argument"
    """An engine argument that the engine refuses."""
    CHECKSUM = "checksum"
    """The files are not the pinned ones."""
    CRASHED = "crashed"
    """The engine ended by itself, for no cause known here."""
    DISK = "disk"
    """No room for the model's files."""
    DRIVER = "driver"
    """The accelerator's driver does not answer, or there is no accelerator."""
    FETCH = "fetch"
    """The source could not be reached; may pass."""
    HUNG = "hung"
    """Requests were running and the engine made no step for `HUNG_SECONDS`."""
    KILLED = "killed"
    """Ended by a signal from outside."""
    LOST = "lost"
    """Silent for too long and replaced."""
    MISSING_FILE = "missing_file"
    """The model's folder, or a file that it needs, is not there or is damaged."""
    OUT_OF_MEMORY = "out_of_memory"
    """The device or the machine ran out of memory."""
    PORT = "port"
    """The address to listen on was taken."""
    STOPPED = "stopped"
    """Ended because it was told to."""
    UNSAFE_FORMAT = "unsafe_format"
    """Weights in a format that can carry code."""
    VANISHED = "vanished"
    """The process is gone and nobody saw it end (the machine restarted)."""


LORA = "lora:"
"""Before an adapter's name, wherever workers are concerned: in their capabilities, and as the model that they
are asked for. No route's name begins so."""

PERMANENT = frozenset({Cause.BAD_ARGUMENT, Cause.CHECKSUM, Cause.MISSING_FILE, Cause.UNSAFE_FORMAT})
"""Causes that the same wish will meet again: only a changed wish or an operator's restart helps."""


class WorkerPhase(StrEnum):
    """What a worker says of itself."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class CopyPhase(StrEnum):
    """How far a model's files are on a node."""

    FETCHING = "fetching"
    CONVERTING = "converting"
    READY = "ready"
    FAILED = "failed"


class Progress(Message, frozen=True, kw_only=True):
    """How far a long step is. `total` is 0 while unknown; `unit` is "bytes", "tensors" or another
    word for what is counted."""

    step: str
    done: int = 0
    total: int = 0
    unit: str = "bytes"
    files_done: int = 0
    files_total: int = 0
    """Of a step that goes file by file; 0 for any other."""


class Load(Message, frozen=True, kw_only=True):
    """What an engine is doing now. `steps` and `tokens` only grow while the process lives."""

    running: int = 0
    waiting: int = 0
    kv_use: float = 0.0
    """Share of the KV cache in use, 0 to 1."""
    steps: int = 0
    """Engine steps so far, prefill included: the sign that it is not hung."""
    tokens: int = 0
    """Tokens generated so far."""


class ModelSpec(Message, frozen=True, kw_only=True):
    """A language model as a node needs to know it."""

    id: int
    name: str
    source: str
    """As `inference.sources.parse_source` reads it, such as `/absolute/folder`."""
    chat_template: str | None = None
    """Replaces the model's own template when given."""


class Wish(StrEnum):
    """What should become of one worker."""

    RUN = "run"
    DRAIN = "drain"
    """Finish what runs, accept nothing new, then end."""
    STOP = "stop"
    """End now."""


class Upstream(Message, frozen=True, kw_only=True):
    """What a worker of the `upstream` engine needs beyond its arguments."""

    key: str = ""
    """The bearer token of the server behind; empty: it needs none."""
    allowed: list[str] = []
    """Networks and names of hosts where that server may be; empty: anywhere but at a link-local address."""

    def __repr__(self) -> str:
        # The key must not reach a log or a traceback.
        return f"<Upstream allowed={self.allowed}>"


class Assignment(Message, frozen=True, kw_only=True):
    """One worker that this node should run, drain or stop."""

    worker_id: int
    epoch: int
    name: str
    wish: Wish
    engine: str
    model: ModelSpec
    slots: int
    secret: str
    """The bearer token this worker accepts from gateways and shows to them."""
    served_name: str
    """The model name that the engine writes into its answers when the request names none."""
    arguments: dict[str, Any] = {}
    environment: dict[str, str] = {}
    drain_seconds: float = 60.0
    upstream: Upstream | None = None


class JoinRequest(Message, frozen=True, kw_only=True):
    name: str
    address: str
    """Where gateways reach this node's workers: an IP address."""
    version: str = ""


class JoinReply(Message, frozen=True, kw_only=True):
    node_id: int
    secret: str
    broker_url: str | None = None
    """Where the agent hears nudges; None: it only asks by itself."""
    broker_prefix: str = ""
    """Before the names of queues there."""


class ProcessReport(Message, frozen=True, kw_only=True):
    """One worker process as its agent sees it."""

    worker_id: int
    epoch: int
    running: bool
    pid: int | None = None
    exit_code: int | None = None
    cause: Cause | None = None
    detail: str = ""
    """One sentence for people; never a path outside the model's own name, never a secret."""
    log_tail: list[str] = []


class CopyReport(Message, frozen=True, kw_only=True):
    """A model's files on this node."""

    model_id: int
    phase: CopyPhase
    progress: Progress | None = None
    size_bytes: int = 0
    sha256: str = ""
    """Digest of the fetched original, where there is one file."""
    cause: Cause | None = None
    detail: str = ""


class UnwantedCopy(Message, frozen=True, kw_only=True):
    """Fetched files of a model that was removed."""

    name: str
    source: str


class DeletedCopy(UnwantedCopy, frozen=True, kw_only=True):
    """They are gone, or never were there."""

    freed_bytes: int = 0


class NodeReport(Message, frozen=True, kw_only=True):
    """An agent's beat: every process it watches, and those that ended since the last accepted one."""

    agent_pid: int
    version: str = ""
    processes: list[ProcessReport] = []
    copies: list[CopyReport] = []
    deleted: list[DeletedCopy] = []
    """Of what is unwanted; said until it is no longer."""
    memory_bytes: int = 0
    memory_free_bytes: int = 0
    cores: int = 0


class NodeOrders(Message, frozen=True, kw_only=True):
    """Everything the node should run, whole each time: a lost or doubled answer does no harm.

    A process the agent watches that is not listed here is to be stopped.
    """

    assignments: list[Assignment] = []
    unwanted: list[UnwantedCopy] = []
    """To be deleted from the node's own cache, and from nowhere else."""


class Beat(Message, frozen=True, kw_only=True):
    """A worker's "still alive, and this is my load"."""

    worker_id: int
    epoch: int
    phase: WorkerPhase
    url: str = ""
    pid: int = 0
    """The supervisor's process id."""
    engine_pid: int = 0
    load: Load = Load()
    progress: Progress | None = None
    capabilities: list[str] = []
    """Request fields that the engine honours, beyond the ones every engine does."""
    context_length: int = 0
    cause: Cause | None = None
    detail: str = ""
    exit_code: int | None = None
    log_tail: list[str] = []
    """The last log lines; empty in most beats: new ones come every few seconds, and all with the last."""


class BeatOrder(StrEnum):
    CONTINUE = "continue"
    DRAIN = "drain"
    EXIT = "exit"
    """This epoch is over: somebody else has the name now, or it was stopped."""


class BeatReply(Message, frozen=True, kw_only=True):
    order: BeatOrder = BeatOrder.CONTINUE


class AbortRequest(Message, frozen=True, kw_only=True):
    request_id: str


class AbortReply(Message, frozen=True, kw_only=True):
    """What a request had cost when it was ended; zeros when it was not known any more."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
