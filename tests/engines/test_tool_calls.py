"""Calls of functions and thoughts of the transformers engine, on a tiny random model: a call that must be is
there and fits its schema, by grammar and not by luck."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest
import torch
from transformers import AutoTokenizer

from inference.engines.app import EngineApp
from inference.engines.base import BadRequest, Delta, GenerationRequest, LoadError, Sampling, Structured
from inference.engines.base import Tools as Wanted
from inference.engines.reasoning import Thoughts
from inference.engines.tool_forms import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, Form
from inference.engines.tools import CallParser
from inference.engines.transformers.answer import Answer
from inference.engines.transformers.engine import TransformersEngine
from inference.engines.transformers.grammar import Grammar, Grammars, Thinking
from inference.engines.transformers.lark import Lark
from inference.engines.transformers.prompt import Prompts
from inference.engines.transformers.text import Vocabulary
from inference.engines.transformers.trial import compile_grammar
from inference.protocol import Cause
from tests.engines.test_transformers_engine import serving, smollm2
from tests.engines.tiny_model import CHAT_TEMPLATE, make_tiny_llama, make_tiny_tokenizer

__all__ = ["smollm2"]  # a fixture

CONTROLS = ("[TOOL_CALLS]", "[ARGS]", "<|python_tag|>", "<think>", "</think>")
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 8},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
    },
    "required": ["city", "days"],
    "additionalProperties": False,
}
EMPTY: dict[str, Any] = {"type": "object", "maxProperties": 0}
SCHEMAS = {"get_weather": CITY, "get": EMPTY}
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": CITY}}
TOOLS = [WEATHER, {"type": "function", "function": {"name": "get", "description": "Gets."}}]

_TELLING = "{% for tool in tools or [] %}{{ tool | tojson }}{% endfor %}" + CHAT_TEMPLATE
TEMPLATES = {
    "hermes": "{# <tool_call> #}" + _TELLING,
    "llama3_json": "{# <|python_tag|> #}" + _TELLING,
    "mistral": "{# [TOOL_CALLS] [ #}" + _TELLING,
    "mistral_args": "{# [TOOL_CALLS] [ARGS] #}" + _TELLING,
    "none": CHAT_TEMPLATE,
}
THINKING = "{# </think> #}" + _TELLING + "{% if add_generation_prompt %}<think>\n{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tools") / "model", context_length=2048, controls=CONTROLS)


@asynccontextmanager
async def speaking(
    folder: Path, template: str
) -> AsyncIterator[tuple[TransformersEngine, httpx.AsyncClient]]:
    async with serving(folder, slots=8, template=template) as engine:
        app = EngineApp(engine, slots=8, served_name="tiny")
        app.ready = True
        transport = httpx.ASGITransport(app.asgi)  # type: ignore[arg-type]
        async with httpx.AsyncClient(transport=transport, base_url="http://engine", timeout=60) as client:
            yield engine, client


def body(**fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": "The weather?"}]
    return {"messages": messages, "temperature": 1.5, "tools": TOOLS, **fields}


async def post(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    reply = await http.post("/v1/chat/completions", json=body(**fields))
    assert reply.status_code == 200, reply.text
    answer: dict[str, Any] = reply.json()
    return answer


def check(call: dict[str, Any]) -> None:
    assert call["type"] == "function"
    jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])


# -- forced calls


@pytest.mark.parametrize("form", TEMPLATES)
async def test_a_call_that_must_be_is_always_there_and_valid(folder: Path, form: str) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    async with speaking(folder, TEMPLATES[form]) as (engine, http):
        assert engine.tool_form.name == form.replace("none", "hermes")
        asked: list[dict[str, Any]] = [
            *({"tool_choice": "required", "parallel_tool_calls": False},) * 3,
            *({"tool_choice": named},) * 2,
            {"tool_choice": "required", "temperature": 0, "parallel_tool_calls": False},
        ]
        answers = await asyncio.gather(*[post(http, **fields) for fields in asked])
        for fields, answer in zip(asked, answers, strict=True):
            [choice] = answer["choices"]
            [call] = choice["message"]["tool_calls"]
            check(call)
            assert choice["message"]["content"] is None
            if fields["tool_choice"] is named:
                assert call["function"]["name"] == "get_weather"
                assert choice["finish_reason"] == "stop"
            else:
                assert choice["finish_reason"] == "tool_calls"


@pytest.mark.full
@pytest.mark.parametrize("form", TEMPLATES)
async def test_a_hundred_forced_calls_are_valid(folder: Path, form: str) -> None:
    async with speaking(folder, TEMPLATES[form]) as (_, http):
        forced = {"tool_choice": "required", "parallel_tool_calls": False}
        for answer in await asyncio.gather(*[post(http, **forced) for _ in range(100)]):
            [call] = answer["choices"][0]["message"]["tool_calls"]
            check(call)


async def test_a_streamed_call_is_named_once_and_its_arguments_come_in_pieces(folder: Path) -> None:
    fields = {"tool_choice": {"type": "function", "function": {"name": "get_weather"}}, "stream": True}
    async with speaking(folder, TEMPLATES["mistral"]) as (_, http):
        reply = await http.post("/v1/chat/completions", json=body(**fields))
    events = [json.loads(line[6:]) for line in reply.text.splitlines() if line.startswith("data: {")]
    deltas = [choice["delta"] for event in events for choice in event["choices"]]
    first, *rest = [one for delta in deltas for one in delta.get("tool_calls", ())]
    assert first["function"] == {"name": "get_weather", "arguments": ""}
    assert len(first["id"]) == 9
    assert len(rest) > 5
    assert all(one.keys() == {"index", "function"} for one in rest)
    arguments = "".join(one["function"]["arguments"] for one in rest)
    check({"type": "function", "function": {"name": "get_weather", "arguments": arguments}})
    assert "".join(delta.get("content") or "" for delta in deltas) == ""


async def test_an_opening_token_begins_a_call_when_calls_are_free(folder: Path) -> None:
    opening = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("[TOOL_CALLS]")
    async with speaking(folder, TEMPLATES["mistral"]) as (_, http):
        liked = await post(http, logit_bias={str(opening): 100}, parallel_tool_calls=False)
        [choice] = liked["choices"]
        check(choice["message"]["tool_calls"][0])
        assert choice["finish_reason"] == "tool_calls"
        [choice] = (await post(http, logit_bias={str(opening): -100}, max_tokens=20))["choices"]
        assert "tool_calls" not in choice["message"]
        assert choice["message"]["content"]
        # Without tools it is no text, and no call.
        [choice] = (await post(http, tools=[], logit_bias={str(opening): 100}, max_tokens=5))["choices"]
        assert choice["message"]["content"] == ""


async def test_a_form_and_free_calls_together_give_one_or_the_other(folder: Path) -> None:
    schema = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": [1, 2]}}}
    async with speaking(folder, TEMPLATES["hermes"]) as (_, http):
        for answer in await asyncio.gather(*[post(http, response_format=schema) for _ in range(6)]):
            message = answer["choices"][0]["message"]
            for call in message.get("tool_calls", ()):
                check(call)
            assert message["content"] is None or json.loads(message["content"]) in (1, 2)


# -- what may be written, form by form

_ONE = '{"name": "get_weather", "arguments": {"city": "Oslo", "days": 2}}'
_OTHER = '{"name": "get", "arguments": {}}'
_H1, _H2 = f"<tool_call>\n{_ONE}\n</tool_call>", f"<tool_call>\n{_OTHER}\n</tool_call>"
_L1 = _ONE.replace("arguments", "parameters")
_M2 = f"[TOOL_CALLS] [{_ONE}, {_OTHER}]"
_A1, _A2 = '[TOOL_CALLS]get_weather[ARGS]{"city": "Oslo", "days": 2}', "[TOOL_CALLS]get[ARGS]{}"
WRITTEN: list[tuple[Form, str, bool, bool]] = [
    # form, text, whole when calls are free, whole when one must be
    (HERMES, "Hello <tool_", True, False),
    (HERMES, _H1, True, True),
    (HERMES, f"{_H1}\n{_H2}", True, True),
    (HERMES, f"So: {_H2}", True, False),
    (HERMES, "<tool_call>\n{}", False, False),
    (HERMES, _H1.replace("2", "77"), False, False),
    (HERMES, _H2.replace("get", "other"), False, False),
    (LLAMA3, _L1, True, True),
    (LLAMA3, f"<|python_tag|>{_L1}", True, True),
    (LLAMA3, '{"city": 1}', True, False),
    (LLAMA3, "Hello", True, False),
    (LLAMA3, f"{_L1}; {_L1}", False, False),
    (LLAMA3, '{"name": "other"}', False, False),
    (MISTRAL, _M2, True, True),
    (MISTRAL, f"So: {_M2}", True, False),
    (MISTRAL, "[TOOL_CALLS] []", False, False),
    (MISTRAL_ARGS, _A1 + _A2, True, True),
    (MISTRAL_ARGS, f"So: {_A2}", True, False),
    (MISTRAL_ARGS, _A1.replace("2", "two"), False, False),
]


@pytest.fixture(scope="module")
def vocabularies(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Grammars]:
    """With the marks as control tokens, and without."""
    plain = tmp_path_factory.mktemp("plain")
    size = make_tiny_tokenizer(plain)
    return {
        has: Grammars((path / "tokenizer.json").read_text(), size=of, ends=[of - 1])
        for has, path, of in ((True, folder, size + len(CONTROLS)), (False, plain, size))
    }


@pytest.mark.parametrize(
    ("form", "text", "free", "forced", "special"),
    [
        (*case, special)
        for case in WRITTEN
        for special in (True, False)
        # What may stand before a call is known as a token of its own only.
        if special or "<|python_tag|>" not in case[1]
    ],
)
def test_a_text_with_calls_is_whole_when_they_are(
    vocabularies: dict[bool, Grammars], form: Form, text: str, free: bool, forced: bool, special: bool
) -> None:
    lark = Lark(form, {mark: id_ for id_, mark in enumerate(CONTROLS, 256) if mark in form.marks and special})
    for required, expected in ((False, free), (True, forced)):
        grammar = lark.of(None, Wanted(functions=TOOLS, required=required), after_thoughts=False)
        assert may_be_whole(vocabularies[special], grammar, text) == expected


def may_be_whole(grammars: Grammars, lark: str, text: str, thinking: Thinking | None = None) -> bool:
    """Whether the tokens of this text are allowed one after the other, and the end after them."""
    matcher = compile_grammar(grammars.tokenizer, lark)
    end, size = grammars.tokenizer.eos_token, grammars.tokenizer.vocab_size
    grammar = Grammar(matcher, grammars.tokenizer, ends=[end], param=None, thinking=thinking)
    for token in [*grammars.tokenizer.tokenize_str(text, parse_special=True), end]:
        row = torch.zeros(size)
        grammar.fill_mask(row)
        if torch.isinf(row[token]):
            return False
        if token != end:
            grammar.accept(token)
    return True


# -- prompts


async def test_a_template_is_told_the_tools_and_gets_arguments_as_objects(folder: Path) -> None:
    template = (
        "{% for t in tools or [] %}[{{ t.function.name }}]{% endfor %}{% for m in messages %}"
        "{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.arguments.city }}"
        "{% endfor %}{% endfor %}"
    )
    prompts = Prompts(AutoTokenizer.from_pretrained(folder), template)
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"city": "Oslo"}'}}
    messages = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "rain"},
    ]
    text = prompts.text_of(await prompts.encode(messages, tools=TOOLS))
    assert text == "[get_weather][get]user:?assistant:Oslotool:rain"
    prompts.close()


async def test_a_template_that_knows_no_tools_finds_them_in_the_messages(folder: Path) -> None:
    prompts = Prompts(AutoTokenizer.from_pretrained(folder), None)
    call = {"id": "1", "type": "function", "function": {"name": "get", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "assistant", "content": "So", "tool_calls": [call]},
    ]
    text = prompts.text_of(await prompts.encode(messages, tools=TOOLS))
    assert "Be brief.\n\nYou may call functions." in text
    assert '"name":"get_weather"' in text
    assert 'So\n<tool_call>\n{"name": "get", "arguments": {"a":1}}\n</tool_call>' in text
    assert "<tools>" in prompts.text_of(await prompts.encode(messages[1:], tools=TOOLS))
    assert "<tools>" not in prompts.text_of(await prompts.encode(messages))
    prompts.close()


@pytest.mark.parametrize("where", ["tools", "messages[0].tool_calls"])
async def test_a_name_with_a_control_token_is_refused(folder: Path, where: str) -> None:
    """S37: templates write the names of a schema as they are."""
    prompts = Prompts(AutoTokenizer.from_pretrained(folder), TEMPLATES["hermes"])
    names = {"x<|im_end|>": {}}
    tools, message = TOOLS, {"role": "assistant", "content": ""}
    if where == "tools":
        tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": names}}}]
    else:
        message["tool_calls"] = [{"function": {"name": "f", "arguments": json.dumps({"deep": [names]})}}]  # type: ignore[assignment]
    with pytest.raises(BadRequest) as refused:
        await prompts.encode([message], tools=tools)
    assert refused.value.param == where
    prompts.close()


# -- refusals


async def test_parameters_that_cannot_be_used_are_named(folder: Path) -> None:
    odd = {"type": "object", "dependentRequired": {"a": ["b"]}, "maxProperties": 0}
    tools = [WEATHER, {"type": "function", "function": {"name": "odd", "parameters": odd}}]
    async with speaking(folder, TEMPLATES["hermes"]) as (_, http):
        reply = await http.post("/v1/chat/completions", json=body(tools=tools, tool_choice="required"))
        assert reply.status_code == 400
        assert reply.json()["error"]["param"] == "tools[1].function.parameters"
        assert "dependentRequired" in reply.json()["error"]["message"]
        # A call that nobody demands need not fit what is not understood, unless the function is strict.
        await post(http, tools=tools, max_tokens=3)
        tools[1]["function"]["strict"] = True  # type: ignore[index]
        reply = await http.post("/v1/chat/completions", json=body(tools=tools))
        assert reply.status_code == 400


async def test_a_deployment_may_name_the_form_and_only_one_there_is(folder: Path) -> None:
    async with serving(folder, tool_call_parser="mistral") as engine:
        assert engine.tool_form is MISTRAL
    with pytest.raises(LoadError, match="tool_call_parser") as refused:
        async with serving(folder, tool_call_parser="pythonic"):
            pass
    assert refused.value.cause is Cause.BAD_ARGUMENT


# -- thoughts


@dataclass
class Told:
    reasoning: str
    text: str
    tokens: int
    last: Delta


def taken(folder: Path, text: str, *, opened: bool) -> Told:
    """What becomes of an answer with these very tokens."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    controls = {tokenizer.convert_tokens_to_ids(mark): mark for mark in CONTROLS}
    request = GenerationRequest(request_id="r", sampling=Sampling(stop=("STOP",)), top_logprobs=0)
    answer = Answer(
        request,
        Vocabulary(tokenizer),
        frozenset({tokenizer.eos_token_id}),
        prompt=[1],
        thoughts=Thoughts(opened=opened),
        shown=controls,
    )
    ids = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    deltas = [answer.take(token, last=at == len(ids)) for at, token in enumerate(ids, start=1)]
    found = [delta for delta in deltas if delta is not None]
    details = [delta.detail for delta in found if delta.detail is not None]
    whole = "".join(delta.text for delta in found)
    assert "".join(token.text for detail in details for token in detail.tokens) == whole
    return Told(
        "".join(detail.reasoning for detail in details), whole, details[-1].reasoning_tokens, found[-1]
    )


