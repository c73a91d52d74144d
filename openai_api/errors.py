"""What a client is told when something goes wrong: one table from class to status, `type` and `code`.

    ApiError
    ├── InvalidRequest       a field cannot be used; names it
    ├── MissingKey           no key was sent
    ├── WrongKey             the key is malformed, unknown, expired or revoked
    ├── UnknownModel         no such model
    ├── WrongEndpoint        no worker of the model answers this endpoint
    ├── ForbiddenModel       the model exists, but this key may not use it
    ├── ForbiddenScope       this key may not use this endpoint
    ├── ForbiddenAddress     this key may not be used from there
    ├── KeyEnded             the key ended while its answer was written
    ├── UnknownUrl           nothing is served at this URL
    │   └── NotServed        OpenAI serves something there; Roundhouse does not
    ├── ResponseNotFound     no such response is kept, or it is another project's
    ├── RateLimited          a limit has no room for it now
    │   └── TokensLimited    one that counts tokens
    ├── TimeIsUp             its route gives a request no more time
    └── StorageAway          the database, or the disk of the ledger, does not answer
        └── LimitUnknown     nor does Redis, and the limit says that it must be asked

Every class of `registry.errors`, `inference.errors`, `inference.http` and this module has its row; the
nearest base's row counts. What has none is a fault of ours: 500, and the message says nothing.
"""

from __future__ import annotations

import logging
import math
import random
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from inference.errors import (
    InferenceError,
    NoCapacity,
    NoWorker,
    Poisonous,
    WorkerBroke,
    WorkerRefused,
    WorkerUnreachable,
)
from inference.http import (
    INTERNAL_ERROR,
    BodyTooLarge,
    ClientGone,
    Header,
    HttpError,
    MethodNotAllowed,
    error_payload,
)
from registry.errors import (
    BudgetExhausted,
    InvalidInput,
    InvalidTransition,
    JoinRefused,
    NotAllowed,
    RegistryError,
    StillInUse,
)
from registry.keys import mask_key

if TYPE_CHECKING:
    from rest_framework.response import Response

logger = logging.getLogger("roundhouse.api")

OVERLOADED = "The server is currently overloaded with other requests. Please try again later."
STORAGE = "The server cannot reach its storage at the moment. Please try again later."
POISONOUS = (
    "Two workers ended while they tried to answer this request. It is refused for ten minutes; "
    "the operator's log tells more under the request id."
)
INTERRUPTED = "The answer was interrupted: the worker that generated it stopped."


class ApiError(Exception):
    """Base of what the API itself refuses; its message is for the client."""

    param: str | None = None
    code: str | None = None


class InvalidRequest(ApiError):
    """The request cannot be used as it stands. The same one again is refused again."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class MissingKey(ApiError):
    """No key was sent."""

    def __init__(self) -> None:
        super().__init__(
            "You didn't provide an API key. Send it in an Authorization header using Bearer auth "
            "(Authorization: Bearer YOUR_KEY)."
        )


class WrongKey(ApiError):
    """The key is malformed, unknown, expired or revoked: which of these is not told."""

    def __init__(self, text: str) -> None:
        super().__init__(f"Incorrect API key provided: {mask_key(_printable(text))}.")


class UnknownModel(ApiError):
    """No such model."""

    def __init__(self, model: str, *, param: str | None = None) -> None:
        super().__init__(f"The model `{_printable(model)}` does not exist or you do not have access to it.")
        self.param = param


class WrongEndpoint(ApiError):
    """No worker of the model answers this endpoint."""

    param = "model"
    code = "unsupported_value"

    def __init__(self, model: str) -> None:
        super().__init__(f"The model `{_printable(model)}` does not support this endpoint.")


class ForbiddenModel(ApiError):
    """The model exists, but this key may not use it."""

    def __init__(self, model: str, project: str) -> None:
        super().__init__(f"Project `{project}` does not have access to model `{model}`")


class ForbiddenScope(ApiError):
    """This key may not use this endpoint."""

    def __init__(self, scope: str) -> None:
        super().__init__(
            f"You have insufficient permissions for this operation. Missing scopes: {scope}. "
            "Use an API key that has this scope, or ask whoever manages your project for one."
        )


class ForbiddenAddress(ApiError):
    """This key may not be used from there."""

    def __init__(self, address: object | None) -> None:
        told = f"Your IP address {address}" if address is not None else "Your IP address"
        super().__init__(f"{told} is not allowed to use this API key.")


class KeyEnded(ApiError):
    """The key was revoked or expired, or its owner was disabled, while its answer was written."""

    def __init__(self) -> None:
        super().__init__("The answer was ended: the API key that asked for it is not valid any more.")


class UnknownUrl(ApiError):
    """Nothing is served at this URL."""

    def __init__(self, method: str, path: str) -> None:
        super().__init__(f"Invalid URL ({_printable(method)} {_printable(path)})")


class NotServed(UnknownUrl):
    """OpenAI serves something at this URL; Roundhouse does not."""

    def __init__(self, method: str, path: str, what: str) -> None:
        ApiError.__init__(
            self, f"Roundhouse does not serve {what} ({_printable(method)} {_printable(path)})."
        )


class ResponseNotFound(ApiError):
    """No such response is kept, or it is another project's."""

    param = "response_id"

    def __init__(self, response_id: str) -> None:
        super().__init__(f"Response with id '{_printable(response_id)}' not found.")


