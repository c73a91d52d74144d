"""Issue 6: what a request may ask of the tokens of the `transformers` engine, on a tiny random model."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import httpx
import pytest
import torch

from inference.engines.app import EngineApp
from inference.engines.base import BadRequest, Delta, EngineError, GenerationRequest, Sampling, Token
from inference.engines.transformers.answer import Answer
from inference.engines.transformers.chance import seeded
from inference.engines.transformers.engine import TransformersEngine
from inference.engines.transformers.likely import Likely
from inference.engines.transformers.sampling import Choice, Row, choose
from inference.engines.transformers.text import Vocabulary
from tests.engines.test_transformers_engine import (
    GREEDY,
    Reference,
    ask,
    deltas,
    folder,
    reference,
    serving,
    until,
)

__all__ = ["folder", "reference"]  # fixtures

HOT = {"temperature": 2.0}


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    async with serving(folder, slots=8) as engine:
        yield engine


def told(request: GenerationRequest, top: int | None = None) -> GenerationRequest:
    """With its tokens told."""
    return replace(request, token_ids=True, top_logprobs=top)


def tokens_in(got: list[Delta]) -> list[Token]:
    return [token for delta in got if delta.detail is not None for token in delta.detail.tokens]


def text_of(got: list[Delta]) -> str:
    return "".join(delta.text for delta in got)


async def ids_of(engine: TransformersEngine, text: str, **sampling: Any) -> list[int]:
    return [token.id for token in tokens_in(await deltas(engine, told(ask(text, **sampling))))]


# -- through HTTP: what the engine announces, it honours

Answered = dict[str, Any]


@pytest.fixture
async def http(engine: TransformersEngine) -> AsyncIterator[httpx.AsyncClient]:
    app = EngineApp(engine, slots=8, served_name="tiny")
    app.ready = True
    transport = httpx.ASGITransport(app.asgi)  # type: ignore[arg-type]
    async with httpx.AsyncClient(transport=transport, base_url="http://engine") as client:
        yield client


async def complete(http: httpx.AsyncClient, **fields: Any) -> Answered:
    body = {"prompt": "A signal is", "max_tokens": 24, "temperature": 0, "return_token_ids": True, **fields}
    reply = await http.post("/v1/completions", json=body)
    assert reply.status_code == 200, reply.text
    answered: Answered = reply.json()
    return answered


async def chat(http: httpx.AsyncClient, **fields: Any) -> Answered:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
    body = {"messages": messages, "max_tokens": 8, "temperature": 0, **fields}
    reply = await http.post("/v1/chat/completions", json=body)
    assert reply.status_code == 200, reply.text
    answered: Answered = reply.json()
    return answered


def ids(answered: Answered) -> list[int]:
    found: list[int] = answered["choices"][0]["token_ids"]
    return found


def text(answered: Answered) -> str:
    found: str = answered["choices"][0]["text"]
    return found


def prompt_tokens(answered: Answered) -> int:
    return int(answered["usage"]["prompt_tokens"])


def a_stop(plain: Answered) -> str:
    return text(plain)[3:5]


def before_stop(plain: Answered) -> str:
    return text(plain)[: text(plain).index(a_stop(plain))]


Asks = Callable[[Answered], dict[str, Any]]
"""Given the greedy answer, the fields that ask for another."""
Honours = Callable[[Answered, Answered], bool]
"""Whether the second answer, beside the greedy one, is what was asked for."""

OF_COMPLETIONS: dict[str, tuple[Asks, Honours]] = {
    "temperature": (lambda plain: HOT, lambda plain, got: ids(got) != ids(plain)),
    "top_p": (lambda plain: {**HOT, "top_p": 0.0}, lambda plain, got: ids(got) == ids(plain)),
    "top_k": (lambda plain: {**HOT, "top_k": 1}, lambda plain, got: ids(got) == ids(plain)),
    "min_p": (lambda plain: {**HOT, "min_p": 1.0}, lambda plain, got: ids(got) == ids(plain)),
    "presence_penalty": (
        lambda plain: {"presence_penalty": 2.0, "max_tokens": 100},
        lambda plain, got: ids(got)[:24] != ids(plain),
    ),
    "frequency_penalty": (
        lambda plain: {"frequency_penalty": -2.0, "max_tokens": 100},
        lambda plain, got: len(set(ids(got)[80:])) == 1,
    ),
    "repetition_penalty": (
        lambda plain: {"repetition_penalty": 10.0},
        lambda plain, got: len(set(ids(got))) == 24 > len(set(ids(plain))),
    ),
    "logit_bias": (
        lambda plain: {"logit_bias": {str(ids(plain)[0]): -100}},
        lambda plain, got: ids(plain)[0] not in ids(got),
    ),
    "allowed_token_ids": (
        lambda plain: {**HOT, "allowed_token_ids": [65, 66]},
        lambda plain, got: set(ids(got)) == {65, 66},
    ),
    "bad_words": (
        lambda plain: {"bad_words": ["LR"], "max_tokens": 9},
        lambda plain, got: ids(got)[:8] == ids(plain)[:8] and "LR" in text(plain) and "LR" not in text(got),
    ),
    "stop": (
        lambda plain: {"stop": [a_stop(plain)]},
        lambda plain, got: (
            text(got) == before_stop(plain) and got["choices"][0]["stop_reason"] == a_stop(plain)
        ),
    ),
    "include_stop_str_in_output": (
        lambda plain: {"stop": [a_stop(plain)], "include_stop_str_in_output": True},
        lambda plain, got: text(got) == before_stop(plain) + a_stop(plain),
    ),
    "stop_token_ids": (
        lambda plain: {"stop_token_ids": [ids(plain)[1]]},
        lambda plain, got: ids(got) == ids(plain)[:2] and got["choices"][0]["stop_reason"] == ids(plain)[1],
    ),
    "min_tokens": (
        lambda plain: {"stop_token_ids": [ids(plain)[1]], "min_tokens": 5},
        lambda plain, got: ids(plain)[1] not in ids(got)[:5],
    ),
    "ignore_eos": (
        lambda plain: {"ignore_eos": True, "logit_bias": {"257": 100}},
        lambda plain, got: ids(got) == [257] * 24,
    ),
    "n": (lambda plain: {"n": 3}, lambda plain, got: len(got["choices"]) == 3),
    "echo": (lambda plain: {"echo": True}, lambda plain, got: text(got) == "A signal is" + text(plain)),
    "logprobs": (
        lambda plain: {"logprobs": 2},
        lambda plain, got: [len(one) for one in got["choices"][0]["logprobs"]["top_logprobs"]] == [2] * 24,
    ),
    "return_token_ids": (lambda plain: {}, lambda plain, got: len(ids(got)) == 24),
    "prompt_logprobs": (
        lambda plain: {"prompt_logprobs": 1},
        lambda plain, got: len(got["choices"][0]["prompt_logprobs"]) == prompt_tokens(got),
    ),
}
OF_CHAT: dict[str, tuple[dict[str, Any], Honours]] = {
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 3},
        lambda plain, got: (
            [len(one["top_logprobs"]) for one in got["choices"][0]["logprobs"]["content"]] == [3] * 8
        ),
    ),
    "add_generation_prompt": (
        {"add_generation_prompt": False},
        lambda plain, got: prompt_tokens(got) < prompt_tokens(plain),
    ),
    "continue_final_message": (
        {"continue_final_message": True},
        lambda plain, got: prompt_tokens(got) < prompt_tokens(plain),
    ),
    "chat_template_kwargs": (
        {"chat_template_kwargs": {"add": "x"}},
        lambda plain, got: prompt_tokens(got) == prompt_tokens(plain),
    ),
}
OF_OTHER_TESTS = {
    *("seed", "continue_token_ids"),
    *("response_format", "structured_outputs", "reasoning_effort"),
    *("tools", "tool_choice", "parallel_tool_calls"),
}


async def test_every_field_that_is_announced_is_honoured(
    engine: TransformersEngine, http: httpx.AsyncClient
) -> None:
    fields = {name.partition(".")[0] for name in engine.capabilities if ":" not in name}
    announced = fields - OF_OTHER_TESTS
    assert announced == OF_COMPLETIONS.keys() | OF_CHAT.keys()
    plain = await complete(http)
    for name, (asks, honours) in OF_COMPLETIONS.items():
        assert honours(plain, await complete(http, **asks(plain))), name
    plain = await chat(http)
    for name, (asked, honours) in OF_CHAT.items():
        assert honours(plain, await chat(http, **asked)), name


@pytest.mark.parametrize(
    "wrong",
    [
        {"logit_bias": {"258": 1}},
        {"logit_bias": {"word": 1}},
        {"logit_bias": {"5": 101}},
        {"stop_token_ids": [258]},
        {"allowed_token_ids": []},
        {"allowed_token_ids": [2**31]},
        {"min_tokens": -1},
        {"min_p": 1.1},
        {"repetition_penalty": 0},
        {"presence_penalty": -2.1},
        {"seed": 0.5},
        {"bad_words": [""]},
        {"logprobs": 21},
    ],
)
async def test_a_wrong_value_is_refused_by_name(http: httpx.AsyncClient, wrong: dict[str, Any]) -> None:
    reply = await http.post("/v1/completions", json={"prompt": "x", **wrong})
    assert reply.status_code == 400
    assert reply.json()["error"]["param"].split(".")[0].split("[")[0] == next(iter(wrong))


# -- as transformers itself has it


@pytest.mark.parametrize(
    ("sampling", "options"),
    [
        ({"repetition_penalty": 1.3}, {"repetition_penalty": 1.3}),
        ({"repetition_penalty": 0.8}, {"repetition_penalty": 0.8}),
        (
            {"min_tokens": 9, "stop_token_ids": (241, 18)},
            {"min_new_tokens": 9, "eos_token_id": [241, 18, 257]},
        ),
        ({"bad_words": ("t", "LR")}, {"bad_words_ids": [[83], [43, 49]]}),
    ],
)
async def test_greedy_answers_equal_generate_with_the_same_rules(
    engine: TransformersEngine, reference: Reference, sampling: dict[str, Any], options: dict[str, Any]
) -> None:
    prompts = ["one", "two two two", "a third prompt"]
    got = await asyncio.gather(*[ids_of(engine, p, max_tokens=40, **GREEDY, **sampling) for p in prompts])
    assert got == [reference.ids(prompt, 40, **options) for prompt in prompts]
    assert got != [reference.ids(prompt, 40) for prompt in prompts]


async def test_penalties_count_what_was_generated_and_not_the_prompt(
    engine: TransformersEngine, reference: Reference
) -> None:
    """Against the formula, step by step over the model's own scores."""
    messages = [{"role": "user", "content": "count count"}]
    prompt = [token for token, _ in await engine.tokenize(messages, special_tokens=False)]
    wanted: list[int] = []
    for _ in range(40):
        with torch.no_grad():
            scores = reference.model(torch.tensor([prompt + wanted])).logits[0, -1]
        for token in set(wanted):
            scores[token] -= 0.7 + 0.3 * wanted.count(token)
        scores[65] += 2.5
        wanted.append(int(scores.argmax()))
    penalties = {"presence_penalty": 0.7, "frequency_penalty": 0.3, "logit_bias": {65: 2.5}}
    got = await ids_of(engine, "count count", max_tokens=40, ignore_eos=True, **GREEDY, **penalties)
    assert got == wanted


