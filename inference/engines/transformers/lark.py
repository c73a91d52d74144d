"""What form a request's text must have, written as llguidance reads it: a grammar in Lark's syntax that
refers to others, of schemas among them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher
from llguidance.gbnf_to_lark import gbnf_to_lark, is_lark_syntax

from inference.engines.base import BadRequest, Structured, Tools
from inference.engines.tool_forms import Form

# As gateways hold clients to; here for those who come without one.
SCHEMA_BYTES = 64 * 1024
SCHEMA_DEPTH = 32
REGEX_BYTES = 4 * 1024
GBNF_RULES = 256
"""Converting llama.cpp's syntax takes a time that grows with their square."""

_SPACES = r"[\x20]|\n[\x20]{0,60}|\n\t{0,16}"
"""What JSON may have between its parts: a space, or a line's end and what the next line is indented by.
Without a bound, a small model that begins with spaces never ends."""

_NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
"""What a function without parameters is called with."""


class Lark:
    """`specials`: texts that are one token each, and no text to the tokenizer."""

    def __init__(self, form: Form, specials: Mapping[str, int]) -> None:
        self._form = form
        self._specials = specials
        marks = "|".join(re.escape(text) for text in sorted(specials, key=len, reverse=True))
        self._marks = re.compile(f"({marks})") if marks else None

    def of(self, structured: Structured | None, tools: Tools | None, *, after_thoughts: bool) -> str:
        """The whole grammar. Raises BadRequest for what is beyond the bounds."""
        grammars: list[dict[str, Any]] = []
        if structured is not None and (tools is None or not (tools.required or tools.named)):
            grammars.append({"name": "answer", **_answer(structured)})
        if tools is None and not after_thoughts:
            return _together(grammars)
        rules = ["start: gap? body", r"gap: /\n{1,2}/"] if after_thoughts else ["start: body"]
        if tools is None:
            rules.append("body: @answer")
        else:
            rules += self._body(tools, bool(grammars))
            forced = tools.required or tools.named is not None
            for at, function in _chosen(tools):
                schema = _parameters(function, f"tools[{at}].function.parameters", forced=forced)
                grammars.append({"name": f"arguments{at}", "json_schema": schema})
        return _together([{"lark_grammar": "\n".join(rules) + "\n"}, *grammars])

    def _body(self, tools: Tools, structured: bool) -> list[str]:
        form = self._form
        names = {at: function["name"] for at, function in _chosen(tools)}
        calls = [
            f"call{at}: {self._literal(form.head(name))} @arguments{at} {self._literal(form.after)}"
            for at, name in names.items()
        ]
        rules = [*calls, "call: " + " | ".join(f"call{at}" for at in names)]
        several = tools.parallel and form.between is not None and tools.named is None
        more = f" ({self._literal(form.between or '')} call)*" if several else ""
        mark = self._literal(form.mark) + "? " if form.mark in self._specials else ""
        rules.append(f"calls: {mark}{self._literal(form.first)} call{more} {self._literal(form.last)}")
        if tools.required or tools.named is not None:
            return [*rules, "body: calls"]
        if structured:
            return [*rules, "body: calls | @answer"]
        return rules + self._free(names, more)

    def _free(self, names: dict[int, str], more: str) -> list[str]:
        """Any text, and calls once their opening is there."""
        form = self._form
        if not form.opening:
            own = r"/[ \n\t]*\{[ \n\t]*\"name\"[ \n\t]*:(?s:.*)/"
            return ["body: TEXT | calls", f"TEXT: /(?s:.*)/ & ~{own}"]
        opened = [
            # The first call goes on behind the opening.
            f"opened{at}: {self._literal((form.first + form.head(name)).removeprefix(form.opening))} "
            f"@arguments{at} {self._literal(form.after)}"
            for at, name in names.items()
        ]
        any_of = " | ".join(f"opened{at}" for at in names)
        rules = [*opened, f"opened: {any_of}", "TEXT: /(?s:.*)/"]
        if form.opening in self._specials:
            begun = f"TEXT? {self._literal(form.opening)}"
        else:
            rules.append(f"begun[lazy]: TEXT {self._literal(form.opening)}")
            begun = "begun"
        return [*rules, f"body: TEXT | {begun} opened{more} {self._literal(form.last)}"]

    def _literal(self, text: str) -> str:
        """This very text, in a rule."""
        parts = self._marks.split(text) if self._marks else [text]
        return " ".join(
            f"<[{self._specials[part]}]>" if part in self._specials else json.dumps(part, ensure_ascii=False)
            for part in parts
            if part
        )


