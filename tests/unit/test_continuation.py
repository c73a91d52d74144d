"""The request that goes on with an answer, from what its client was sent."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from openai_api.continuation import FOLDED_EVENTS, GoingOn, Said, says_nothing

QUESTION = {"role": "user", "content": "Tell me."}


def event(
    text: str | None = None, *, finish: str | None = None, ids: list[int] | None = None, **delta: Any
) -> bytes:
    if text is not None:
        delta["content"] = text
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
    usage: dict[str, Any] = {"prompt_tokens": 4, "completion_tokens": 1, "total_tokens": 5}
    if ids is not None:
        usage["token_ids"] = ids
    return b"data: " + msgspec.json.encode(
        {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "m"}
        | {"choices": [choice], "usage": usage}
    )


def said(*events: bytes) -> Said:
    has = Said()
    has.add(event("", role="assistant"))
    for one in events:
        has.add(one)
    return has


def going_on(has: Said, tokens: int = 2, **fields: Any) -> tuple[GoingOn, dict[str, Any]]:
    body = {"model": "m", "messages": [QUESTION]} | fields
    found = has.continued(msgspec.json.encode(body), tokens=tokens)
    assert found is not None
    return found, msgspec.json.decode(found.body)


def test_a_chat_goes_on_with_what_was_said_as_its_last_message():
    found, body = going_on(said(event("Once"), event(" upon é")), max_tokens=10, temperature=0)
    assert body["messages"] == [QUESTION, {"role": "assistant", "content": "Once upon é"}]
    assert (body["continue_final_message"], body["add_generation_prompt"]) == (True, False)
    assert (body["max_tokens"], found.tokens_left, body["temperature"]) == (8, 8, 0)
    assert found.needs == {"continue_final_message"}


def test_a_chat_that_goes_on_already_has_its_last_message_grow():
    begun = {"role": "assistant", "content": "Well, "}
    _, body = going_on(said(event("yes")), messages=[QUESTION, begun], continue_final_message=True)
    assert body["messages"] == [QUESTION, {"role": "assistant", "content": "Well, yes"}]


def test_before_the_first_word_the_request_is_as_it_was():
    found, body = going_on(said(), tokens=0)
    assert body == {"model": "m", "messages": [QUESTION]}
    assert (found.needs, found.tokens_left) == (frozenset(), None)


def test_a_completions_prompt_grows():
    has = Said()
    for text in (" upon", " a"):
        has.add(b"data: " + msgspec.json.encode({"choices": [{"text": text, "index": 0}]}))
    found = has.continued(b'{"model":"m","prompt":"Once","max_tokens":3,"min_tokens":3}', tokens=2)
    assert found is not None
    body = {"model": "m", "prompt": "Once upon a", "max_tokens": 1, "min_tokens": 1}
    assert msgspec.json.decode(found.body) == body
    assert has.continued(b'{"model":"m","prompt":[1,2]}', tokens=2) is None


@pytest.mark.parametrize(
    "fields",
    [
        {"n": 2},
        {"tools": [{"type": "function"}]},
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"regex": "a"}},
        {"logprobs": True},
        {"return_token_ids": True},
    ],
)
def test_what_is_more_than_text_does_not_go_on(fields: dict[str, Any]):
    body = msgspec.json.encode({"messages": [QUESTION]} | fields)
    assert said(event("Once")).continued(body, tokens=1) is None


@pytest.mark.parametrize("delta", [{"tool_calls": [{"index": 0}]}, {"reasoning_content": "Hm."}])
def test_an_answer_that_was_more_than_text_does_not_go_on(delta: dict[str, Any]):
    assert said(event("Once"), event(**delta)).continued(b'{"messages":[]}', tokens=1) is None


def test_a_long_answer_is_kept_as_text():
    has = said(*(event(f" {number}") for number in range(3 * FOLDED_EVENTS)))
    assert len(has._events) <= FOLDED_EVENTS
    _, body = going_on(has)
    expected = "".join(f" {number}" for number in range(3 * FOLDED_EVENTS))
    assert body["messages"][-1]["content"] == expected


def test_nothing_is_left_when_only_the_end_is_missing():
    found, _ = going_on(said(event("a"), event("b")), tokens=2, max_tokens=2)
    assert found.tokens_left == 0


def test_the_missing_end_is_told_in_the_same_manner():
    has = said(event("a"))
    going_on(has)
    assert not has.finished
    ending = msgspec.json.decode(has.ending(usage=True)[6:])
    assert ending["id"] == "chatcmpl-1"
    assert ending["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    assert ending["usage"] is None
    usage = msgspec.json.decode(has.usage(4, 9)[6:])
    assert usage["usage"] == {"prompt_tokens": 4, "completion_tokens": 9, "total_tokens": 13}
    assert usage["choices"] == []


def test_an_end_that_was_told_is_known():
    has = said(event("a"), event("", finish="stop"))
    going_on(has)
    assert has.finished


def test_the_first_event_of_a_chat_says_nothing():
    assert says_nothing(event("", role="assistant"))
    assert says_nothing(event(role="assistant"))
    assert not says_nothing(event("a", role="assistant"))
    assert not says_nothing(event(reasoning="Hm.", role="assistant"))
    assert not says_nothing(event("", finish="stop"))
    assert not says_nothing(b"data: [1]")
    assert not says_nothing(b'data: {"choices":[{"index":0,"text":""}]}')


SAME = frozenset({"continue_final_message", "continue_token_ids"})


def test_who_serves_the_same_model_goes_on_after_the_tokens():
    has = said(event("Once", ids=[7]), event(" upon", ids=[8, 9]))
    found, by_text = going_on(has, tokens=3, max_tokens=10, min_tokens=4)
    exact = found.body_for(SAME, same_model=True)
    assert exact is not None
    assert msgspec.json.decode(exact) == {
        "model": "m",
        "messages": [QUESTION],
        "max_tokens": 10,
        "min_tokens": 4,
        "continue_token_ids": [7, 8, 9],
    }
    assert by_text["messages"][-1]["content"] == "Once upon"
    assert found.body_for(SAME, same_model=False) == found.body
    assert found.body_for(frozenset({"continue_final_message"}), same_model=True) == found.body
    assert found.tokens_left == 7


def test_tokens_that_are_not_all_known_are_of_no_use():
    assert going_on(said(event("Once", ids=[7]), event(" upon")), tokens=2)[0].exact is None


def test_thoughts_and_prompts_of_ids_go_on_after_the_tokens_alone():
    thought = said(event(reasoning="Hm.", ids=[7]), event("Once", ids=[8]))
    prompted = Said()
    usage = {"prompt_tokens": 2, "completion_tokens": 2, "total_tokens": 4, "token_ids": [7, 8]}
    prompted.add(b"data: " + msgspec.json.encode({"choices": [{"text": "a", "index": 0}], "usage": usage}))
    for has, body in ((thought, {"messages": [QUESTION]}), (prompted, {"prompt": [1, 2]})):
        found = has.continued(msgspec.json.encode(body), tokens=2)
        assert found is not None
        assert (found.body, found.needs) == (None, frozenset({"continue_token_ids"}))
        assert msgspec.json.decode(found.body_for(SAME, same_model=True) or b"") == body | {
            "continue_token_ids": [7, 8]
        }
        assert found.body_for(SAME, same_model=False) is None


def test_an_answer_that_was_not_told_why_it_ended_has_not():
    assert not said(event("Once")).ends()
    assert said(event("Once"), event("", finish="stop")).ends()
    assert not said(event('"finish_reason":"stop"')).ends()
    assert said(*(event("x") for _ in range(FOLDED_EVENTS - 2)), event("", finish="length")).ends()