def test_min_p_leaves_out_what_is_less_likely_than_its_share_of_the_likeliest() -> None:
    torch.manual_seed(0)
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    for extra in ({}, {"top_p": 0.99}):
        choice = Choice(**{"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.35, **extra})
        drawn = choose(probabilities.log().repeat(20_000, 1), [choice] * 20_000).argmax(-1)
        shares = torch.bincount(drawn, minlength=4) / 20_000
        assert torch.allclose(shares, torch.tensor([0.625, 0.375, 0, 0]), atol=0.02)


# -- seeds

MANNERS: list[dict[str, Any]] = [
    {},
    {"top_k": 40},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"repetition_penalty": 1.2},
]


async def test_the_same_seed_gives_the_same_text_alone_and_among_others(engine: TransformersEngine) -> None:
    seeded = [{**HOT, **manner, "seed": 3, "max_tokens": 40, "ignore_eos": True} for manner in MANNERS]
    alone = [await ids_of(engine, "seed", **one) for one in seeded]
    others = [ids_of(engine, "else " * at, max_tokens=50, top_p=0.5 + at / 10) for at in range(3)]
    among = (await asyncio.gather(*[ids_of(engine, "seed", **one) for one in seeded], *others))[: len(seeded)]
    assert among == alone
    assert len({tuple(one) for one in alone}) > 1
    assert await ids_of(engine, "seed", **{**seeded[0], "seed": 4}) != alone[0]


async def test_every_sample_of_a_seed_has_a_text_of_its_own(http: httpx.AsyncClient) -> None:
    first, second = [await complete(http, **HOT, seed=2**63 - 1, n=3) for _ in range(2)]
    texts = [choice["text"] for choice in first["choices"]]
    assert [choice["text"] for choice in second["choices"]] == texts
    assert len(set(texts)) == 3


def test_numbers_of_seeds_are_even_and_unlike_from_seed_to_seed_and_place_to_place() -> None:
    numbers = torch.tensor([[seeded(seed, place) for place in range(2000)] for seed in range(-8, 8)])
    assert 0 <= numbers.min() < 0.001
    assert 0.999 < numbers.max() < 1
    assert torch.allclose(torch.histc(numbers, 10, 0, 1) / numbers.numel(), torch.tensor(0.1), atol=0.01)
    assert torch.corrcoef(numbers).fill_diagonal_(0).abs().max() < 0.12
    assert numbers.unique().numel() > 0.99 * numbers.numel()


# -- logarithmic probabilities


def truth(reference: Reference, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return reference.model(torch.tensor([ids])).logits[0].log_softmax(-1)  # type: ignore[no-any-return]


async def test_logprobs_are_the_models_own_whatever_is_done_to_them(
    engine: TransformersEngine, reference: Reference
) -> None:
    request = told(ask("how likely", max_tokens=30, seed=1, presence_penalty=2.0, top_k=50, **HOT), top=4)
    got = await deltas(engine, request)
    tokens = tokens_in(got)
    assert got[0].detail is not None
    prompt = list(got[0].detail.prompt_token_ids or ())
    expected = truth(reference, prompt + [token.id for token in tokens])[len(prompt) - 1 : -1]
    assert len(tokens) == got[-1].completion_tokens
    for token, row in zip(tokens, expected, strict=True):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        values, best = row.topk(4)
        assert [one.id for one in token.top] == best.tolist()
        assert [one.logprob for one in token.top] == pytest.approx(values.tolist(), abs=1e-4)
    assert "".join(token.text for token in tokens) == text_of(got)


async def test_tokens_tell_their_bytes(engine: TransformersEngine, reference: Reference) -> None:
    got = await deltas(engine, told(ask("bytes", max_tokens=200, ignore_eos=True, **HOT), top=2))
    tokens = tokens_in(got)
    whole = b"".join(token.raw for token in tokens)
    ids = [token.id for token in tokens]
    assert whole.decode(errors="replace") == reference.tokenizer.decode(ids, skip_special_tokens=True)
    others = [one for token in tokens for one in token.top if one.id != token.id]
    assert all(one.raw.decode(errors="replace") == one.text for one in others)


async def test_nothing_of_a_stop_string_is_told_with_its_tokens(engine: TransformersEngine) -> None:
    whole = await deltas(engine, told(ask("stop here", max_tokens=60, **GREEDY), top=0))
    stop = text_of(whole)[20:25]
    got = await deltas(engine, told(ask("stop here", max_tokens=60, stop=(stop,), **GREEDY), top=0))
    assert text_of(got) == text_of(whole)[: text_of(whole).index(stop)]
    assert "".join(token.text for token in tokens_in(got)) == text_of(got)
    shown = [token.id for token in tokens_in(got)]
    assert shown == [token.id for token in tokens_in(whole)][: len(shown)]
    assert len(shown) < got[-1].completion_tokens


def test_of_a_token_in_which_a_stop_string_begins_only_what_is_before_it_is_told() -> None:
    class Words:
        special: frozenset[int] = frozenset()

        def text(self, ids: list[int]) -> str:
            return "".join(("one ", "two<st", "op>", "three")[id_] for id_ in ids)

        def raw(self, id_: int) -> bytes:
            return self.text([id_]).encode()

    request = told(ask("x", stop=("<stop>",)), top=2)
    answer = Answer(request, cast(Vocabulary, Words()), frozenset(), prompt=[7])
    likely = [Likely(-0.5, [(id_, -0.5), (3, -1.5)]) for id_ in range(3)]
    got = [answer.take(id_, last=False, likely=likely[id_]) for id_ in range(3)]
    tokens = tokens_in([delta for delta in got if delta is not None])
    assert [(token.id, token.text, token.raw) for token in tokens] == [
        (0, "one ", b"one "),
        (1, "two", b"two"),
    ]
    assert [one.text for token in tokens for one in token.top] == ["one ", "three", "two", "three"]
    assert [delta.text if delta else None for delta in got] == ["one ", "two", ""]
    assert got[2] is not None
    assert got[2].stop == "<stop>"


async def test_the_token_that_ends_an_answer_is_told_without_text(engine: TransformersEngine) -> None:
    plain = tokens_in(await deltas(engine, told(ask("end", max_tokens=20, **GREEDY))))
    end = plain[9].id
    got = await deltas(engine, told(ask("end", max_tokens=20, stop_token_ids=(end,), **GREEDY), top=1))
    assert (got[-1].finish_reason, got[-1].stop) == ("stop", end)
    assert tokens_in(got)[-1].id == end
    assert tokens_in(got)[-1].text in ("", "\N{REPLACEMENT CHARACTER}")
    assert tokens_in(got)[-1].logprob is not None


@pytest.mark.parametrize("length", [2, 40, 300])
async def test_an_echoed_prompt_is_told_as_a_forward_pass_has_it(
    engine: TransformersEngine, reference: Reference, length: int
) -> None:
    ids = [(7 * at) % 256 for at in range(length)]
    request = GenerationRequest(
        request_id="r", prompt=ids, echo=True, token_ids=True, top_logprobs=2, sampling=Sampling(max_tokens=3)
    )
    busy = [asyncio.create_task(ids_of(engine, f"{at}", ignore_eos=True)) for at in range(2)]
    await until(lambda: engine.load_report().running == 2)
    got = await deltas(engine, request)
    for task in busy:
        task.cancel()
    tokens = tokens_in(got)
    expected = truth(reference, [token.id for token in tokens])
    assert [token.id for token in tokens[:length]] == ids
    assert (tokens[0].logprob, tokens[0].top) == (None, ())
    for token, row in zip(tokens[1:], expected, strict=False):
        assert token.logprob == pytest.approx(float(row[token.id]), abs=1e-4)
        assert [one.logprob for one in token.top] == pytest.approx(row.topk(2).values.tolist(), abs=1e-4)
    assert "".join(token.text for token in tokens[:length]) == got[0].text


async def test_a_prompt_alone_is_told_as_evaluations_ask_for_it(http: httpx.AsyncClient) -> None:
    prompts = ["The ship leaves.", "ü 🚂"]
    answered = await complete(http, prompt=prompts, max_tokens=0, echo=True, logprobs=1)
    for prompt, choice in zip(prompts, answered["choices"], strict=True):
        logprobs = choice["logprobs"]
        assert choice["text"] == "".join(logprobs["tokens"]) == prompt
        assert logprobs["token_logprobs"][0] is None
        assert all(value < 0 for value in logprobs["token_logprobs"][1:])
        assert logprobs["text_offset"][-1] < len(prompt) == len(choice["text"])
        # An evaluation sees from these whether the text is what the model would have said.
        for token, value, top in list(
            zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
        )[1:]:
            assert top[token] == value
            assert len(top) in (1, 2)


async def test_a_client_that_leaves_while_its_prompt_is_read_leaves_nothing_behind(
    engine: TransformersEngine,
) -> None:
    request = GenerationRequest(
        request_id="r", prompt=[1] * 500, echo=True, top_logprobs=0, sampling=Sampling(max_tokens=3)
    )
    reading = [asyncio.create_task(deltas(engine, request)) for _ in range(8)]
    await asyncio.sleep(0.01)
    for task in reading:
        task.cancel()
    await asyncio.gather(*reading, return_exceptions=True)
    assert len(await ids_of(engine, "after", max_tokens=5, ignore_eos=True)) == 5
    assert engine.load_report().running == 0


# -- form, and rows that fail


class Even:
    """Only even tokens, and it remembers which they were."""

    def __init__(self) -> None:
        self.accepted: list[int] = []

    def fill_mask(self, logits_row: torch.Tensor) -> None:
        logits_row[1::2] = -math.inf

    def accept(self, token: int) -> None:
        self.accepted.append(token)


class Broken(Even):
    def accept(self, token: int) -> None:
        raise KeyError(token)


class Nothing(Even):
    def fill_mask(self, logits_row: torch.Tensor) -> None:
        logits_row.fill_(-math.inf)


class Short(Even):
    """Three tokens, and the end."""

    def fill_mask(self, logits_row: torch.Tensor) -> None:
        if len(self.accepted) == 3:
            logits_row[:256] = -math.inf
            logits_row[257] = -math.inf
        else:
            logits_row[256:] = -math.inf


async def formed(engine: TransformersEngine, grammar: Even, max_tokens: int = 30, **rules: Any) -> list[int]:
    """The answer of a request with a grammar, as the batcher gives it."""
    choice = Choice(temperature=2.0, top_p=1.0, top_k=0, grammar=grammar, **rules)
    batcher = engine._serving.batcher  # type: ignore[union-attr]
    ticket = batcher.submit([1, 2, 3], max_tokens=max_tokens, eos=frozenset(choice.ends), choice=choice)
    tokens: list[int] = []
    last = False
    while not last:
        fresh, last = await ticket.next()
        tokens += fresh
    return tokens


async def test_a_grammar_forbids_tokens_and_is_told_each_one_once(engine: TransformersEngine) -> None:
    grammars = [Even() for _ in range(4)]
    got = await asyncio.gather(*[formed(engine, grammar) for grammar in grammars])
    for grammar, tokens in zip(grammars, got, strict=True):
        assert all(token % 2 == 0 for token in tokens)
        assert grammar.accepted == tokens[:-1]


async def test_an_answer_ends_with_its_form_however_many_tokens_it_should_have(
    engine: TransformersEngine,
) -> None:
    assert len(await formed(engine, Short(), min_tokens=10, ends=(256,))) == 4


async def test_a_grammar_that_breaks_fails_its_own_request_only(engine: TransformersEngine) -> None:
    *others, broken, stuck = await asyncio.gather(
        ids_of(engine, "one", max_tokens=30, ignore_eos=True),
        ids_of(engine, "two", max_tokens=30, ignore_eos=True, presence_penalty=1.0),
        formed(engine, Even()),
        formed(engine, Broken()),
        formed(engine, Nothing()),
        return_exceptions=True,
    )
    assert [len(tokens) for tokens in others if isinstance(tokens, list)] == [30] * 3
    assert isinstance(broken, EngineError)
    assert not isinstance(broken, BadRequest)
    assert isinstance(stuck, BadRequest)
    await until(lambda: engine.load_report().running == 0)
    assert engine.healthy()


async def test_rules_that_leave_no_token_are_told_and_the_engine_lives_on(engine: TransformersEngine) -> None:
    impossible = {"allowed_token_ids": (65,), "stop_token_ids": (65,), "min_tokens": 3}
    with pytest.raises(BadRequest, match="leaves no token"):
        await ids_of(engine, "x", **impossible)
    assert len(await ids_of(engine, "x", max_tokens=5, ignore_eos=True)) == 5


async def test_requests_that_make_room_for_others_go_on_as_if_they_had_not(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Room for 512 tokens, while five requests want more than 1000: they begin again with what they have."""
    begun_again: list[Row] = []
    copied = Row.__deepcopy__
    monkeypatch.setattr(Row, "__deepcopy__", lambda row, memo: begun_again.append(row) or copied(row, memo))
    asked: list[dict[str, Any]] = [
        {**HOT, "seed": 5, "top_p": 0.95},
        {**HOT, "seed": 5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
        {**GREEDY, "presence_penalty": 0.5, "min_tokens": 100},
        {**GREEDY, "frequency_penalty": 0.2},
    ]

    def request(at: int) -> GenerationRequest:
        return told(ask(f"prompt {at}", max_tokens=200, ignore_eos=True, **asked[at]), top=1)

    async with serving(folder, slots=4) as engine:
        alone = [tokens_in(await deltas(engine, request(at))) for at in range(4)]
    async with serving(folder, slots=5, kv_cache_bytes=512 * 256) as engine:
        grammar = Even()
        *crowded, even = await asyncio.gather(
            *[deltas(engine, request(at)) for at in range(4)], formed(engine, grammar, 200)
        )
    for got, wanted in zip(crowded, alone, strict=True):
        assert [token.id for token in tokens_in(got)] == [token.id for token in wanted]
        assert [token.logprob for token in tokens_in(got)] == pytest.approx(
            [token.logprob for token in wanted], abs=1e-3
        )
    assert grammar.accepted == even[:-1]
    assert len(set(begun_again)) > 1


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_scores_that_are_no_numbers_still_give_a_token(broken: float) -> None:
    choices = [
        Choice(temperature=1.0, top_p=top_p, top_k=top_k, min_p=min_p)
        for top_p in (1.0, 0.5)
        for top_k in (0, 3)
        for min_p in (0.0, 0.1)
    ]
    for some in (slice(0, 8), slice(0, 1)):
        scores = torch.zeros(len(choices), 8)
        scores[:, some] = broken
        assert all(0 <= token < 8 for token in choose(scores, choices).argmax(-1).tolist())
