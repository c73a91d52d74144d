"""Messages to token ids, by the model's chat template; plain prompts without it."""

from __future__ import annotations

import asyncio
import copy
import re
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from typing import Any

import msgspec
from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase

from inference.engines.base import PLAIN, BadRequest, Template
from inference.engines.tool_forms import HERMES
from inference.engines.transformers.rendering import RenderLimit, bounded, refused_by

ROLES = {role: role for role in ("system", "user", "assistant", "tool", "function")} | {"developer": "system"}
"""Role in a request -> role in a template. Templates glue roles into control tokens: only these pass."""

INLINE_CHARACTERS = 20_000
"""Longer prompts are read in a thread, so that other streams go on meanwhile."""


class Prompts:
    """Turns messages into token ids.

    Control tokens that a user spells out in a message are plain text; only those of the template
    count. Text without any gives the very ids of the ordinary way.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None) -> None:
        self._tokenizer = tokenizer
        self._template = chat_template
        # Encoding sets flags on the tokenizer, so the thread has one of its own.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tokenizer")
        self._thread_tokenizer: Any = None
        own = tokenizer.chat_template or ""
        template = own if chat_template is None else chat_template
        several = list(template.values()) if isinstance(template, dict) else [template]
        self._refused: str | None = next(filter(None, map(refused_by, several)), None)
        self._knows_tools = any(re.search(r"\btools\b", one) for one in several)
        controls = [text for text in tokenizer.get_added_vocab() if not text.isspace()]
        self._controls = re.compile("|".join(map(re.escape, controls)) or r"(?!)")

    @property
    def can_chat(self) -> bool:
        return self._template is not None or bool(self._tokenizer.chat_template)

    async def encode_text(
        self, prompt: str | list[int], *, special_tokens: bool = True, empty: bool = False
    ) -> list[int]:
        """A prompt as it stands, with the special tokens that the tokenizer puts around any text. Raises
        BadRequest for one without a single token, unless it may be `empty`."""
        if isinstance(prompt, str):
            if len(prompt) <= INLINE_CHARACTERS:
                prompt = self._encode_text(self._tokenizer, prompt, special_tokens)
            else:
                loop = asyncio.get_running_loop()
                prompt = await loop.run_in_executor(
                    self._thread, self._encode_text_in_thread, prompt, special_tokens
                )
        if not prompt and not empty:
            raise BadRequest("The prompt has no tokens.", param="prompt", code="invalid_value")
        return prompt

    def text_of(self, prompt: list[int], *, special_tokens: bool = False) -> str:
        text: str = self._tokenizer.decode(prompt, skip_special_tokens=not special_tokens)
        return text

    def spelled(self, tokens: list[int]) -> list[str]:
        """Each token as the vocabulary writes it; an id without an entry is an empty one."""
        return [spelling or "" for spelling in self._tokenizer.convert_ids_to_tokens(tokens)]

    async def encode(
        self,
        messages: list[dict[str, Any]],
        *,
        template: Template = PLAIN,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[int]:
        """Raises BadRequest when the messages cannot be rendered."""
        plain = [self._plain(message, at) for at, message in enumerate(messages)]
        if tools is not None:
            self._check_names(tools, "tools")
        if not self._knows_tools:
            plain, tools = told(plain, tools), None
        if _written(plain) + _written(tools) <= INLINE_CHARACTERS:
            return self._encode(self._tokenizer, plain, template, tools)
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._encode_in_thread, plain, template, tools)

    def _plain(self, message: dict[str, Any], at: int) -> dict[str, Any]:
        """The message with a known role, its content as one string, and arguments of calls as objects."""
        role = message.get("role")
        if not isinstance(role, str) or role not in ROLES:
            raise BadRequest(
                f"messages[{at}].role must be one of {', '.join(sorted(ROLES))}.",
                param=f"messages[{at}].role",
            )
        plain = {**message, "role": ROLES[role], "content": _text(message.get("content"), at)}
        if calls := message.get("tool_calls"):
            plain["tool_calls"] = [_with_object(call) for call in calls]
            self._check_names(plain["tool_calls"], f"messages[{at}].tool_calls")
        return plain

    def _check_names(self, given: Any, param: str) -> None:
        """What a template writes of an object are its names too, and there a control token counts."""
        within = [given]
        while within:
            one = within.pop()
            if isinstance(one, list):
                within += one
            elif isinstance(one, dict):
                within += one.values()
                if any(map(self._controls.search, map(str, one))):
                    raise BadRequest(
                        f"'{param}' has a name with a control token of this model.",
                        param=param,
                        code="invalid_value",
                    )

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _encode_in_thread(
        self, messages: list[dict[str, Any]], template: Template, tools: list[dict[str, Any]] | None
    ) -> list[int]:
        return self._encode(self._tokenizer_of_thread(), messages, template, tools)

    def _encode_text_in_thread(self, prompt: str, special_tokens: bool) -> list[int]:
        return self._encode_text(self._tokenizer_of_thread(), prompt, special_tokens)

    def _tokenizer_of_thread(self) -> Any:
        if self._thread_tokenizer is None:
            self._thread_tokenizer = copy.deepcopy(self._tokenizer)
        return self._thread_tokenizer

    def _encode_text(self, tokenizer: Any, prompt: str, special_tokens: bool) -> list[int]:
        encoded = tokenizer(prompt, split_special_tokens=False, add_special_tokens=special_tokens)
        ids: list[int] = encoded["input_ids"]
        return ids

    def _encode(
        self,
        tokenizer: Any,
        messages: list[dict[str, Any]],
        template: Template,
        tools: list[dict[str, Any]] | None,
    ) -> list[int]:
        if not self.can_chat:
            raise BadRequest(
                "This model has no chat template, so it cannot answer messages.", param="messages"
            )
        for name in template.values:
            if name in _NOT_THE_TEMPLATES:
                raise BadRequest(
                    f"'{name}' is no value for the model's chat template.", param="chat_template_kwargs"
                )
        if self._refused is not None:
            raise BadRequest(f"The model's chat template is not run here: {self._refused}.", param="messages")
        try:
            with bounded(len(msgspec.json.encode((messages, tools, template.values)))):
                ids: list[int] = tokenizer.apply_chat_template(
                    messages,
                    chat_template=self._template,
                    tools=tools,
                    add_generation_prompt=template.generation_prompt,
                    continue_final_message=template.continued,
                    sanitize_control_tokens=True,
                    return_dict=False,
                    **template.values,
                )
        except RenderLimit as error:
            raise BadRequest(f"The model's chat template was stopped: {error}.", param="messages") from error
        except TemplateError as error:
            # A template refuses with a sentence for the user, "roles must alternate" for example.
            said = error.message or "it cannot be rendered."
            raise BadRequest(
                f"The model's chat template refused the messages: {said}", param="messages"
            ) from error
        except _OF_TEMPLATES as error:
            raise BadRequest(
                "The model's chat template cannot render these messages.", param="messages"
            ) from error
        return ids


_NOT_THE_TEMPLATES = frozenset(signature(PreTrainedTokenizerBase.apply_chat_template).parameters)
"""Names that would reach the function which renders, not the template."""

_OF_TEMPLATES = (
    *(TypeError, ValueError, AttributeError, LookupError, ArithmeticError),
    *(RecursionError, MemoryError, NotImplementedError),
)
"""What an ill-written template, or a hostile one, ends with."""


def told(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None) -> list[dict[str, Any]]:
    """The messages for a template that knows nothing of tools: what can be called is in the system message,
    and what was called is text, in the form that such a model is held to (`tool_forms.form_of`)."""
    plain = [_with_calls(message) for message in messages]
    if not tools:
        return plain
    signatures = "\n".join(msgspec.json.encode(tool).decode() for tool in tools)
    said = _TOOLS.format(signatures=signatures, open=HERMES.before, close=HERMES.after)
    if plain and plain[0]["role"] == "system":
        return [{**plain[0], "content": f"{plain[0]['content']}\n\n{said}"}, *plain[1:]]
    return [{"role": "system", "content": said}, *plain]


_TOOLS = """You may call functions. These are their signatures:
<tools>
{signatures}
</tools>
To call one, write its name and its arguments like this:
{open}"<name>", "arguments": {{<arguments>}}{close}"""


def _with_calls(message: dict[str, Any]) -> dict[str, Any]:
    functions = [call["function"] for call in message.get("tool_calls", ()) if _is_call(call)]
    if not functions:
        return message
    written = [
        HERMES.head(one["name"]) + msgspec.json.encode(one["arguments"]).decode() + HERMES.after
        for one in functions
    ]
    return {**message, "content": "\n".join([message["content"], *written]).lstrip()}


def _is_call(call: Any) -> bool:
    function = call.get("function") if isinstance(call, dict) else None
    return isinstance(function, dict) and isinstance(function.get("name"), str) and "arguments" in function


def _with_object(call: Any) -> Any:
    """Templates write arguments as JSON themselves, so they want what the client's JSON says."""
    if not _is_call(call) or not isinstance(call["function"]["arguments"], str):
        return call
    try:
        arguments = msgspec.json.decode(call["function"]["arguments"], type=dict[str, Any])
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


def _written(given: Any) -> int:
    return 0 if given is None else len(msgspec.json.encode(given))


def _text(content: Any, at: int) -> str:
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if isinstance(content, list):
        parts = [part.get("text") if isinstance(part, dict) else None for part in content]
        if all(isinstance(part, str) for part in parts):
            return "".join(parts)  # type: ignore[arg-type]
    raise BadRequest(
        f"messages[{at}].content must be a string or a list of text parts.", param=f"messages[{at}].content"
    )
