"""Every field that steers an answer: honoured, or refused by its name, and seen to work where that shows."""

from __future__ import annotations

from typing import Any

import pytest

from tests.contract.serving import SAY, Served

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
WILD: dict[str, Any] = {"temperature": 1.5, "max_tokens": 12, "ignore_eos": True}
SCHEMA = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}

ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    **{
        name: (CHAT, {name: value})
        for name, value in {
            "temperature": 0.7,
            "top_p": 0.9,
            "top_k": 5,
            "min_p": 0.05,
            "seed": 11,
            "n": 2,
            "presence_penalty": 0.5,
            "frequency_penalty": -0.5,
            "repetition_penalty": 1.2,
            "logit_bias": {"5": -100},
            "stop": ["zz", "yy"],
            "stop_token_ids": [9],
            "include_stop_str_in_output": True,
            "ignore_eos": True,
            "min_tokens": 2,
            "bad_words": ["no"],
            "allowed_token_ids": [40, 41, 42],
            "length_penalty": 1.5,
            "use_beam_search": True,
            "skip_special_tokens": False,
            "spaces_between_special_tokens": False,
            "truncate_prompt_tokens": 8,
            "prompt_logprobs": 1,
            "logprobs": True,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "response_format": {"type": "json_object"},
            "structured_outputs": {"choice": ["a", "b"]},
            "guided_regex": "[ab]+",
            "add_special_tokens": True,
            "add_generation_prompt": False,
            "continue_final_message": True,
            "chat_template_kwargs": {"a": 1},
            "reasoning_effort": "low",
            "include_reasoning": False,
            "thinking_token_budget": 4,
            "documents": [{"title": "a", "text": "b"}],
            "modalities": ["text", "audio"],
            "verbosity": "low",
            "web_search_options": {},
            "repetition_detection": {"max_pattern_size": 4, "min_count": 3},
            "logprob_token_ids": [5],
        }.items()
    },
    "top_logprobs": (CHAT, {"logprobs": True, "top_logprobs": 2}),
    "tools": (CHAT, {"tools": [TOOL]}),
    "tool_choice": (CHAT, {"tools": [TOOL], "tool_choice": "required"}),
    "parallel_tool_calls": (CHAT, {"tools": [TOOL], "parallel_tool_calls": False}),
    "echo": (TEXT, {"echo": True}),
    "suffix": (TEXT, {"suffix": "end"}),
    "logprobs of a completion": (TEXT, {"logprobs": 2}),
}


