"""Every error that can reach a client has its row."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from inference.errors import InferenceError, NoCapacity, WorkerBroke, WorkerRefused, WorkerUnreachable
from inference.http import HttpError
from openai_api.errors import ROWS, ApiError, InvalidRequest, StorageAway, answer_to, row_of
from registry.errors import BudgetExhausted, RegistryError


def family(base: type[Exception]) -> Iterator[type[Exception]]:
    yield base
    for child in base.__subclasses__():
        yield from family(child)


@pytest.mark.parametrize("base", [ApiError, HttpError, InferenceError, RegistryError])
def test_every_error_class_has_a_row_of_its_own(base: type[Exception]) -> None:
    assert [kind.__name__ for kind in family(base) if kind not in ROWS] == []


def test_an_unknown_exception_tells_nothing_of_itself() -> None:
    status, payload, _ = answer_to(RuntimeError("/secret/path"))
    assert status == 500
    assert payload["error"]["type"] == "server_error"
    assert "secret" not in str(payload)


def test_a_workers_own_text_never_reaches_the_client() -> None:
    for error in (NoCapacity(1.5, "node-7 is full"), WorkerUnreachable("node-7 gone"), WorkerBroke("node-7")):
        status, payload, headers = answer_to(error)
        assert status == 503
        assert "node-7" not in str(payload)
        assert int(dict(headers)[b"retry-after"]) >= 1


def test_what_an_engine_refuses_is_told_in_its_words_as_400() -> None:
    body = b'{"error":{"message":"too long","type":"BadRequestError","param":"messages","code":"x"}}'
    status, payload, _ = answer_to(WorkerRefused(422, body))
    assert status == 400
    assert payload["error"] == {
        "message": "too long",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "x",
    }


def test_retry_after_is_not_the_same_for_all() -> None:
    assert len({dict(answer_to(StorageAway())[2])[b"retry-after"] for _ in range(60)}) > 1


def test_an_invalid_request_names_its_field() -> None:
    _, payload, headers = answer_to(InvalidRequest("bad", param="stop", code="invalid_type"))
    assert (payload["error"]["param"], payload["error"]["code"]) == ("stop", "invalid_type")
    assert headers == []
    assert row_of(InvalidRequest("bad")).status == 400


def test_a_budget_that_is_used_up_says_when_it_begins_anew_and_that_no_retry_helps() -> None:
    status, payload, headers = answer_to(BudgetExhausted("used up", retry_after=3599.2, passing=False))
    assert status == 429
    assert (payload["error"]["type"], payload["error"]["code"]) == ("insufficient_quota",) * 2
    assert headers == [(b"retry-after", b"3600"), (b"x-should-retry", b"false")]
    assert answer_to(BudgetExhausted("over", retry_after=None, passing=False))[2] == [
        (b"x-should-retry", b"false")
    ]
    # Only running requests stand in the way: clients may try again by themselves.
    assert answer_to(BudgetExhausted("busy", retry_after=5, passing=True))[2] == [(b"retry-after", b"5")]
