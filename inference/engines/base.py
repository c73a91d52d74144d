"""The contract of an engine that runs behind our own HTTP server (`transformers`, `simulated`).

An engine turns a `GenerationRequest` into `Delta`s. It knows nothing of HTTP, keys or routes.
Errors:

    EngineError
    ├── BadRequest        the request cannot be honoured; names the field; the engine goes on
    └── LoadError         the model cannot be served; carries a Cause; the process ends
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from inference.engines.tool_forms import Form
from inference.protocol import Cause, Load, Progress, Upstream


class EngineError(Exception):
    """Base of what an engine raises on purpose."""


class BadRequest(EngineError):
    """The request cannot be honoured as it stands. Retrying cannot help; the engine is well."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class LoadError(EngineError):
    """The model cannot be loaded. `cause` says whether a retry can help."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose tokens. Checked by the server before it reaches an engine."""

    max_tokens: int | None = None
    """Most tokens to generate; None: what the context leaves. 0 only with a prompt."""
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    """0: off."""
    min_p: float = 0.0
    """Leaves out tokens less likely than this share of the likeliest."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = field(default_factory=dict)
    """What is added to a token's score, by its id."""
    seed: int | None = None
    """The same one gives the same text; of several answers each has its own."""
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    """The stop string, or the text of the token, that ended the answer is its last part."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    """The answer does not end before, unless its form does."""
    bad_words: tuple[str, ...] = ()
    """Never generated in the tokens that spell them, in the middle of a text and at its beginning."""
    allowed_token_ids: tuple[int, ...] | None = None
    """The only tokens to choose from; None: all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tools:
    """Functions that the answer may call, and whether it must."""

    functions: list[dict[str, Any]]
    """As in the OpenAI API, `{"type": "function", "function": {…}}`, already checked."""
    required: bool = False
    named: str | None = None
    """The one function that must be called."""
    parallel: bool = True
    """Several calls in one answer are wanted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Structured:
    """What form the text must have: one of the choices, a text that the regex or the grammar allows, or
    else JSON of the schema."""

    param: str
    """The field that asked for it; refusals name it."""
    schema: dict[str, Any] | bool = True
    compact: bool = False
    """JSON without spaces between its parts."""
    choices: tuple[str, ...] = ()
    regex: str | None = None
    grammar: str | None = None
    """In Lark's syntax or llama.cpp's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Template:
    """What the model's chat template is told besides the messages."""

    generation_prompt: bool = True
    """Begin an answer after the last message."""
    continued: bool = False
    """Leave the last message open: the answer goes on with it."""
    values: dict[str, Any] = field(default_factory=dict)
    """Of the template's own variables."""


PLAIN = Template()


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    request_id: str
    messages: list[dict[str, Any]] = field(default_factory=list)
    """As in the OpenAI API, content already checked to be text."""
    template: Template = PLAIN
    prompt: str | list[int] | None = None
    """Text, or token ids, to go on from as it stands; then there are no messages."""
    echo: bool = False
    """Begin with the prompt's own text: a first delta of no generated token."""
    sampling: Sampling
    sample: int = 0
    """Which of several answers to the same prompt this is."""
    top_logprobs: int | None = None
    """Tell each token's logarithmic probability, and those of so many likeliest ones; None: neither."""
    prompt_logprobs: int | None = None
    """How many of the likeliest tokens to tell beside each of the prompt's own; None: nothing of it."""
    token_ids: bool = False
    """Tell each token's id, and those of the prompt."""
    begun: tuple[int, ...] = ()
    """Tokens of the answer that were told already, by an engine that died since: go on after them. They count
    for `sampling`, and not for the deltas' `completion_tokens`."""
    tools: Tools | None = None
    """A call is written in the text, in the engine's form; `tools.CallParser` reads it."""
    structured: Structured | None = None
    reasoning_effort: str | None = None