class RateLimited(ApiError):
    """A limit has no room for it now. Its headers say when it has."""

    def __init__(self, message: str, headers: list[Header]) -> None:
        super().__init__(message)
        self.headers = headers


class TokensLimited(RateLimited):
    """A limit that counts tokens has no room for it now."""


class TimeIsUp(ApiError):
    """The route gives a request no more time."""

    headers = ((b"x-should-retry", b"false"),)

    def __init__(self, seconds: float) -> None:
        super().__init__(
            f"The answer took longer than the {seconds:g} seconds that requests of this model may take. "
            "Ask for fewer tokens, or stream."
        )


class StorageAway(ApiError):
    """The database, or the disk of the ledger, does not answer. A later try can help."""

    def __init__(self) -> None:
        super().__init__(STORAGE)


class LimitUnknown(StorageAway):
    """Redis, which counts for the limits, does not answer, and a limit says that it must be asked."""


def _printable(text: str) -> str:
    """Text of a client's, bounded and harmless in a message."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text[:200])


@dataclass(frozen=True, slots=True)
class Row:
    status: int
    type: str
    code: str | None = None
    """None: the error's own `code`, where it has one."""
    message: str | None = None
    """None: the error's own sentence."""


ROWS: dict[type[Exception], Row] = {
    ApiError: Row(500, "server_error", message=INTERNAL_ERROR),
    InvalidRequest: Row(400, "invalid_request_error"),
    MissingKey: Row(401, "invalid_request_error"),
    WrongKey: Row(401, "invalid_request_error", "invalid_api_key"),
    UnknownModel: Row(404, "invalid_request_error", "model_not_found"),
    WrongEndpoint: Row(400, "invalid_request_error"),
    ForbiddenModel: Row(403, "invalid_request_error", "model_not_found"),
    ForbiddenScope: Row(403, "invalid_request_error", "missing_scope"),
    ForbiddenAddress: Row(403, "invalid_request_error", "ip_not_allowed"),
    KeyEnded: Row(401, "invalid_request_error", "invalid_api_key"),
    UnknownUrl: Row(404, "invalid_request_error"),
    NotServed: Row(404, "invalid_request_error"),
    ResponseNotFound: Row(404, "invalid_request_error"),
    RateLimited: Row(429, "requests", "rate_limit_exceeded"),
    TokensLimited: Row(429, "tokens", "rate_limit_exceeded"),
    TimeIsUp: Row(504, "server_error", "timeout"),
    LimitUnknown: Row(503, "service_unavailable_error", "storage"),
    StorageAway: Row(503, "service_unavailable_error", "storage"),
    # Between client and consumer. 499 is for the log: nobody is there to read it.
    HttpError: Row(400, "invalid_request_error"),
    ClientGone: Row(499, "invalid_request_error", "client_gone", "The client left."),
    BodyTooLarge: Row(413, "invalid_request_error", "request_too_large"),
    MethodNotAllowed: Row(405, "invalid_request_error", "method_not_supported"),
    # Between gateway and worker: never a worker's own text, except what an engine refuses.
    InferenceError: Row(500, "server_error", message=INTERNAL_ERROR),
    NoCapacity: Row(503, "service_unavailable_error", "server_is_overloaded", OVERLOADED),
    NoWorker: Row(503, "service_unavailable_error", "server_is_overloaded"),
    WorkerUnreachable: Row(503, "service_unavailable_error", "server_is_overloaded", OVERLOADED),
    WorkerBroke: Row(503, "service_unavailable_error", "stream_interrupted", INTERRUPTED),
    WorkerRefused: Row(400, "invalid_request_error"),
    Poisonous: Row(500, "server_error", "poison", POISONOUS),
    # The facts' own rules.
    RegistryError: Row(500, "server_error", message=INTERNAL_ERROR),
    BudgetExhausted: Row(429, "insufficient_quota", "insufficient_quota"),
    InvalidInput: Row(400, "invalid_request_error"),
    InvalidTransition: Row(409, "invalid_request_error", "conflict"),
    StillInUse: Row(409, "invalid_request_error", "conflict"),
    JoinRefused: Row(403, "invalid_request_error", "join_refused"),
    NotAllowed: Row(403, "invalid_request_error", "insufficient_role"),
}

