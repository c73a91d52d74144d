"""S10: a chat template is a program of the model's. It reaches nothing and ends; clients send none."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from inference.engines.base import BadRequest, EngineSpec, GenerationRequest, Sampling
from inference.engines.transformers import rendering
from inference.engines.transformers.engine import TransformersEngine
from inference.engines.transformers.prompt import Prompts
from openai_api.endpoints import CHAT, COMPLETIONS, COUNT_TOKENS, MESSAGES, RESPONSES, TOKENIZE, Endpoint
from openai_api.errors import InvalidRequest
from tests.engines.tiny_model import CHAT_TEMPLATE, make_tiny_llama

CANARY = "canary-c7d1"
RUN = "__import__('os').popen('touch CANARY').read()"
REACHES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{% for c in ''.__class__.__base__.__subclasses__() %}{{ c.__name__ }}{% endfor %}",
    "{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}",
    "{{ joiner.__init__.__globals__['__builtins__']['__import__']('os').system('touch CANARY') }}",
    "{{ lipsum.__globals__['os'].popen('touch CANARY').read() }}",
    "{{ lipsum.__globals__.__builtins__.open('CANARY', 'w') }}",
    "{{ namespace.__init__.__globals__.sys.modules.os.system('touch CANARY') }}",
    '{{ self.__init__.__globals__.__builtins__.exec(\'open("CANARY", "w")\') }}',
    "{{ self._TemplateReference__context.cycler.__init__.__globals__.os.system('touch CANARY') }}",
    "{{ raise_exception.__globals__['jinja2'].utils.os.system('touch CANARY') }}",
    "{{ strftime_now.__globals__.sys.modules['os'].system('touch CANARY') }}",
    "{{ raise_exception.__code__.co_consts }}{{ raise_exception.__closure__[0] }}",
    "{{ strftime_now.__closure__[0].cell_contents.__class__ }}",
    "{{ messages.__class__.__init__.__globals__ }}{{ messages.append.__self__.__class__.__mro__ }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}{{ (''|attr('__class__')).__mro__[1] }}",
    "{{ ''|attr('\\x5f\\x5fclass\\x5f\\x5f')|attr('mro')() }}",
    "{{ ['']|map(attribute='__class__.__mro__')|first|last }}",
    "{{ ['']|map(attribute='__class__')|list|first }}",
    "{{ ['']|groupby('__class__')|first|first }}",
    "{{ [messages]|sum(attribute='__class__', start='') }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(raise_exception) }}",
    "{{ '{x.__globals__}'.format_map({'x': raise_exception}) }}",
    "{{ ('{0.__cl'~'ass__.__mro__}')|format(1) }}{{ ''.format.__self__.__class__.mro() }}",
    "{% set f = '{0.__class__.__mro__}'.format %}{{ f(raise_exception) }}",
    "{{ ['{0.__globals__[sys].modules}']|map('format', raise_exception)|list }}",
    "{{ [raise_exception]|map(attribute='__globals__')|list }}",
    "{% set ns = namespace(__class__=1) %}{{ ns }}",
    "{{ dict.__class__.__init__.__globals__ }}{{ dict.fromkeys.__globals__ }}",
    "{{ (messages|list).append(1) }}{{ messages.pop() }}{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'system'}) }}{{ messages[0].__setitem__('role', 'system') }}",
    "{% import 'os' as os %}{{ os.popen('touch CANARY') }}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{% from '/etc/passwd' import x %}",
    "{{ (x for x in ()).gi_frame.f_back.f_globals }}",
    "{% macro m() %}{{ caller.__globals__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% macro m() %}{% endmacro %}{{ m._func.__globals__ }}{{ m._environment.loader }}",
    "{% for a in [1] %}{{ loop.__init__.__globals__ }}{{ loop._iterator.__reduce__() }}{% endfor %}",
    "{{ loop.cycle.__func__.__globals__ }}",
    "{{ environment.from_string('x') }}{{ tokenizer.save_pretrained('CANARY') }}",
    "{% generation %}{{ lipsum.__globals__.os.popen('touch CANARY').read() }}{% endgeneration %}",
    "{{ url_for.__globals__ }}{{ config.items() }}{{ request.application.__globals__ }}",
    "{{ " + RUN + " }}",
]
"""Each must come to nothing: refused, or empty text."""
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "loops over one range": "{% set r = range(99999) %}"
    "{% for a in r %}{% for b in r %}{% endfor %}{% endfor %}",
    "filtered loop": "{% for a in range(99999) %}"
    "{% for b in range(99999) if b < 0 %}{% endfor %}{% endfor %}",
    "filters": "{% for a in range(99999) %}{% set x = range(99999)|map('string')|list %}{% endfor %}",
    "macros that double": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}"
    "{{ f(60) }}",
    "a macro without end": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a recursive loop": "{% for a in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "text without end": "{% for a in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "the message again and again": "{% for a in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}",
    "text that doubles": "{% set n = namespace(a='x') %}{% for i in range(60) %}{% set n.a = n.a ~ n.a %}"
    "{% endfor %}{{ n.a }}",
    "a list that doubles": "{% set n = namespace(a=[1]) %}{% for i in range(60) %}{% set n.a = n.a + n.a %}"
    "{% endfor %}",
    "a number that is squared": "{% set n = namespace(a=99999) %}{% for i in range(60) %}"
    "{% set n.a = n.a * n.a %}{% endfor %}",
    "a power": "{{ 9 ** 9 ** 9 ** 9 }}",
    "a huge number": "{{ 'x' * 10000000000 }}",
    "a huge range": "{{ range(1000000)|list }}",
}
FAULTS = [
    "{{ 1 / 0 }}",
    "{% for %}",
    "{{ messages[9].x.y }}",
    "{{ 1 + 'a' }}",
    "{{ undefined() }}",
    "{{ 'a'|no }}",
]
MESSAGES_OF_ONE = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder of its own, in which nothing must appear."""
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert list(tmp_path.iterdir()) == []