def too_long(context_length: int, tokens: int, request: GenerationRequest) -> BadRequest:
    """Its prompt leaves no room for an answer. Clients look for these words."""
    what = "messages" if request.prompt is None else "prompt"
    return BadRequest(
        f"This model's maximum context length is {context_length} tokens. However, your {what} resulted in "
        f"{tokens} tokens. Please reduce the length of the {what}.",
        param=what,
        code="context_length_exceeded",
    )


def check_token_ids(prompt: list[int], size: int, *, param: str = "prompt") -> None:
    """Raises BadRequest for ids that a vocabulary of this size does not have."""
    if prompt and (min(prompt) < 0 or max(prompt) >= size):
        bad = next(token for token in prompt if not 0 <= token < size)
        raise BadRequest(
            f"Token id {bad} is out of vocabulary: ids of this model are below {size}.",
            param=param,
            code="invalid_value",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """One token of an answer, or of a prompt that is echoed."""

    id: int
    text: str
    raw: bytes
    """Its bytes; the text of a token that ends within a character is not all of it."""
    logprob: float | None
    """None for a prompt's first token, before which there is nothing."""
    top: tuple[Token, ...] = ()
    """The likeliest tokens in its place, likeliest first, as many as were asked for."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Detail:
    """What only few answers have."""

    reasoning: str = ""
    """Thoughts before the answer, no part of its text."""
    reasoning_tokens: int = 0
    """Tokens of them so far."""
    tokens: tuple[Token, ...] = ()
    """The tokens of the delta's text, when `top_logprobs` or `token_ids` ask for them. Joined over all
    deltas their texts are the text."""
    prompt_token_ids: tuple[int, ...] | None = None
    """With the first delta, when `token_ids` asks for them."""
    prompt_logprobs: list[dict[str, dict[str, Any]] | None] | None = None
    """With the first delta, when they are asked for: of each of the prompt's tokens by id, as vLLM tells it,
    what is said of it and of the likeliest in its place; nothing of the first one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Delta:
    """One step of an answer. The last one has a `finish_reason`, and only that one."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    """Tokens generated so far for this request, those that gave no text included."""
    cached_tokens: int = 0
    finish_reason: str | None = None
    """`stop` or `length`."""
    stop: str | int | None = None
    """The stop string that ended it, or the token of `stop_token_ids`, where one did."""
    ids: tuple[int, ...] = ()
    """The tokens generated since the delta before, where the engine can go on after them (`begun`)."""
    detail: Detail | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """What to load, decided by the deployment."""

    model_path: Path | None
    """Folder with config, tokenizer and safetensors; None for engines without weights."""
    slots: int
    chat_template: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)
    upstream: Upstream | None = None


class Model(Protocol):
    """What the process around an engine needs of it, whatever it answers. One event loop calls it; it
    may own threads."""

    capabilities: frozenset[str]
    """Request fields it honours beyond those every engine does, and `endpoint:NAME` for each endpoint
    that it answers; whole after `load`."""

    context_length: int
    """Most tokens of prompt and answer together; known after `load`."""

    async def load(self, progress: Callable[[Progress], None]) -> None:
        """Get ready to answer, reporting progress. Raises LoadError."""

    def load_report(self) -> Load: ...

    def healthy(self) -> bool:
        """False when the engine can never answer again; the worker then ends and is replaced. One that can
        say why raises LoadError instead."""

    async def close(self) -> None: ...


class Engine(Model, Protocol):
    """An engine that generates text."""

    tool_form: Form
    """How its texts write calls; known after `load`."""

    def generate(self, request: GenerationRequest) -> AsyncIterator[Delta]:
        """Yield the answer. Closing the iterator aborts: no further step is spent on it.

        Raises BadRequest at the first step, or EngineError when the engine itself failed.
        """

    async def tokenize(
        self,
        prompt: str | list[dict[str, Any]],
        *,
        special_tokens: bool,
        template: Template = PLAIN,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[tuple[int, str]]:
        """The ids of a text, or of messages in the model's chat template, each with the token's own
        spelling. Raises BadRequest for messages that cannot be rendered."""

    async def detokenize(self, tokens: list[int]) -> str:
        """Raises BadRequest for ids out of the vocabulary."""
