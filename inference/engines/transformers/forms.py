"""What forms a model's answers have beside plain text: thoughts, calls of functions, structured output."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from inference.engines import reasoning, tool_forms
from inference.engines.base import GenerationRequest, Template, Tools
from inference.engines.reasoning import Thoughts
from inference.engines.transformers.grammar import Grammar, Grammars, Thinking
from inference.engines.transformers.lark import Lark, refusal
from inference.engines.transformers.trial import CannotCompile

logger = logging.getLogger("roundhouse.engine")

_STRUCTURED = (
    *("response_format", "structured_outputs"),
    *("structured_outputs.regex", "structured_outputs.grammar"),
)
_TOOLS = ("tools", "tool_choice", "parallel_tool_calls")
_TAIL = 16
"""Tokens at a prompt's end: so many spell the beginning of thoughts, whatever the tokenizer."""


_SWITCH = re.compile(r"\b(?:reasoning_effort|enable_thinking)\b")
"""What templates call the switch of a model's thoughts."""


class Forms:
    """Belongs to the event loop. Making it takes a third of a second: do it in a thread.

    `size`: the model scores tokens with ids below. `tool_form`: the name of one, instead of that which
    the template shows.
    """

    def __init__(
        self, tokenizer: Any, template: str, *, size: int, eos: frozenset[int], tool_form: str | None
    ) -> None:
        backend = tokenizer.backend_tokenizer
        self.tool_form = tool_forms.form_of(template) if tool_form is None else tool_forms.FORMS[tool_form]
        self.eos = eos
        self._tokenizer = tokenizer
        self._switches = frozenset(_SWITCH.findall(template))
        self._thinks = reasoning.thinks(template)
        opens = backend.token_to_id(reasoning.OPEN)
        self._opens: int | None = opens if opens is not None and opens < size else None
        controls = {
            token.content: id_ for id_, token in backend.get_added_tokens_decoder().items() if token.special
        }
        self._lark = Lark(
            self.tool_form, {mark: controls[mark] for mark in self.tool_form.marks if mark in controls}
        )
        self._shown = {
            controls[mark]: mark
            for mark in (*self.tool_form.marks, *(reasoning.MARKS if self._thinks else ()))
            if mark in controls
        }
        self._grammars: Grammars | None = None
        try:
            self._grammars = Grammars(backend.to_str(), size=size, ends=sorted(eos))
        except ValueError as error:
            logger.warning("No structured output and no calls with this model: %s.", error)

    @property
    def capabilities(self) -> frozenset[str]:
        found = {"reasoning_effort"} if self._switches else set()
        if self._grammars is not None:
            found.update(_STRUCTURED, _TOOLS)
        return frozenset(found)

    def template_of(self, request: GenerationRequest) -> Template:
        """What the template is told, with the effort in its own words."""
        effort = request.reasoning_effort
        if effort is None or not self._switches:
            return request.template
        words = {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        told = {name: word for name, word in words.items() if name in self._switches}
        return replace(request.template, values={**told, **request.template.values})

    def begins_thinking(self, request: GenerationRequest, prompt: list[int]) -> bool:
        """Whether the answer begins within thoughts."""
        if not self._thinks or request.prompt is not None:
            return False
        if request.template.continued:
            return reasoning.stops_in(str(request.messages[-1].get("content") or ""))
        return reasoning.begins_in(self._tokenizer.decode(prompt[-_TAIL:], skip_special_tokens=False))

    def thoughts_of(self, request: GenerationRequest, prompt: list[int]) -> Thoughts | None:
        """What tells thoughts from the answer; None: all is answer."""
        if not self._thinks or request.prompt is not None:
            return None
        return Thoughts(opened=self.begins_thinking(request, prompt))

    def shown(self, request: GenerationRequest) -> Mapping[int, str]:
        """Control tokens that are text here, because calls and thoughts are read from it."""
        if request.prompt is not None or (request.tools is None and not self._thinks):
            return {}
        return self._shown

    async def grammar_of(self, request: GenerationRequest, prompt: list[int]) -> Grammar | None:
        """What holds the answer to its form; None: it has none. Raises BadRequest."""
        structured, tools = request.structured, request.tools
        if self._grammars is None or (structured is None and tools is None):
            return None
        thinking = None
        if self.begins_thinking(request, prompt):
            thinking = Thinking(None)
        elif self._thinks and request.prompt is None and self._opens is not None:
            thinking = Thinking(self._opens)
        param = "tools" if structured is None else structured.param
        lark = self._lark.of(structured, tools, after_thoughts=thinking is not None)
        try:
            return await self._grammars.compile(lark, param=param, thinking=thinking)
        except CannotCompile as refused:
            if tools is not None:
                await self._blame(tools)
            raise refusal(str(refused), param) from None

    async def _blame(self, tools: Tools) -> None:
        """Raises BadRequest that names the first function whose parameters cannot be used."""
        for at, tool in enumerate(tools.functions):
            alone = replace(tools, functions=[tool], named=None)
            lark = self._lark.of(None, alone, after_thoughts=False)
            try:
                await self._grammars.compile(lark, param=None, thinking=None)  # type: ignore[union-attr]
            except CannotCompile as refused:
                raise refusal(str(refused), f"tools[{at}].function.parameters") from None

    async def close(self) -> None:
        if self._grammars is not None:
            await self._grammars.close()
