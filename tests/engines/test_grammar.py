"""Structured output of the transformers engine: the text always has the form that was asked for, and what
costs too much to compile or to follow is refused, while other streams go on."""

from __future__ import annotations

import asyncio
import json
import random
import re
import time
from collections.abc import AsyncIterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import jsonschema
import psutil
import pytest
import pytest_asyncio
import torch

from inference.engines.base import BadRequest, Delta, GenerationRequest, Sampling, Structured
from inference.engines.tool_forms import HERMES
from inference.engines.transformers.engine import TransformersEngine
from inference.engines.transformers.grammar import Grammar, Grammars
from inference.engines.transformers.lark import Lark
from inference.engines.transformers.trial import compile_grammar
from tests.engines.test_transformers_engine import serving, until
from tests.engines.tiny_model import make_tiny_llama

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["red", "blü", None, 7]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
DEEP: dict[str, Any] = {"type": "string"}
for _ in range(100):
    DEEP = {"type": "object", "properties": {"a": DEEP}}
EXPLODING = {"allOf": [{"type": "string", "pattern": f".*x{i}.*"} for i in range(40)]}
"""Its intersection takes a library that does not give up hours."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", context_length=4096)


@pytest_asyncio.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    async with serving(folder, slots=8) as engine:
        yield engine


def asking(structured: Structured | None, text: str = "Go", **sampling: Any) -> GenerationRequest:
    return GenerationRequest(
        request_id="r",
        messages=[{"role": "user", "content": text}],
        sampling=Sampling(**{"temperature": 1.5, **sampling}),
        structured=structured,
    )


async def answered(engine: TransformersEngine, request: GenerationRequest) -> list[Delta]:
    return [delta async for delta in engine.generate(request)]


async def formed(engine: TransformersEngine, **form: Any) -> str:
    """A whole text of this form; it ended by itself."""
    deltas = await answered(engine, asking(Structured(param="form", **form)))
    assert deltas[-1].finish_reason == "stop"
    return "".join(delta.text for delta in deltas)


async def refused(engine: TransformersEngine, **form: Any) -> BadRequest:
    with pytest.raises(BadRequest) as refusal:
        await answered(engine, asking(Structured(param="form", **form)))
    assert refusal.value.param == "form"
    return refusal.value


# -- every form


class Schemas:
    """Random schemas, all of them with an end."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)

    def schema(self, depth: int = 3) -> dict[str, Any]:
        simple = [self._string, self._number, self._enum, self._constant]
        deep = [self._object, self._array, self._any_of] if depth else []
        return self._random.choice([*simple, *deep, *deep])(depth)

    def _string(self, depth: int) -> dict[str, Any]:
        pick = self._random
        least = pick.randint(0, 3)
        return pick.choice(
            [
                {"type": "string", "minLength": least, "maxLength": least + pick.randint(0, 6)},
                {
                    "type": "string",
                    "pattern": pick.choice([r"^[a-z]{2,5}\d?$", r"^(ja|nein)$", r"^\d{3}-[A-F]$"]),
                },
                {"type": "string", "format": pick.choice(["date", "time", "ipv4", "uuid"])},
            ]
        )

    def _number(self, depth: int) -> dict[str, Any]:
        pick = self._random
        low = pick.randint(-1000, 1000)
        bounds = {"minimum": low, "maximum": low + pick.randint(0, 500)}
        return {"type": "integer", **bounds, **pick.choice([{}, {"multipleOf": 1}])}

    def _enum(self, depth: int) -> dict[str, Any]:
        values: list[Any] = ['ü\n"', "", 0, -1.5, None, True, [1, "two"], {"a": {}}]
        return {"enum": self._random.sample(values, self._random.randint(1, 4))}

    def _constant(self, depth: int) -> dict[str, Any]:
        return self._random.choice([{"type": "boolean"}, {"type": "null"}, {"const": "fixed"}])

    def _object(self, depth: int) -> dict[str, Any]:
        names = self._random.sample(
            ["a", "b c", "ü", "", "$ref", "type", "x" * 20], self._random.randint(0, 4)
        )
        return {
            "type": "object",
            "properties": {name: self.schema(depth - 1) for name in names},
            "required": [name for name in names if self._random.random() < 0.6],
            "additionalProperties": False,
        }

    def _array(self, depth: int) -> dict[str, Any]:
        least = self._random.randint(0, 2)
        return {
            "type": "array",
            "items": self.schema(depth - 1),
            "minItems": least,
            "maxItems": least + self._random.randint(0, 2),
        }

    def _any_of(self, depth: int) -> dict[str, Any]:
        return {"anyOf": [self.schema(depth - 1) for _ in range(self._random.randint(1, 3))]}


async def _all_valid(engine: TransformersEngine, count: int, seed: int) -> None:
    schemas = Schemas(seed)

    async def one(schema: dict[str, Any]) -> None:
        text = await formed(engine, schema=schema)
        jsonschema.validate(json.loads(text), schema, cls=jsonschema.Draft202012Validator)

    await asyncio.gather(*[one(schemas.schema()) for _ in range(count)])


