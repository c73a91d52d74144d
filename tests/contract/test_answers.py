"""What every engine answers: shapes, usage, ends, and no more than was asked for."""

from __future__ import annotations

import time
from typing import Any

import pytest

from tests.contract.serving import ROUTE, SAY, Served, text_of

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24, "ignore_eos": True}
SPELLED = "🚂 é 日本 end"
"""Each of its characters but four is several bytes, and to a byte-level model several tokens."""

USAGE = {
    *("prompt_tokens", "completion_tokens", "total_tokens"),
    *("prompt_tokens_details", "completion_tokens_details"),
}


def check_usage(usage: dict[str, Any], completion: int) -> None:
    assert set(usage) == USAGE
    assert usage["prompt_tokens"] > 0
    assert usage["completion_tokens"] == completion
    assert usage["total_tokens"] == usage["prompt_tokens"] + completion
    assert 0 <= usage["prompt_tokens_details"]["cached_tokens"] <= usage["prompt_tokens"]
    assert usage["completion_tokens_details"]["reasoning_tokens"] == 0


# -- shapes


def test_a_whole_chat_answer(served: Served) -> None:
    answer = served.chat(max_tokens=5, ignore_eos=True)
    assert set(answer) - {"system_fingerprint"} == {"id", "object", "created", "model", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("chat.completion", ROUTE)
    [choice] = answer["choices"]
    assert set(choice) == {"index", "message", "logprobs", "finish_reason"}
    assert set(choice["message"]) == {"role", "content", "refusal", "annotations"}
    assert (choice["message"]["role"], choice["index"], choice["logprobs"]) == ("assistant", 0, None)
    assert choice["finish_reason"] == "length"
    check_usage(answer["usage"], 5)


def test_a_whole_completion(served: Served) -> None:
    answer = served.complete(max_tokens=5, ignore_eos=True)
    assert set(answer) - {"system_fingerprint"} == {"id", "object", "created", "model", "choices", "usage"}
    assert (answer["object"], answer["model"]) == ("text_completion", ROUTE)
    [choice] = answer["choices"]
    assert set(choice) == {"index", "text", "logprobs", "finish_reason"}
    assert (choice["index"], choice["logprobs"], choice["finish_reason"]) == (0, None, "length")
    check_usage(answer["usage"], 5)


def test_a_streamed_chat(served: Served) -> None:
    chunks = served.stream(**GREEDY)
    assert all(chunk["object"] == "chat.completion.chunk" and "usage" not in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert choices[0]["delta"]["role"] == "assistant"
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert text_of(chunks) == served.chat(**GREEDY)["choices"][0]["message"]["content"]


def test_a_streamed_completion(served: Served) -> None:
    chunks = served.stream(TEXT, **GREEDY)
    assert all(chunk["object"] == "text_completion" and "usage" not in chunk for chunk in chunks)
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices] == [None] * (len(choices) - 1) + ["length"]
    assert text_of(chunks) == served.complete(**GREEDY)["choices"][0]["text"]


@pytest.mark.parametrize("path", [CHAT, TEXT])
def test_a_streams_usage_is_its_last_chunk_when_asked_for(served: Served, path: str) -> None:
    *parts, last = served.stream(path, **GREEDY, stream_options={"include_usage": True})
    assert all(part["usage"] is None and part["choices"] for part in parts)
    assert last["choices"] == []
    check_usage(last["usage"], 24)
    whole = (served.chat if path == CHAT else served.complete)(**GREEDY)["usage"]
    assert whole["prompt_tokens"] == last["usage"]["prompt_tokens"]


def test_the_official_client_reads_both(served: Served) -> None:
    # Its types are OpenAI's: what is missing or of another kind shows here.
    create: Any = served.client.chat.completions.create
    whole = create(model=ROUTE, messages=SAY, temperature=0, max_tokens=12)
    chunks = list(create(model=ROUTE, messages=SAY, temperature=0, max_tokens=12, stream=True))
    said = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert said == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


# -- several answers, several prompts


def test_several_answers_have_an_index_each_and_are_counted_together(served: Served) -> None:
    fields: dict[str, Any] = {"n": 3, "temperature": 1.5, "max_tokens": 8, "ignore_eos": True}
    answer = served.chat(**fields)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["message"]["content"] for choice in answer["choices"]}) > 1
    check_usage(answer["usage"], 24)
    *parts, last = served.stream(**fields, stream_options={"include_usage": True})
    ends = [choice for chunk in parts for choice in chunk["choices"] if choice["finish_reason"]]
    assert sorted((choice["index"], choice["finish_reason"]) for choice in ends) == [
        (0, "length"),
        (1, "length"),
        (2, "length"),
    ]
    check_usage(last["usage"], 24)