@pytest.mark.parametrize("field", ASKED)
def test_a_field_is_honoured_or_refused_by_name(served: Served, field: str) -> None:
    path, fields = ASKED[field]
    name = field.partition(" ")[0]
    given = {"messages": SAY} if path == CHAT else {"prompt": "x"}
    served.can(path)
    reply = served.ask(path, **given, max_tokens=30, **fields)
    if reply.status_code == 200:
        assert reply.json()["choices"][0]["finish_reason"]
        return
    assert name not in served.engine.must, reply.text
    error = reply.json()["error"]
    assert (reply.status_code, error["type"]) == (400, "invalid_request_error")
    # Where one needs another, such as `top_logprobs`, that one may be what is refused.
    named = (name.removesuffix("_regex"), *fields)
    # A foreign server may name it in its words alone.
    foreign = served.engine.behind is not None and name in error["message"]
    assert (error["param"] or "").startswith(named) or foreign, error


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", "hot"),
        ("top_p", 0),
        ("top_p", 1.1),
        ("n", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("repetition_penalty", 0),
        ("min_p", 1.5),
        ("logit_bias", {"x": 1}),
        ("max_tokens", 0),
        ("stop", [""]),
        ("seed", 2**63),
        ("top_logprobs", 21),
        ("response_format", {"type": "poem"}),
        ("tool_choice", "required"),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(served: Served, field: str, value: Any) -> None:
    assert (served.refusal(**{field: value})["param"] or "").partition(".")[0].partition("[")[0] == field


def text(served: Served, **fields: Any) -> str:
    said: str = served.complete(**fields)["choices"][0]["text"]
    return said


def test_temperature_0_is_the_same_each_time(served: Served) -> None:
    assert len({text(served, **GREEDY) for _ in range(3)}) == 1


@pytest.mark.parametrize("only", [{"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}])
def test_what_leaves_only_the_likeliest_is_greedy(served: Served, only: dict[str, Any]) -> None:
    assert text(served, **WILD, **only) == text(served, **GREEDY)


def test_the_same_seed_gives_the_same_text(served: Served) -> None:
    fields = {**WILD, "max_tokens": 24}
    assert text(served, **fields, seed=1) == text(served, **fields, seed=1)
    if not served.simulated:  # whose words depend on the prompt alone
        assert len({text(served, **fields, seed=seed) for seed in range(4)}) > 1
    answer = [choice["text"] for choice in served.complete(**fields, seed=5, n=2)["choices"]]
    assert answer == [choice["text"] for choice in served.complete(**fields, seed=5, n=2)["choices"]]


def test_a_token_that_is_favoured_is_chosen_and_one_that_is_forbidden_is_not(served: Served) -> None:
    first = served.complete(**GREEDY, return_token_ids=True)["choices"][0]["token_ids"]
    favoured = served.complete(**GREEDY, logit_bias={"40": 100}, return_token_ids=True)
    assert favoured["choices"][0]["token_ids"] == [40] * 12
    forbidden = served.complete(**GREEDY, logit_bias={str(first[0]): -100}, return_token_ids=True)
    assert first[0] not in forbidden["choices"][0]["token_ids"]


def test_only_allowed_tokens_are_chosen(served: Served) -> None:
    answer = served.complete(**WILD, allowed_token_ids=[40, 41], return_token_ids=True)
    assert set(answer["choices"][0]["token_ids"]) <= {40, 41}


@pytest.mark.parametrize(
    "penalty", [{"presence_penalty": 2.0}, {"frequency_penalty": 2.0}, {"repetition_penalty": 1.9}]
)
def test_a_penalty_makes_repeating_rarer(served: Served, penalty: dict[str, float]) -> None:
    if served.simulated:
        pytest.skip("its words do not depend on it")
    fields = {"temperature": 0, "max_tokens": 60, "ignore_eos": True, "return_token_ids": True}
    plain = served.complete(**fields)["choices"][0]["token_ids"]
    ids = served.complete(**fields, **penalty)["choices"][0]["token_ids"]
    assert len(set(ids)) > len(set(plain))


def test_a_stop_token_ends_the_answer(served: Served) -> None:
    ids = served.complete(**GREEDY, return_token_ids=True)["choices"][0]["token_ids"]
    answer = served.complete(**GREEDY, stop_token_ids=[ids[4]])
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == ids.index(ids[4]) + 1


# -- probabilities


def test_chosen_tokens_have_their_bytes_and_what_else_was_likely(served: Served) -> None:
    answer = served.chat(**GREEDY, logprobs=True, top_logprobs=3)
    [choice] = answer["choices"]
    assert set(choice["logprobs"]) == {"content", "refusal"}
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == answer["usage"]["completion_tokens"]
    spelled = b"".join(bytes(token["bytes"]) for token in tokens)
    assert spelled.decode("utf-8", "replace") == choice["message"]["content"]
    for token in tokens:
        assert set(token) == {"token", "logprob", "bytes", "top_logprobs"}
        likely = [top["logprob"] for top in token["top_logprobs"]]
        assert len(likely) == 3
        assert likely == sorted(likely, reverse=True)
        # At temperature 0 it is the likeliest.
        assert token["logprob"] == pytest.approx(likely[0], abs=1e-4)
        assert token["logprob"] <= 0
        assert all(set(top) == {"token", "logprob", "bytes"} for top in token["top_logprobs"])


def test_streamed_probabilities_join_to_the_whole_ones(served: Served) -> None:
    whole = served.chat(**GREEDY, logprobs=True, top_logprobs=2)["choices"][0]["logprobs"]["content"]
    chunks = served.stream(**GREEDY, logprobs=True, top_logprobs=2)
    parts = [
        token
        for chunk in chunks
        for choice in chunk["choices"]
        for token in (choice.get("logprobs") or {}).get("content") or ()
    ]
    assert [token["token"] for token in parts] == [token["token"] for token in whole]
    assert all(len(token["top_logprobs"]) == 2 for token in parts)


def test_probabilities_of_a_completion(served: Served) -> None:
    fields = {"temperature": 0, "max_tokens": 4, "ignore_eos": True, "logprobs": 2}
    [choice] = served.complete(**fields)["choices"]
    told = choice["logprobs"]
    assert set(told) == {"tokens", "token_logprobs", "top_logprobs", "text_offset"}
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 4
    assert told["text_offset"][0] == 0
    assert all(one >= 2 for one in map(len, told["top_logprobs"])) or "\ufffd" in choice["text"]
    [echoed] = served.complete(**fields, echo=True)["choices"]
    assert echoed["logprobs"]["token_logprobs"][0] is None
    assert len(echoed["logprobs"]["tokens"]) > 4


def test_probabilities_of_the_prompt(served: Served) -> None:
    """As vLLM tells them: for each token of the prompt but the first, by id, itself and the likeliest."""
    answer = served.complete(prompt="Once upon", max_tokens=1, prompt_logprobs=2)
    told = answer["choices"][0]["prompt_logprobs"]
    assert told[0] is None
    assert len(told) == answer["usage"]["prompt_tokens"]
    for position in told[1:]:
        assert 2 <= len(position) <= 3
        for one in position.values():
            assert set(one) == {"logprob", "rank", "decoded_token"}
            assert one["logprob"] <= 0
            assert one["rank"] >= 1
        assert 1 in [one["rank"] for one in position.values()]
    ids = served.complete(prompt="Once upon", max_tokens=1, return_token_ids=True)["choices"][0]
    echoed = served.complete(prompt="Once upon", max_tokens=1, echo=True, logprobs=0)["choices"][0]
    pairs = zip(told[1:], ids["prompt_token_ids"][1:], strict=True)
    own = [position[str(id_)]["logprob"] for position, id_ in pairs]
    assert own == pytest.approx(echoed["logprobs"]["token_logprobs"][1 : len(told)], abs=1e-3)
    chat = served.chat(max_tokens=1, prompt_logprobs=0)
    assert len(chat["prompt_logprobs"]) == chat["usage"]["prompt_tokens"]
    assert served.refusal(prompt_logprobs=1, stream=True)["param"] == "prompt_logprobs"