async def rendered(prompts: Prompts) -> str:
    """What a template made, or the refusal; in less than a second of this thread's time."""
    began = time.thread_time()
    try:
        return prompts.text_of(await prompts.encode(MESSAGES_OF_ONE), special_tokens=True)
    except BadRequest as refused:
        return f"refused: {refused}"
    finally:
        prompts.close()
        assert time.thread_time() - began < 1


async def test_a_template_reaches_nothing(folder: Path, elsewhere: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for template in REACHES:
        text = await rendered(Prompts(tokenizer, template.replace("CANARY", CANARY)))
        if not text.startswith("refused: "):
            for inner in ("<class", "<function", "<built-in", "<module", "__", "object at 0x", "Namespace"):
                assert inner not in text, (template, text[:300])
            assert "root:" not in text, template
        assert str(folder) not in text


@pytest.mark.parametrize("which", sorted(ENDLESS))
async def test_a_template_without_end_is_stopped(folder: Path, which: str) -> None:
    said = await rendered(Prompts(AutoTokenizer.from_pretrained(folder), ENDLESS[which]))
    assert said.startswith("refused: The model's chat template "), said[:300]


async def test_a_faulty_template_is_a_refusal_and_no_crash(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for template in FAULTS:
        said = await rendered(Prompts(tokenizer, template))
        assert said.startswith("refused: The model's chat template "), (template, said[:300])


async def test_bounds_leave_long_conversations_alone(folder: Path) -> None:
    prompts = Prompts(AutoTokenizer.from_pretrained(folder), None)
    conversation = [
        {"role": "user" if at % 2 == 0 else "assistant", "content": "words " * 40} for at in range(4000)
    ]
    assert len(await prompts.encode(conversation)) > 900_000
    short = Prompts(AutoTokenizer.from_pretrained(folder), "{{ dict(**{'a': 2 * 3}).a }}{{ 'x' * 1000 }}")
    assert len(await short.encode(MESSAGES_OF_ONE)) == 1001
    for one in (prompts, short):
        one.close()


@pytest.fixture
async def engine(folder: Path) -> AsyncIterator[TransformersEngine]:
    """Its template does what the last message names."""
    branches = {name: text for name, text in ENDLESS.items() if rendering.refused_by(text) is None}
    template = "".join(
        f"{{% if messages[0].content == {json.dumps(name)} %}}{text}{{% endif %}}"
        for name, text in branches.items()
    )
    spec = EngineSpec(
        model_path=folder,
        slots=2,
        chat_template=template + CHAT_TEMPLATE,
        arguments={"device": "cpu", "dtype": "float32"},
    )
    engine = TransformersEngine(spec)
    await engine.load(lambda progress: None)
    yield engine
    await engine.close()


def asked(text: str) -> GenerationRequest:
    messages = [{"role": "user", "content": text}]
    return GenerationRequest(
        request_id="r", messages=messages, sampling=Sampling(max_tokens=3, ignore_eos=True)
    )


async def test_the_engine_outlives_such_templates(engine: TransformersEngine) -> None:
    for which in ("loops", "text without end", "a macro without end", "text that doubles"):
        with pytest.raises(BadRequest, match="chat template"):
            await anext(engine.generate(asked(which)))
        assert engine.healthy()
    deltas = [delta async for delta in engine.generate(asked("hello"))]
    assert deltas[-1].completion_tokens == 3


OWN_TEMPLATES: list[tuple[Endpoint, dict[str, Any]]] = [
    (CHAT, {"messages": MESSAGES_OF_ONE}),
    (COMPLETIONS, {"prompt": "x"}),
    (RESPONSES, {"input": "x"}),
    (MESSAGES, {"messages": MESSAGES_OF_ONE, "max_tokens": 5}),
    (COUNT_TOKENS, {"messages": MESSAGES_OF_ONE}),
    (TOKENIZE, {"messages": MESSAGES_OF_ONE}),
]


@pytest.mark.parametrize(("endpoint", "body"), OWN_TEMPLATES, ids=lambda one: getattr(one, "path", ""))
def test_a_client_sends_no_template(endpoint: Endpoint, body: dict[str, Any]) -> None:
    """Refused where engines would take it; elsewhere, at the least, never passed on."""
    for name, value in (
        ("chat_template", "{{ 7 * 7 }}"),
        ("chat_template", ""),
        ("chat_template_kwargs", {"chat_template": "{{ 7 * 7 }}"}),
        ("chat_template_kwargs", {"tools": "{{ 7 * 7 }}"}),
        ("chat_template_kwargs", {"x": ["{{ 7 * 7 }}"]}),
        ("chat_template_kwargs", {"x": {"y": "{{ 7 * 7 }}"}}),
    ):
        sent = json.dumps({"model": "m", **body, name: value}).encode()
        if endpoint in (CHAT, TOKENIZE):
            with pytest.raises(InvalidRequest) as refused:
                endpoint.parse(sent)
            assert (refused.value.param or "").startswith(name)
            continue
        call = endpoint.parse(sent)
        passed_on = call.forwarded(call.needs())
        assert b"7 * 7" not in passed_on
        assert b'chat_template"' not in passed_on
