"""POST /tokenize, /detokenize and FastChat's /api/v1/token_check through the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from openai_api import answers, limits
from tests.api.conftest import ROUTE, Answer, Served
from tests.api.scripted import Scripted, in_front_of, scripted
from tests.factories import make_api_key

pytestmark = pytest.mark.django_db(transaction=True)

TALK = [{"role": "user", "content": "Hi"}]
CHECK = "/api/v1/token_check"


@pytest.fixture(scope="module")
def module_worker() -> Iterator[Scripted]:
    with scripted() as running:
        yield running


@pytest.fixture
def told(module_worker: Scripted) -> Scripted:
    module_worker.asked.clear()
    module_worker.answer = {"count": 3, "max_model_len": 10, "tokens": [1, 2, 3], "token_strs": None}
    return module_worker


@pytest.fixture
def counting(told: Scripted, transactional_db: None) -> Iterator[Served]:
    with in_front_of(told, "endpoint:chat", "endpoint:tokenize", worker_id=7201) as served:
        yield served


def ask(served: Served, path: str, **fields: Any) -> Answer:
    return served.request("POST", path, json.dumps({"model": ROUTE, **fields}).encode())


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
def test_a_text_as_tokens(counting: Served, told: Scripted, path: str) -> None:
    answer = ask(counting, path, prompt="A b", add_special_tokens=False, return_token_strs=True, extra=1)
    found = msgspec.json.decode(answer.body, type=answers.Tokenization)
    assert (answer.status, found.count, found.max_model_len, found.tokens) == (200, 3, 10, [1, 2, 3])
    wanted = {"model": ROUTE, "prompt": "A b", "add_special_tokens": False, "return_token_strs": True}
    assert told.asked == [("/tokenize", wanted)]
    event = counting.event(answer.headers["x-request-id"])
    assert (event.endpoint, event.prompt_tokens, event.completion_tokens) == (path, 0, 0)


def test_a_conversation_as_tokens(counting: Served, told: Scripted) -> None:
    assert ask(counting, "/tokenize", messages=TALK, add_generation_prompt=False).status == 200
    wanted = {"model": ROUTE, "messages": TALK, "add_generation_prompt": False}
    assert told.asked == [("/tokenize", wanted)]


def test_what_the_template_is_told_where_the_engine_tells_it(told: Scripted, transactional_db: None) -> None:
    able = ("endpoint:tokenize", "continue_final_message", "chat_template_kwargs")
    talk = [*TALK, {"role": "assistant", "content": "The answer is"}]
    with in_front_of(told, *able, worker_id=7203) as served:
        values = {"mood": "glad", "level": 2}
        fields = {"messages": talk, "continue_final_message": True, "chat_template_kwargs": values}
        assert ask(served, "/tokenize", **fields).status == 200
        # vLLM would begin an answer unless told otherwise, and refuse both.
        wanted = {"model": ROUTE, **fields, "add_generation_prompt": False}
        assert told.asked == [("/tokenize", wanted)]
        both = ask(served, "/tokenize", **fields, add_generation_prompt=True)
        assert (both.status, both.error()["param"]) == (400, "continue_final_message")


@pytest.mark.parametrize("path", ["/detokenize", "/v1/detokenize"])
def test_tokens_as_text(counting: Served, told: Scripted, path: str) -> None:
    told.answer = {"prompt": "A b"}
    answer = ask(counting, path, tokens=[1, 2])
    assert msgspec.json.decode(answer.body, type=answers.Detokenization).prompt == "A b"
    assert told.asked == [("/detokenize", {"model": ROUTE, "tokens": [1, 2]})]


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": 1}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": TALK}, "messages"),
        ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content"),
        ("/tokenize", {"messages": TALK, "chat_template_kwargs": {"a": 1}}, "chat_template_kwargs"),
        ("/tokenize", {"messages": TALK, "continue_final_message": True}, "continue_final_message"),
        ("/detokenize", {}, "tokens"),
        ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
        ("/detokenize", {"tokens": [2**63]}, "tokens[0]"),
    ],
)
def test_a_field_that_cannot_be_used_is_named(
    counting: Served, told: Scripted, path: str, fields: dict[str, Any], param: str
) -> None:
    answer = ask(counting, path, **fields)
    assert (answer.status, answer.error()["param"]) == (400, param)
    assert told.asked == []


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize", "/detokenize", "/v1/detokenize", CHECK])
def test_they_need_a_key_and_every_error_is_json(counting: Served, told: Scripted, path: str) -> None:
    body = b'{"prompts":[{"model":"x","prompt":"a"}]}'
    refused = counting.request("POST", path, body, key=None)
    assert (refused.status, refused.error()["type"]) == (401, "invalid_request_error")
    wrong = counting.request("GET", path)
    assert (wrong.status, wrong.error()["code"]) == (405, "method_not_supported")
    assert counting.request("POST", path + "/", body).error()["message"].startswith("Invalid URL")
    assert told.asked == []


def test_a_model_without_tokens_to_show_says_so(told: Scripted, transactional_db: None) -> None:
    with in_front_of(told, "endpoint:chat", worker_id=7202) as served:
        answer = ask(served, "/tokenize", prompt="a")
        assert (answer.status, answer.error()["param"]) == (400, "model")


# -- FastChat's check


def test_prompts_are_checked_one_by_one(counting: Served, told: Scripted) -> None:
    prompts = [{"model": ROUTE, "prompt": "A b", "max_tokens": most} for most in (7, 8)]
    answer = counting.request("POST", CHECK, json.dumps({"prompts": prompts}).encode())
    assert answer.status == 200, answer.body
    told_of = {"tokenCount": 3, "contextLength": 10}
    assert answer.json() == {"prompts": [{"fits": True, **told_of}, {"fits": False, **told_of}]}
    assert told.asked == [("/tokenize", {"model": ROUTE, "prompt": "A b"})] * 2
    for at in range(2):
        event = counting.event(f"{answer.headers['x-request-id']}-{at}")
        assert (event.endpoint, event.prompt_tokens) == ("/tokenize", 0)


def test_a_check_obeys_the_key_and_the_bounds(counting: Served, told: Scripted) -> None:
    _, other = make_api_key(name="other", routes=["elsewhere"])
    one = {"model": ROUTE, "prompt": "a", "max_tokens": 1}

    def check(*prompts: Any, key: str = "") -> Answer:
        return counting.request("POST", CHECK, json.dumps({"prompts": prompts}).encode(), key=key)

    assert check(one, key=other).status == 403
    assert check({**one, "model": "nobody"}).error()["code"] == "model_not_found"
    assert check({"model": ROUTE}).error()["param"] == "prompts[0].prompt"
    assert check(*[one] * (limits.PROMPTS + 1)).error()["param"] == "prompts"
    assert counting.request("POST", CHECK, b"{}").error()["param"] == "prompts"
    assert told.asked == []


def test_a_worker_that_counts_nothing_is_no_capacity(counting: Served, told: Scripted) -> None:
    told.answer = {"secret": 1}
    body = json.dumps({"prompts": [{"model": ROUTE, "prompt": "a"}]}).encode()
    answer = counting.request("POST", CHECK, body)
    assert (answer.status, answer.error()["code"]) == (503, "server_is_overloaded")
    assert b"secret" not in answer.body