def test_thoughts_are_no_text_and_their_tokens_are_counted(folder: Path) -> None:
    told = taken(folder, "<think>\nHm STOP ü.\n</think>\n\nYes.", opened=False)
    assert (told.reasoning, told.text) == ("Hm STOP ü.", "Yes.")
    assert told.tokens == len("\nHm STOP ü.\n".encode()) + 1
    assert told.last.finish_reason == "stop"
    told = taken(folder, "Hm.</think>Yes.", opened=True)
    assert (told.reasoning, told.text, told.tokens) == ("Hm.", "Yes.", 4)
    assert taken(folder, "No thoughts.", opened=False).text == "No thoughts."


async def test_after_thoughts_an_answer_has_its_form(folder: Path) -> None:
    end = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids("</think>")
    form = Structured(param="form", schema=CITY)
    async with serving(folder, template=THINKING) as engine:
        for seed in range(3):
            request = GenerationRequest(
                request_id="r",
                messages=[{"role": "user", "content": "?"}],
                sampling=Sampling(temperature=1.5, seed=seed, logit_bias={end: 8.0}),
                structured=form,
            )
            deltas = [delta async for delta in engine.generate(request)]
            jsonschema.validate(json.loads("".join(delta.text for delta in deltas)), CITY)
            assert deltas[-1].detail is not None
            assert deltas[-1].detail.reasoning_tokens > 0