async def test_hot_texts_of_random_schemas_are_valid(engine: TransformersEngine) -> None:
    await _all_valid(engine, 24, seed=1)


@pytest.mark.full
async def test_hot_texts_of_200_random_schemas_are_all_valid(engine: TransformersEngine) -> None:
    await _all_valid(engine, 200, seed=2)


async def test_any_object_is_an_object(engine: TransformersEngine) -> None:
    # Names and values of any length: some do not come to an end, but those that do are objects.
    form = Structured(param="response_format", schema={"type": "object"})
    ended = 0
    for deltas in await asyncio.gather(
        *[answered(engine, asking(form, f"{i}", max_tokens=300)) for i in range(4)]
    ):
        text = "".join(delta.text for delta in deltas)
        assert text.startswith("{")
        if deltas[-1].finish_reason == "stop":
            ended += 1
            assert isinstance(json.loads(text), dict)
    assert ended


@pytest.mark.parametrize(
    ("form", "pattern"),
    [
        ({"choices": ("yes", "no", "vielleicht\n…")}, "yes|no|vielleicht\n…"),
        ({"regex": r"[A-Z]{2}\d{1,3}/(ä|\")?"}, r"[A-Z]{2}\d{1,3}/(ä|\")?"),
        ({"grammar": 'start: "a" start? | B\nB: /[0-9]{2}/\n'}, r"a+|a*\d\d"),
        ({"grammar": 'root ::= "(" item* ")"\nitem ::= [0-4] | "x"\n'}, r"\([0-4x]*\)"),
        ({"schema": PERSON, "compact": True}, r'\{"name":"[^\n]*","age":\d+(,"tags":\[[^ ]*\])?\}'),
    ],
)
async def test_texts_have_the_form(engine: TransformersEngine, form: dict[str, Any], pattern: str) -> None:
    for text in await asyncio.gather(*[formed(engine, **form) for _ in range(8)]):
        assert re.fullmatch(pattern, text), text


async def test_likely_and_seeded_texts_have_their_form_too(engine: TransformersEngine) -> None:
    form = Structured(param="form", schema=PERSON)
    for sampling in (
        {"temperature": 0.0},
        {"seed": 5, "top_k": 3},
        {"top_p": 0.1},
        {"ignore_eos": True},
        {"min_tokens": 500},
    ):
        deltas = await answered(engine, asking(form, **sampling))
        assert deltas[-1].finish_reason == "stop", sampling
        jsonschema.validate(json.loads("".join(delta.text for delta in deltas)), PERSON)


async def test_texts_of_requests_that_had_to_begin_again_have_their_form(folder: Path) -> None:
    # Room for 512 tokens, while four requests want more together.
    schema = {"type": "array", "items": {"enum": ["abcdefgh"]}, "minItems": 14, "maxItems": 14}
    async with serving(folder, slots=4, context_length=512, kv_cache_bytes=512 * 256) as engine:
        for text in await asyncio.gather(*[formed(engine, schema=schema, compact=True) for _ in range(4)]):
            assert json.loads(text) == ["abcdefgh"] * 14


async def test_a_prompt_without_a_template_has_a_form_too(engine: TransformersEngine) -> None:
    request = GenerationRequest(
        request_id="r",
        prompt="Is it so? ",
        sampling=Sampling(),
        structured=Structured(param="structured_outputs.choice", choices=("yes", "no")),
    )
    deltas = await answered(engine, request)
    assert "".join(delta.text for delta in deltas) in ("yes", "no")


# -- refusals


@pytest.mark.parametrize(
    ("form", "reason"),
    [
        ({"schema": DEEP}, "deeper"),
        ({"schema": {"enum": ["x" * 70_000]}}, "too long"),
        ({"schema": {"type": "colour"}}, "colour"),
        ({"schema": {"type": "object", "dependentRequired": {}}}, "dependentRequired"),
        ({"schema": {"type": "string", "format": "colour"}}, "format"),
        ({"schema": {"$ref": "https://example.org/schema"}}, "example.org"),
        ({"schema": {"$ref": "file:///etc/passwd"}}, "etc/passwd"),
        ({"schema": {"$ref": "#"}}, "no text"),
        ({"schema": {"type": "integer", "minimum": 5, "maximum": 3}}, "minimum"),
        ({"schema": False}, "no text"),
        ({"schema": {"type": "string", "pattern": "(?=a)b"}}, "look-around"),
        ({"regex": "a?" * 8192}, "too long"),
        ({"regex": "(a"}, "unclosed"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "(a|b)?" * 650 + "c" * 100 + "(d|e?f)*" * 10 + "((x{1,1000}){1,1000}){1,1000}"}, ""),
        ({"grammar": "start: @nothing\n"}, "nothing"),
        ({"grammar": 'root ::= "a" |\n ( "b"'}, ""),
        ({"grammar": "root ::= a\n" + "".join(f"a{i} ::= a{i + 1}\n" for i in range(300))}, "256"),
        ({"choices": ("x" * 70_000,)}, "too long"),
    ],
)
async def test_what_has_no_end_no_meaning_or_no_bounds_is_refused_with_its_reason(
    engine: TransformersEngine, form: dict[str, Any], reason: str
) -> None:
    began = time.monotonic()
    error = await refused(engine, **form)
    assert reason in error.message
    assert len(error.message) < 500
    assert time.monotonic() - began < 10
    assert engine.healthy()


