"""Texts of the simulated engine that must have a form: calls of tools, and structured output."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import msgspec

from inference.engines.base import GenerationRequest, Structured, Tools
from inference.engines.schemas import instance
from inference.engines.tool_forms import CLOSE, OPEN

_WORD = re.compile(r"[\w.-]+")
_QUOTED = re.compile(r"""(?<!\w)(?:'([^']{1,4096})'|"([^"]{1,4096})")(?!\w)""")
_NUMBER = re.compile(r"(?<![\w.])-?\d{1,9}(?:\.\d{1,9})?(?![\w.]*\w)")
_MOST_SAID = 64


@dataclass(frozen=True, slots=True)
class _Said:
    """What the last message, when it is a user's, gives to an answer that must have a form."""

    words: frozenset[str]
    texts: tuple[str, ...]
    """What it quotes."""
    numbers: tuple[float, ...]


def formed_text(request: GenerationRequest, commanded: str | None) -> str | None:
    """The text that the request's form asks for; None: any. `commanded` names a tool that is to be
    called if there is one of that name. Raises BadRequest for a schema that no value satisfies."""
    if request.tools is None and request.structured is None:
        return None
    said = _said(request.messages)
    if request.tools is not None and (called := _called(request.tools, said, commanded)):
        return "\n".join(_call(function, said) for function in called)
    return None if request.structured is None else _structured(request.structured, said)


def _said(messages: list[dict[str, Any]]) -> _Said:
    last = messages[-1] if messages else {}
    text = str(last.get("content") or "") if last.get("role") == "user" else ""
    words = frozenset(word.rstrip(".-") for word in _WORD.findall(text))
    if text.startswith("!"):  # commands are no values
        return _Said(words, (), ())
    texts = tuple(one or other for one, other in _QUOTED.findall(text))
    numbers = tuple(map(float, _NUMBER.findall(_QUOTED.sub(" ", text))))
    return _Said(words, texts[:_MOST_SAID], numbers[:_MOST_SAID])


def _called(tools: Tools, said: _Said, commanded: str | None) -> list[dict[str, Any]]:
    functions = [tool["function"] for tool in tools.functions]
    if tools.named is not None:
        return [function for function in functions if function["name"] == tools.named][:1]
    meant = [function for function in functions if _is_meant(function["name"], said.words, commanded)]
    if not meant and tools.required:
        meant = functions[:1]
    return meant if tools.parallel else meant[:1]


def _is_meant(name: str, words: frozenset[str], commanded: str | None) -> bool:
    if commanded is not None:
        return name == commanded
    about = name.split("_")[1:]
    return name in words or (bool(about) and words.issuperset(about))


def _call(function: dict[str, Any], said: _Said) -> str:
    arguments = {}
    if parameters := function.get("parameters"):
        arguments = instance(parameters, param="tools", texts=said.texts, numbers=said.numbers)
    written = msgspec.json.encode({"name": function["name"], "arguments": arguments}).decode()
    return f"{OPEN}\n{written}\n{CLOSE}"


def _structured(structured: Structured, said: _Said) -> str:
    if structured.choices:
        return structured.choices[0]
    if structured.schema == {"type": "object"}:
        made = dict.fromkeys(said.texts, "steam")
    else:
        made = instance(structured.schema, param=structured.param, texts=said.texts, numbers=said.numbers)
    return msgspec.json.encode(made).decode()