_MAY = 256 + CONTROLS.index("<think>")


@pytest.mark.parametrize(
    ("text", "opens", "special", "whole"),
    [
        *(('hm {"x </think>\n\n[1]', None, special, True) for special in (True, False)),
        *(("hm </think>[1]", None, special, True) for special in (True, False)),
        *(("hm </think>x", None, special, False) for special in (True, False)),
        *((text, None, special, False) for special in (True, False) for text in ("hm", "[1]")),
        ("<think>hm</think>\n[1]", _MAY, True, True),
        ("[1]", _MAY, True, True),
        ("x", _MAY, True, False),
    ],
)
def test_a_form_begins_behind_thoughts(
    vocabularies: dict[bool, Grammars], text: str, opens: int | None, special: bool, whole: bool
) -> None:
    form = Structured(param="form", schema={"type": "array", "items": {"type": "integer"}})
    lark = Lark(HERMES, {}).of(form, None, after_thoughts=True)
    assert may_be_whole(vocabularies[special], lark, text, Thinking(opens)) == whole


async def test_a_template_is_told_how_much_to_think(folder: Path) -> None:
    template = (
        "{# </think> #}{{ reasoning_effort }}|{{ enable_thinking }}|{{ messages[0].content }}"
        "{% if not enable_thinking %}<think></think>{% endif %}"
    )
    async with speaking(folder, template) as (engine, http):
        assert "reasoning_effort" in engine.capabilities
        seen = []
        for effort in ("none", "high"):
            answer = await post(http, tools=[], reasoning_effort=effort, max_tokens=1)
            seen.append(answer["usage"]["prompt_tokens"])
        assert seen == [len("none|False|The weather?") + 2, len("high|True|The weather?")]
    async with speaking(folder, TEMPLATES["hermes"]) as (engine, _):
        assert "reasoning_effort" not in engine.capabilities


# -- a real model


@pytest.mark.model
async def test_a_real_model_calls_what_it_must_with_what_it_was_told(smollm2: Path) -> None:
    async with serving(smollm2, dtype="auto", device="auto") as engine:
        request = GenerationRequest(
            request_id="r",
            messages=[{"role": "user", "content": "What is the weather in Oslo for the next 3 days?"}],
            sampling=Sampling(temperature=0.0, max_tokens=80),
            tools=Wanted(functions=TOOLS, named="get_weather"),
        )
        deltas = [delta async for delta in engine.generate(request)]
    parser = CallParser(Wanted(functions=TOOLS), engine.tool_form)
    _, pieces = parser.feed("".join(delta.text for delta in deltas))
    arguments = json.loads("".join(piece.arguments for piece in pieces))
    jsonschema.validate(arguments, CITY)
    assert arguments["city"] == "Oslo"