def _together(grammars: list[dict[str, Any]]) -> str:
    return msgspec.json.encode({"grammars": grammars}).decode()


def _chosen(tools: Tools) -> list[tuple[int, dict[str, Any]]]:
    """The functions that may be called, each with its place among all."""
    functions = enumerate(tool["function"] for tool in tools.functions)
    return [(at, one) for at, one in functions if tools.named in (None, one["name"])]


def _parameters(function: dict[str, Any], param: str, *, forced: bool) -> dict[str, Any]:
    given = function.get("parameters")
    # A call that nobody demanded is worth having even if a keyword of its schema is not understood.
    lenient = not forced and not function.get("strict")
    return _schema(_NOTHING if given is None else given, param, lenient=lenient)


def _answer(structured: Structured) -> dict[str, Any]:
    param = structured.param
    if structured.choices:
        _check_bytes("".join(structured.choices), SCHEMA_BYTES, param)
        choices = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in structured.choices)
        return {"lark_grammar": f"start: {choices}"}
    if structured.regex is not None:
        _check_bytes(structured.regex, REGEX_BYTES, param)
        written = json.loads(LLMatcher.grammar_from_regex(structured.regex))
        return {"lark_grammar": written["grammars"][0]["lark_grammar"]}
    if structured.grammar is not None:
        return {"lark_grammar": _lark(structured.grammar, param)}
    return {"json_schema": _schema(structured.schema, param, compact=structured.compact)}


def _lark(grammar: str, param: str) -> str:
    _check_bytes(grammar, SCHEMA_BYTES, param)
    if is_lark_syntax(grammar):
        return grammar
    if grammar.count("::=") > GBNF_RULES:
        raise BadRequest(
            f"'{param}' has more than {GBNF_RULES} rules. Write it in Lark's syntax.",
            param=param,
            code="invalid_value",
        )
    try:
        return gbnf_to_lark(grammar)
    except Exception as error:  # it raises plain ones
        said = str(error)[:300] if not isinstance(error, RecursionError) else "it is nested too deeply"
        raise refusal(said, param) from None


def _schema(
    schema: dict[str, Any] | bool, param: str, *, compact: bool = False, lenient: bool = False
) -> dict[str, Any]:
    if schema is False:
        raise refusal("no text has this form", param)
    own = {} if schema is True else schema
    if _deeper(own, SCHEMA_DEPTH):
        raise refusal(f"the schema is nested deeper than {SCHEMA_DEPTH} levels", param)
    if len(msgspec.json.encode(own)) > SCHEMA_BYTES:
        raise _too_long(param, SCHEMA_BYTES)
    spaces = {"whitespace_flexible": False} if compact else {"whitespace_pattern": _SPACES}
    return {**own, "x-guidance": {**spaces, "lenient": lenient}}


def _deeper(value: Any, depth: int) -> bool:
    """Whether it has containers within containers beyond this depth. Looks no deeper than that."""
    if not isinstance(value, dict | list):
        return False
    if depth == 0:
        return True
    return any(_deeper(one, depth - 1) for one in (value.values() if isinstance(value, dict) else value))


def _check_bytes(text: str, most: int, param: str) -> None:
    if len(text.encode(errors="replace")) > most:
        raise _too_long(param, most)


def _too_long(param: str, most: int) -> BadRequest:
    return BadRequest(
        f"'{param}' is too long. Expected at most {most} bytes.", param=param, code="string_above_max_length"
    )


def refusal(reason: str, param: str | None) -> BadRequest:
    return BadRequest(f"'{param}' cannot be used: {reason}.", param=param, code="invalid_value")
