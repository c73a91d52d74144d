"""What goes wrong between a request and a worker; each class says when, and whether a retry helps.

InferenceError
├── NoCapacity            nobody can take the request now
│   └── NoWorker          nor is a worker about to
├── WorkerUnreachable     a worker failed before its first byte; another may be tried
├── WorkerBroke           a worker failed in mid-answer
├── Poisonous             workers died of the request: it is refused for a while
└── WorkerRefused         the engine answered 4xx: the request is at fault, not the worker

Messages may name workers and are for logs; only `WorkerRefused.message`, which the engine wrote for
the client, is meant to be shown.
"""

from __future__ import annotations

import msgspec

MAX_REFUSAL_TEXT = 2000
"""Characters of an engine's message that go on to the client."""


class InferenceError(Exception):
    """Base of all; its message is a sentence for people."""


class NoCapacity(InferenceError):
    """No live worker, a full queue, or the deadline in the queue is over.

    Trying again after `retry_after` seconds can help; the figure is jittered, so that those refused
    together do not come back together.
    """

    def __init__(self, retry_after: float, reason: str = "No worker can take the request now.") -> None:
        super().__init__(reason)
        self.retry_after = retry_after


class NoWorker(NoCapacity):
    """No worker serves the model, and none is about to: it was scaled to 0, has failed, or has no node."""


class WorkerUnreachable(InferenceError):
    """The worker failed before anything of its answer was handed on. Another worker may be tried.

    `gone` is True when no connection could be made: it should get nothing until it is heard again
    (`Fleet.mark_unreachable`). Otherwise it is there, but busy or broken for this request. `took_it` is
    True when the request was sent before it was gone.
    """

    def __init__(self, reason: str, *, gone: bool = False, took_it: bool = True) -> None:
        super().__init__(reason)
        self.gone = gone
        self.took_it = took_it


class WorkerBroke(InferenceError):
    """The worker failed after a part of its answer was handed on. The same request must not be sent again
    as it is: the client has seen the part."""

    gone = False
    took_it = True


class Poisonous(InferenceError):
    """Two workers died while they had this request. The same request is refused for some minutes."""

    headers = ((b"x-should-retry", b"false"),)


TOO_LONG = "maximum context length"
"""How every engine's refusal of a too long prompt reads; clients look for these words too."""


class _OpenAIError(msgspec.Struct):
    message: str = ""
    type: str | None = None
    param: str | None = None
    code: str | int | None = None


class _OpenAIErrorBody(msgspec.Struct):
    error: _OpenAIError


_decode_body = msgspec.json.Decoder(_OpenAIErrorBody).decode


class WorkerRefused(InferenceError):
    """The engine answered 4xx. The same request would be refused by every worker of this deployment.

    `message`, `param` and `code` come from its OpenAI-shaped body, bounded; a body of another shape
    gives a general sentence and None, and never reaches the client.
    """

    def __init__(self, status: int, body: bytes) -> None:
        self.status = status
        self.param: str | None = None
        self.code: str | None = None
        self.message = "The engine refused the request."
        try:
            error = _decode_body(body).error
        except (msgspec.DecodeError, UnicodeDecodeError):
            pass
        else:
            self.message = error.message[:MAX_REFUSAL_TEXT] or self.message
            self.param = error.param[:200] if error.param else None
            # vLLM repeats the status here.
            self.code = error.code[:200] if error.code and isinstance(error.code, str) else None
            if self.code is None and TOO_LONG in self.message:
                self.code = "context_length_exceeded"
        super().__init__(f"{status}: {self.message}")