def test_several_prompts_are_answered_in_their_order(served: Served) -> None:
    prompts = ["One two three", "Four five", "Six"]
    together = served.complete(prompt=prompts, **GREEDY)
    alone = [served.complete(prompt=prompt, **GREEDY) for prompt in prompts]
    assert [choice["index"] for choice in together["choices"]] == [0, 1, 2]
    assert [choice["text"] for choice in together["choices"]] == [
        answer["choices"][0]["text"] for answer in alone
    ]
    check_usage(together["usage"], 72)
    assert together["usage"]["prompt_tokens"] == sum(answer["usage"]["prompt_tokens"] for answer in alone)
    *_, last = served.stream(TEXT, prompt=prompts, **GREEDY, stream_options={"include_usage": True})
    check_usage(last["usage"], 72)


def test_token_ids_are_a_prompt_too_and_are_given_on_request(served: Served) -> None:
    answer = served.complete(prompt=[5, 6, 7], max_tokens=4, ignore_eos=True, return_token_ids=True)
    [choice] = answer["choices"]
    assert answer["usage"]["prompt_tokens"] == 3
    assert choice["prompt_token_ids"] == [5, 6, 7]
    assert len(choice["token_ids"]) == 4
    again = served.complete(prompt=[5, 6, 7, *choice["token_ids"]], max_tokens=1)
    assert again["usage"]["prompt_tokens"] == 7


def test_echo_begins_with_the_prompt(served: Served) -> None:
    plain, echoed = served.complete(**GREEDY), served.complete(**GREEDY, echo=True)
    assert echoed["choices"][0]["text"] == "Once upon a time" + plain["choices"][0]["text"]
    assert echoed["usage"]["completion_tokens"] == 24
    assert text_of(served.stream(TEXT, **GREEDY, echo=True)) == echoed["choices"][0]["text"]


# -- ends


def test_a_stop_string_ends_the_answer_and_is_never_told_in_part(served: Served) -> None:
    # What is said is known beforehand; the string begins within one word and ends within another.
    whole, stop = "north by northwest, then home", "est, th"
    kept = whole[: whole.find(stop)]
    fields: dict[str, Any] = {"structured_outputs": {"choice": [whole]}, "max_tokens": 60}
    answer = served.complete(**fields, stop=["never said", stop])
    assert answer["choices"][0]["text"] == kept
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] < served.complete(**fields)["usage"]["completion_tokens"]
    chunks = served.stream(TEXT, **fields, stop=stop)
    told = ""
    for chunk in chunks:
        told += text_of([chunk])
        assert kept.startswith(told)
    assert told == kept
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("most", [1, 7])
def test_max_tokens_is_the_most_that_is_written(served: Served, most: int) -> None:
    for field in ("max_tokens", "max_completion_tokens"):
        answer = served.chat(**{"temperature": 0, "ignore_eos": True, field: most})
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["completion_tokens"] == most


def test_characters_of_several_bytes_are_never_split(served: Served) -> None:
    fields: dict[str, Any] = {"structured_outputs": {"choice": [SPELLED]}, "max_tokens": 200}
    assert served.chat(**fields)["choices"][0]["message"]["content"] == SPELLED
    told = ""
    for chunk in served.stream(**fields):
        told += text_of([chunk])
        assert SPELLED.startswith(told)
    assert told == SPELLED
    assert text_of(served.stream(TEXT, **fields)) == SPELLED


# -- clients that leave


def test_an_answer_that_nobody_reads_gives_its_slot_back_within_a_second(served: Served) -> None:
    """As many as there are slots are left in the middle: the next ones find them free."""
    body = {
        **{"model": ROUTE, "messages": [{"role": "user", "content": served.engine.endless}]},
        **{"max_tokens": 1500, "ignore_eos": True, "stream": True},
    }
    served.can(CHAT, "ignore_eos")
    alone = _first_token(served)
    for _ in range(3):
        left = [served.http.stream("POST", CHAT, json=body) for _ in range(4)]
        for one in left:
            reply = one.__enter__()
            assert reply.status_code == 200
            next(reply.iter_lines())
        for one in left:
            one.__exit__(None, None, None)
        assert _first_token(served) < alone + 1.0


def _first_token(served: Served) -> float:
    began = time.monotonic()
    served.chat(max_tokens=1)
    return time.monotonic() - began