async def test_a_schema_that_explodes_is_refused_in_seconds_and_other_streams_go_on(
    engine: TransformersEngine,
) -> None:
    moments: list[float] = []

    async def stream() -> None:
        async for _ in engine.generate(asking(None, "other", ignore_eos=True, max_tokens=3000)):
            moments.append(time.monotonic())

    other = asyncio.create_task(stream())
    await until(lambda: len(moments) > 20, 20)
    began = time.monotonic()
    error = await refused(engine, schema=EXPLODING)
    assert "2 s" in error.message
    took = time.monotonic() - began
    await formed(engine, schema=PERSON)
    during = [moment for moment in moments if began < moment < began + took]
    gaps = [later - earlier for earlier, later in pairwise(during)]
    assert len(gaps) > 20
    assert max(gaps) < 1
    other.cancel()
    # It is remembered: nobody pays for it twice.
    began = time.monotonic()
    await refused(engine, schema=EXPLODING)
    assert time.monotonic() - began < 0.5


async def test_an_automaton_that_explodes_while_it_is_followed_ends_that_answer_alone(
    engine: TransformersEngine,
) -> None:
    other = asyncio.create_task(answered(engine, asking(None, "other", ignore_eos=True, max_tokens=300)))
    with pytest.raises(BadRequest) as refusal:
        await answered(engine, asking(Structured(param="form", regex="(((a{1,100}){1,100}){1,100}){60,100}")))
    assert "too much to follow" in refusal.value.message
    assert (await other)[-1].completion_tokens == 300
    assert engine.healthy()


async def test_a_client_that_leaves_while_its_schema_is_compiled_costs_no_other(
    engine: TransformersEngine,
) -> None:
    await formed(engine, schema=PERSON)
    left = asyncio.create_task(answered(engine, asking(Structured(param="form", schema=EXPLODING))))
    await asyncio.sleep(0.5)
    left.cancel()
    await asyncio.gather(left, return_exceptions=True)
    began = time.monotonic()
    await formed(engine, regex="[xyz]{3}")
    assert time.monotonic() - began < 10


async def test_closing_ends_the_process_that_compiles(folder: Path) -> None:
    async with serving(folder) as engine:
        await formed(engine, choices=("a", "b"))
        [child] = [
            one
            for one in psutil.Process().children()
            if "inference.engines.transformers.trial" in one.cmdline()
        ]
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


# -- cost


def test_a_mask_costs_little_at_the_size_of_real_vocabularies(folder: Path) -> None:
    tokenizer = (folder / "tokenizer.json").read_text()
    size = 50_000  # most have no text, and are forbidden
    grammars = Grammars(tokenizer, size=size, ends=[257])
    lark = Lark(HERMES, {}).of(Structured(param="form", schema=PERSON), None, after_thoughts=False)
    matcher = compile_grammar(grammars.tokenizer, lark)
    grammar = Grammar(matcher, grammars.tokenizer, ends=[257], param=None, thinking=None)
    took = 0.0
    for token in grammars.tokenizer.tokenize_bytes(b'{"name": "somebody", "age": 31}'):
        row = torch.zeros(size)
        began = time.thread_time()
        grammar.fill_mask(row)
        took += time.thread_time() - began
        assert row[token] == 0
        assert torch.isinf(row).sum() > size - 300
        grammar.accept(token)
    assert took / 31 < 0.002


def test_a_mask_is_the_same_in_other_kinds_of_numbers(folder: Path) -> None:
    grammars = Grammars((folder / "tokenizer.json").read_text(), size=258, ends=[257])
    lark = Lark(HERMES, {}).of(Structured(param="form", choices=("ab", "c")), None, after_thoughts=False)
    matcher = compile_grammar(grammars.tokenizer, lark)
    grammar = Grammar(matcher, grammars.tokenizer, ends=[257], param=None, thinking=None)
    rows = [torch.zeros(300, dtype=kind) for kind in (torch.float32, torch.bfloat16)]
    for row in rows:
        grammar.fill_mask(row)
    allowed = [torch.nonzero(row == 0).flatten().tolist() for row in rows]
    assert allowed[0] == allowed[1] == sorted(grammars.tokenizer.tokenize_bytes(b"ac"))
