"""How models write calls of functions in their text. Each family was trained on a form of its own; which
one a model knows shows in its chat template."""

from __future__ import annotations

import json
import secrets
import string
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace

OPEN, CLOSE = "<tool_call>", "</tool_call>"


def _long_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _short_id() -> str:
    """Templates of Mistral's models refuse any other."""
    return "".join(secrets.choice(string.ascii_letters + string.digits) for _ in range(9))


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """One way to write calls: `first`, then each call as `before`, its name, `middle`, its arguments as
    JSON, `after`, with `between` between two, then `last`."""

    name: str
    """As vLLM's `tool_call_parser` names it."""
    opening: str
    """What begins a call within text. Empty: only a text that is a call from its beginning is one."""
    closing: str = ""
    first: str = ""
    before: str
    middle: str
    after: str
    between: str | None
    """None: one call only."""
    last: str = ""
    quoted: bool = True
    """The call is a JSON object, its name a string in it."""
    mark: str = ""
    """What may stand before a text that is a call."""
    marks: tuple[str, ...] = ()
    """Those of its parts that may be a single token, which is no text to the tokenizer."""
    new_id: Callable[[], str] = _long_id

    def head(self, name: str) -> str:
        """A call up to its arguments."""
        return self.before + (json.dumps(name, ensure_ascii=False) if self.quoted else name) + self.middle


HERMES = Form(
    name="hermes",
    opening=OPEN,
    closing=CLOSE,
    before=OPEN + '\n{"name": ',
    middle=', "arguments": ',
    after="}\n" + CLOSE,
    between="\n",
    marks=(OPEN, CLOSE),
)
"""Hermes and Qwen, and many that came after them."""

LLAMA3 = Form(
    name="llama3_json",
    opening="",
    before='{"name": ',
    middle=', "parameters": ',
    after="}",
    between=None,  # their templates refuse a message with more than one
    mark="<|python_tag|>",
    marks=("<|python_tag|>",),
)
"""Llama 3.1 and later: the whole answer is the call."""

MISTRAL = Form(
    name="mistral",
    opening="[TOOL_CALLS]",
    closing="]",
    first="[TOOL_CALLS] [",
    before='{"name": ',
    middle=', "arguments": ',
    after="}",
    between=", ",
    last="]",
    marks=("[TOOL_CALLS]",),
    new_id=_short_id,
)

MISTRAL_ARGS = Form(
    name="mistral_args",
    opening="[TOOL_CALLS]",
    before="[TOOL_CALLS]",
    middle="[ARGS]",
    after="",
    between="",
    quoted=False,
    marks=("[TOOL_CALLS]", "[ARGS]"),
    new_id=_short_id,
)
"""Mistral's models since the spring of 2025."""

FORMS = {form.name: form for form in (HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS)}


def form_of(template: str) -> Form:
    """The form that this chat template shows; Hermes' where it shows none."""
    if "[TOOL_CALLS]" in template:
        if "[ARGS]" in template:
            return MISTRAL_ARGS
        # Those of the one tokenizer put a space there, those of the other do not.
        return replace(MISTRAL, first="[TOOL_CALLS][") if "[TOOL_CALLS][" in template else MISTRAL
    if OPEN not in template and ("<|python_tag|>" in template or '"parameters": dictionary' in template):
        return LLAMA3
    return HERMES