FAULT = Row(500, "server_error", message=INTERNAL_ERROR)


def row_of(error: BaseException) -> Row:
    """The row of an error's class, or of its nearest base that has one."""
    for kind in type(error).__mro__:
        if kind in ROWS:
            return ROWS[kind]
    return FAULT


def answer_to(error: Exception) -> tuple[int, dict[str, Any], list[Header]]:
    """Status, payload and headers that tell a client of `error`."""
    row = row_of(error)
    own = error.message if isinstance(error, WorkerRefused) else str(error)
    payload = error_payload(
        row.message or own,
        row.type,
        param=getattr(error, "param", None) or getattr(error, "field", None),
        code=row.code or getattr(error, "code", None),
    )
    headers: list[Header] = list(getattr(error, "headers", ()))
    if row.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    elif row.status == 503:
        headers.append((b"retry-after", b"%d" % retry_after_seconds(error)))
    elif isinstance(error, MethodNotAllowed):
        headers.append((b"allow", error.allow.encode()))
    elif isinstance(error, BudgetExhausted):
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % retry_after_seconds(error)))
        if not error.passing:
            # SDKs would try it again at once, for nothing.
            headers.append((b"x-should-retry", b"false"))
    return row.status, payload, headers


def retry_after_seconds(error: Exception) -> int:
    """Whole seconds, never 0: when the one who must know did not say, 1 to 3 at random, so that those
    refused together do not come back together."""
    told = getattr(error, "retry_after", None)
    return max(1, math.ceil(told)) if told is not None else random.randint(1, 3)  # noqa: S311


def drf_exception_handler(error: Exception, context: dict[str, Any]) -> Response:
    """DRF's errors, and any other that a view raises, in OpenAI's shape."""
    from rest_framework import exceptions
    from rest_framework.response import Response

    if isinstance(error, exceptions.MethodNotAllowed):
        request = context["request"]
        error = MethodNotAllowed(request.method, context["view"].allowed_methods)
    elif isinstance(error, exceptions.NotFound):
        request = context["request"]
        error = UnknownUrl(request.method, request.path)
    elif isinstance(error, exceptions.APIException) and error.status_code < 500:
        refused = Response(
            error_payload(str(error.detail), "invalid_request_error"), status=error.status_code
        )
        return refused
    status, payload, headers = answer_to(error)
    if status == 500:
        logger.error("a view failed by a fault of ours", exc_info=error, extra={"event": "view_crashed"})
    return Response(
        payload, status=status, headers={name.decode(): value.decode() for name, value in headers}
    )
