"""What a worker's processes are told and what they leave behind: files, and messages between the two.

agent       -> supervisor   WorkerSpec, a JSON file (0600) named on the command line
supervisor  -> agent        ProcessState in `state.json`, protocol.ProcessReport in `end.json`
supervisor  -> engine       EngineProcessSpec on stdin, then EngineOrder lines on the control socket
engine      -> supervisor   EngineMessage lines on the control socket
"""

from __future__ import annotations

from typing import Any

import msgspec

from inference.protocol import (
    BEAT_SECONDS,
    FENCE_SECONDS,
    HUNG_SECONDS,
    Assignment,
    Cause,
    Message,
    Progress,
    Upstream,
    WorkerPhase,
)

STATE_FILE = "state.json"
"""`ProcessState`, replaced as a whole at every change."""

END_FILE = "end.json"
"""`protocol.ProcessReport`, written once, when the worker has ended."""

LOG_FILE = "engine.log"
"""What the engine prints. At its bound it is moved to `engine.log.1`, replacing the one before."""


class WorkerSpec(Message, frozen=True, kw_only=True):
    """Everything one supervisor needs to know."""

    assignment: Assignment
    gateway_url: str
    folder: str
    """The worker's own folder, which exists: state, end and log go there."""
    model_path: str | None = None
    listen_host: str = "127.0.0.1"
    """The IP address that gateways reach."""
    port: int = 0
    """0: any free one."""
    beat_seconds: float = BEAT_SECONDS
    fence_seconds: float = FENCE_SECONDS
    hung_seconds: float = HUNG_SECONDS


class ProcessState(Message, frozen=True, kw_only=True):
    """How an agent that is not the parent recognises a supervisor: pid and start time together."""

    worker_id: int
    epoch: int
    pid: int
    started: float
    """`psutil.Process(pid).create_time()`."""
    phase: WorkerPhase
    engine_pid: int = 0
    url: str = ""


class EngineProcessSpec(Message, frozen=True, kw_only=True):
    """What the engine child serves."""

    engine: str
    slots: int
    served_name: str
    model_path: str | None = None
    chat_template: str | None = None
    arguments: dict[str, Any] = {}
    upstream: Upstream | None = None


class EngineProgress(Message, frozen=True, kw_only=True, tag="progress"):
    progress: Progress


class EngineReady(Message, frozen=True, kw_only=True, tag="ready"):
    capabilities: list[str]
    context_length: int


class EngineFailed(Message, frozen=True, kw_only=True, tag="failed"):
    """The engine says why it is about to end."""

    cause: Cause
    detail: str


class EngineAdmission(Message, frozen=True, kw_only=True, tag="admission"):
    """An `EngineOrder` has taken effect: requests from now on are treated so."""

    accept: bool


EngineMessage = EngineProgress | EngineReady | EngineFailed | EngineAdmission


class EngineOrder(Message, frozen=True, kw_only=True):
    """Whether new requests are taken; those that run are not touched."""

    accept: bool


def encode_line(message: Message) -> bytes:
    return msgspec.json.encode(message) + b"\n"
