"""What the OpenAPI document says in words and shows by example; types and bounds come from the structs.

`ENDPOINT` has the operations that a worker answers, by path; `OTHERS` the rest, by method and path. A test
sends every example to a running gateway and compares what comes back with the example of the answer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import msgspec

from openai_api import answers, endpoints, limits, management
from openai_api.protocol.tokenize import TokenChecks

MODEL = "smollm2-135m-instruct"
EMBEDDER = "all-minilm-l6-v2"
KEPT = "resp_5d0c9f6a4b7e4d1f8a2b3c4d5e6f7081"
"""The response that the examples speak of."""

TAGS = {
    "Chat": "Conversations and texts, in OpenAI's format.",
    "Responses": "OpenAI's newer format: answers that are kept and gone on from.",
    "Messages": "The same models, in Anthropic's format.",
    "Embeddings": "Texts as vectors, and texts compared.",
    "Tokens": "Texts as a model's tokens.",
    "Models": "What there is, and what was used.",
    "Keys": "One's projects and keys, for programs of a person who is logged in: what the page `/keys/` "
    "does. The session's cookie is sent along, and with what changes something its CSRF token. No key opens "
    "these.",
    "Service": "What machines ask of the server.",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """A value of the URL's query."""

    name: str
    schema: dict[str, Any]
    about: str
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """What is said of an operation beside its types."""

    id: str
    """OpenAI's own name of it, where it has one."""
    tag: str
    summary: str
    about: str = ""
    request: type[msgspec.Struct] | None = None
    required: tuple[str, ...] = ()
    """Fields of the request that its type does not demand."""
    example: dict[str, Any] | None = None
    answer: type[msgspec.Struct] | None = None
    answered: Any = None
    """An example of the answer."""
    text: str = ""
    """The media type of an answer that no struct describes."""
    bare: bool = False
    """Answered by the status alone."""
    events: type[msgspec.Struct] | None = None
    """What each event of a stream holds; None: it is not streamed, or `stream` says it in words."""
    stream: str = ""
    """An example of the stream."""
    query: tuple[Parameter, ...] = ()
    refusals: tuple[int, ...] = (400, 401, 403, 404, 413, 429, 500, 503, 504)
    error: type[msgspec.Struct] = answers.Error
    public: bool = False
    """Asked without a key."""
    session: bool = False
    """Asked by a person who is logged in, never with a key."""
    status: int = 200
    """Of an answer that is none of `refusals`."""
    deprecated: bool = False


def _events(*data: dict[str, Any] | str, named: bool = False) -> str:
    """The text of a stream of these events."""
    told = ""
    for one in data:
        if isinstance(one, dict):
            told += f"event: {one['type']}\n" if named else ""
            told += f"data: {msgspec.json.encode(one).decode()}\n\n"
        else:
            told += f"data: {one}\n\n"
    return told


_PROMPT_DETAILS = {"cached_tokens": 0, "audio_tokens": 0}
_COMPLETION_DETAILS = {
    "reasoning_tokens": 0,
    "audio_tokens": 0,
    "accepted_prediction_tokens": 0,
    "rejected_prediction_tokens": 0,
}
_USAGE = {
    "prompt_tokens": 12,
    "completion_tokens": 3,
    "total_tokens": 15,
    "prompt_tokens_details": _PROMPT_DETAILS,
    "completion_tokens_details": _COMPLETION_DETAILS,
}
_QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
_CREATED = 1790000000

_STREAMED = (
    "With `stream: true` the answer is a stream of server-sent events, each `data: {…}`, the last "
    "`data: [DONE]`. One that could not be finished ends with an error event and without `[DONE]`. "
)
_FIELDS = (
    "Fields of OpenAI's that are not listed are ignored; listed ones that the model cannot honour are "
    "refused by name."
)


def _chunk(delta: dict[str, Any], finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "id": "chatcmpl-req_1",
        "object": "chat.completion.chunk",
        "created": _CREATED,
        "model": MODEL,
        "choices": [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}],
    }


def _text_chunk(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {
        "id": "cmpl-req_1",
        "object": "text_completion",
        "created": _CREATED,
        "model": MODEL,
        "choices": [{"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}],
    }


_CHAT = Operation(
    id="createChatCompletion",
    tag="Chat",
    summary="Answer a conversation",
    about=_STREAMED + _FIELDS,
    required=("model", "messages"),
    example={"model": MODEL, "messages": _QUESTION},
    answer=answers.ChatCompletion,
    answered={
        "id": "chatcmpl-req_1",
        "object": "chat.completion",
        "created": _CREATED,
        "model": MODEL,
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Tokyo.", "refusal": None, "annotations": []},
                "logprobs": None,
                "finish_reason": "stop",
            }
        ],
        "usage": _USAGE,
    },
    events=answers.ChatCompletionChunk,
    stream=_events(
        _chunk({"role": "assistant", "content": "", "refusal": None}),
        _chunk({"content": "Tokyo."}),
        _chunk({}, "stop"),
        "[DONE]",
    ),
)

_COMPLETION = Operation(
    id="createCompletion",
    tag="Chat",
    summary="Go on from a text",
    about="`max_tokens` is 16 unless given. A choice's index is that of its prompt. " + _STREAMED + _FIELDS,
    required=("model", "prompt"),
    example={"model": MODEL, "prompt": "The capital of France is", "max_tokens": 8},
    answer=answers.Completion,
    answered={
        "id": "cmpl-req_1",
        "object": "text_completion",
        "created": _CREATED,
        "model": MODEL,
        "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "length"}],
        "usage": _USAGE,
    },
    events=answers.CompletionChunk,
    stream=_events(_text_chunk(" Paris"), _text_chunk(".", "length"), "[DONE]"),
)

_EMBEDDINGS = Operation(
    id="createEmbedding",
    tag="Embeddings",
    summary="Turn texts into vectors",
    about="`dimensions` is refused where the model cannot shorten its vectors.",
    required=("model", "input"),
    example={"model": EMBEDDER, "input": ["king", "queen"]},
    answer=answers.EmbeddingList,
    answered={
        "object": "list",
        "data": [
            {"object": "embedding", "index": 0, "embedding": [0.1, -0.2]},
            {"object": "embedding", "index": 1, "embedding": [0.2, -0.1]},
        ],
        "model": EMBEDDER,
        "usage": {"prompt_tokens": 6, "total_tokens": 6},
    },
)

_TO_RANK = {"model": EMBEDDER, "query": "steam engine", "documents": ["a locomotive", "a cake"]}
_RANKED = [{"index": 0, "relevance_score": 0.8}, {"index": 1, "relevance_score": 0.1}]
_RERANK = Operation(
    id="rerank",
    tag="Embeddings",
    summary="Order documents by how well they answer a query",
    required=("model", "query", "documents"),
    example=_TO_RANK,
    answer=answers.Ranking,
    answered={
        "id": "rerank-req_1",
        "model": EMBEDDER,
        "results": _RANKED,
        "usage": {"total_tokens": 12, "prompt_tokens": 12},
    },
)
_RERANK_COHERE = Operation(
    id="rerankAsCohere",
    tag="Embeddings",
    summary="The same, answered in Cohere's shape",
    required=("model", "query", "documents"),
    example=_TO_RANK,
    answer=answers.CohereRanking,
    answered={
        "id": "rerank-req_1",
        "results": _RANKED,
        "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
    },
)

_SCORE = Operation(
    id="score",
    tag="Embeddings",
    summary="How alike two texts are, or how well one answers the other",
    about="`text_1` may also be named `queries` or `data_1`; `text_2` also `documents`, `items` or "
    "`data_2`. One text on the left goes with each on the right, else they go pair by pair.",
    required=("model",),
    example={"model": EMBEDDER, "text_1": "steam engine", "text_2": ["a locomotive", "a cake"]},
    answer=answers.Scores,
    answered={
        "id": "score-req_1",
        "object": "list",
        "created": _CREATED,
        "model": EMBEDDER,
        "data": [
            {"object": "score", "index": 0, "score": 0.8},
            {"object": "score", "index": 1, "score": 0.1},
        ],
        "usage": {"prompt_tokens": 12, "total_tokens": 12},
    },
)

_OUTPUT = {
    "id": "msg_1_1",
    "type": "message",
    "status": "completed",
    "role": "assistant",
    "content": [{"type": "output_text", "text": "Tokyo.", "annotations": [], "logprobs": []}],
}
_RESPONSE = {
    "id": KEPT,
    "object": "response",
    "created_at": _CREATED,
    "completed_at": _CREATED + 1,
    "status": "completed",
    "background": False,
    "error": None,
    "incomplete_details": None,
    "instructions": None,
    "max_output_tokens": None,
    "max_tool_calls": None,
    "model": MODEL,
    "output": [_OUTPUT],
    "parallel_tool_calls": True,
    "previous_response_id": None,
    "prompt_cache_key": None,
    "reasoning": {"effort": None, "summary": None},
    "safety_identifier": None,
    "service_tier": "default",
    "store": True,
    "temperature": 1.0,
    "top_p": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "text": {"format": {"type": "text"}, "verbosity": "medium"},
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "truncation": "disabled",
    "usage": {
        "input_tokens": 12,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 15,
    },
    "user": None,
    "metadata": {},
}
_BEGUN = _RESPONSE | {"completed_at": None, "status": "in_progress", "output": [], "usage": None}
_AT_THE_PART = {"item_id": "msg_1_1", "output_index": 0, "content_index": 0}
_PART = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _numbered(*events: dict[str, Any]) -> list[dict[str, Any]]:
    return [one | {"sequence_number": at} for at, one in enumerate(events)]


_RESPONSES = Operation(
    id="createResponse",
    tag="Responses",
    summary="Answer a conversation, and keep it to go on from",
    about="Only tools of type `function` are supported. Unless `store` is `false`, the response is kept "
    "for the key's project: `previous_response_id` goes on from it. With `stream: true` the answer is a "
    "stream of events, from `response.created` to `response.completed`, `.incomplete` or `.failed`. "
    + _FIELDS,
    required=("model", "input"),
    example={"model": MODEL, "input": "What is the capital of Japan?"},
    answer=answers.Response,
    answered=_RESPONSE,
    events=answers.ResponseEvent,
    stream=_events(
        *_numbered(
            {"type": "response.created", "response": _BEGUN},
            {"type": "response.in_progress", "response": _BEGUN},
            {
                "type": "response.output_item.added",
                "output_index": 0,
                "item": _OUTPUT | {"status": "in_progress", "content": []},
            },
            {"type": "response.content_part.added", **_AT_THE_PART, "part": _PART},
            {"type": "response.output_text.delta", **_AT_THE_PART, "delta": "Tokyo.", "logprobs": []},
            {"type": "response.output_text.done", **_AT_THE_PART, "text": "Tokyo.", "logprobs": []},
            {"type": "response.content_part.done", **_AT_THE_PART, "part": _PART | {"text": "Tokyo."}},
            {"type": "response.output_item.done", "output_index": 0, "item": _OUTPUT},
            {"type": "response.completed", "response": _RESPONSE},
        ),
        named=True,
    ),
)

_MESSAGE_USAGE = {
    "input_tokens": 12,
    "cache_creation_input_tokens": 0,
    "cache_read_input_tokens": 0,
    "output_tokens": 3,
}
_MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": MODEL,
    "content": [{"type": "text", "text": "Tokyo."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": _MESSAGE_USAGE,
}
_MESSAGES = Operation(
    id="createMessage",
    tag="Messages",
    summary="Answer a conversation, in Anthropic's format",
    about="What chat completions refuse, this refuses. Errors have Anthropic's shape. With "
    "`stream: true` the answer is a stream of Anthropic's events, the last `message_stop`; one that "
    "could not be finished ends with an `error` event instead.",
    required=("model", "max_tokens", "messages"),
    example={"model": MODEL, "max_tokens": 64, "messages": _QUESTION},
    answer=answers.Message,
    answered=_MESSAGE,
    events=answers.MessageEvent,
    stream=_events(
        {
            "type": "message_start",
            "message": _MESSAGE
            | {"content": [], "stop_reason": None, "usage": _MESSAGE_USAGE | {"output_tokens": 0}},
        },
        {"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}},
        {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "Tokyo."}},
        {"type": "content_block_stop", "index": 0},
        {
            "type": "message_delta",
            "delta": {"stop_reason": "end_turn", "stop_sequence": None},
            "usage": _MESSAGE_USAGE,
        },
        {"type": "message_stop"},
        named=True,
    ),
    error=answers.MessageError,
)
_COUNT_TOKENS = Operation(
    id="countMessageTokens",
    tag="Messages",
    summary="How many tokens a conversation is, in Anthropic's format",
    about="Nothing is generated, and nothing is charged.",
    required=("model", "messages"),
    example={"model": MODEL, "messages": [{"role": "user", "content": "Hello"}]},
    answer=answers.InputTokens,
    answered={"input_tokens": 12},
    error=answers.MessageError,
)

_TOKENIZE = Operation(
    id="tokenize",
    tag="Tokens",
    summary="A text, or a conversation, as the model's tokens",
    about="Give `prompt` or `messages`.",
    required=("model",),
    example={"model": MODEL, "prompt": "The capital of Japan"},
    answer=answers.Tokenization,
    answered={"count": 4, "max_model_len": 8192, "tokens": [504, 3575, 282, 4409], "token_strs": None},
)
_DETOKENIZE = Operation(
    id="detokenize",
    tag="Tokens",
    summary="Tokens as text",
    required=("model", "tokens"),
    example={"model": MODEL, "tokens": [504, 3575, 282, 4409]},
    answer=answers.Detokenization,
    answered={"prompt": "The capital of Japan"},
)


def _alias(of: Operation, path: str) -> Operation:
    """Another path of the same."""
    return replace(of, id=f"{of.id}Alias", about=f"Another path of `{path}`.", deprecated=True)


ENDPOINT: dict[str, Operation] = {
    endpoints.CHAT.path: _CHAT,
    endpoints.COMPLETIONS.path: _COMPLETION,
    endpoints.RESPONSES.path: _RESPONSES,
    endpoints.MESSAGES.path: _MESSAGES,
    endpoints.COUNT_TOKENS.path: _COUNT_TOKENS,
    endpoints.EMBEDDINGS.path: _EMBEDDINGS,
    endpoints.RERANK.path: _RERANK,
    endpoints.RERANK_COHERE.path: _RERANK_COHERE,
    endpoints.SCORE.path: _SCORE,
    endpoints.TOKENIZE.path: _TOKENIZE,
    endpoints.DETOKENIZE.path: _DETOKENIZE,
    **{
        alias.path: _alias(told, original)
        for alias, told, original in zip(
            endpoints.ALIASES,
            (_TOKENIZE, _DETOKENIZE, _SCORE),
            (endpoints.TOKENIZE.path, endpoints.DETOKENIZE.path, endpoints.SCORE.path),
            strict=True,
        )
    },
}

_A_MODEL = {
    "id": MODEL,
    "object": "model",
    "created": _CREATED,
    "owned_by": "roundhouse",
    "max_model_len": 8192,
}
_SECONDS = {"type": "integer", "minimum": 0, "maximum": 253402300799}
_NAMES = {"type": "string"}
_OF_A_READ = (401, 403, 404, 500, 503)
_OF_A_SESSION = (401, 403, 404, 500, 503)
KEY = "mJ3fQ8sYw0Lk"
"""The key that the examples speak of."""
_KEY_TEXT = f"sk-{KEY}-…"
_WHEN = "2026-11-20T08:00:00Z"
_PROJECT = {
    "id": 1,
    "object": "project",
    "name": "research",
    "role": "member",
    "may_issue_keys": True,
    "time_zone": "UTC",
    "routes": [],
    "scopes": [],
    "priority": "default",
    "key_days": None,
    "max_keys": None,
}
_API_KEY = {
    "id": KEY,
    "object": "api_key",
    "name": "nightly build",
    "shown": f"sk-{KEY}-…4fQ2",
    "project": 1,
    "project_name": "research",
    "owner": "ann",
    "state": "usable",
    "routes": [],
    "scopes": ["chat"],
    "addresses": ["10.0.0.0/8"],
    "priority": "default",
    "metadata": {},
    "created_at": _WHEN,
    "expires_at": None,
    "revoked_at": None,
    "last_used_at": None,
    "secrets": [
        {"last4": "4fQ2", "created_at": _WHEN, "expires_at": None, "last_used_at": None, "works": True}
    ],
    "may_change": True,
    "may_rotate": True,
    "may_revoke": True,
}
_ITEM = {
    "id": "msg_1_0",
    "type": "message",
    "status": "completed",
    "role": "user",
    "content": [{"type": "input_text", "text": "What is the capital of Japan?"}],
}


def _usage(
    operation_id: str, summary: str, answer: type[msgspec.Struct], result: dict[str, Any]
) -> Operation:
    """One of the URLs that tell what was used, bucket by bucket; `result` is an example of one sum."""
    costs = "amount" in result
    widths = ["1d"] if costs else ["1m", "1h", "1d"]
    most = "180 days" if costs else "31 days, 168 hours or 1440 minutes"
    groups = [name for name, value in result.items() if value is None]
    bucket = {"object": "bucket", "start_time": 1789948800, "end_time": 1790035200, "results": [result]}
    return Operation(
        id=operation_id,
        tag="Models",
        summary=summary,
        about="Days, hours and minutes are UTC's.",
        answer=answer,
        answered={"object": "page", "data": [bucket], "has_more": False, "next_page": None},
        query=(
            Parameter(name="start_time", schema=_SECONDS, about="Unix seconds", required=True),
            Parameter(name="end_time", schema=_SECONDS, about="Unix seconds, after `start_time`; else now"),
            Parameter(name="bucket_width", schema={"enum": widths, "default": "1d"}, about="of a bucket"),
            Parameter(
                name="group_by",
                schema={"type": "array", "items": {"enum": groups}},
                about="one sum for each; repeated, as `group_by[]`, or with commas between",
            ),
            Parameter(name="project_ids", schema=_NAMES, about="only these, with commas between"),
            Parameter(name="api_key_ids", schema=_NAMES, about="only these, with commas between"),
            Parameter(name="user_ids", schema=_NAMES, about="only these, with commas between"),
            Parameter(name="models", schema=_NAMES, about="only these, with commas between"),
            Parameter(name="batch", schema={"type": "boolean"}, about="`true` finds nothing: no batches"),
            Parameter(
                name="limit",
                schema={"type": "integer", "minimum": 1, "maximum": 180 if costs else 1440},
                about=f"buckets on a page; at most {most}",
            ),
            Parameter(name="page", schema=_NAMES, about="the last answer's `next_page`"),
        ),
        refusals=(400, 401, 403, 500, 503),
    )


OTHERS: dict[tuple[str, str], Operation] = {
    ("get", "/v1/models"): Operation(
        id="listModels",
        tag="Models",
        summary="The models that this key may use",
        answer=answers.ModelList,
        answered={"object": "list", "data": [_A_MODEL]},
        refusals=(401, 403, 500, 503),
    ),
    ("get", "/v1/models/{model}"): Operation(
        id="retrieveModel",
        tag="Models",
        summary="One model",
        about="The name may hold slashes.",
        answer=answers.Model,
        answered=_A_MODEL,
        refusals=_OF_A_READ,
    ),
    ("get", "/v1/organization/usage/completions"): _usage(
        "usage-completions",
        "What the key's project had generated, by time",
        answers.UsagePage,
        {
            "object": "organization.usage.completions.result",
            "input_tokens": 12,
            "output_tokens": 3,
            "input_cached_tokens": 0,
            "input_audio_tokens": 0,
            "output_audio_tokens": 0,
            "num_model_requests": 1,
            "project_id": None,
            "user_id": None,
            "api_key_id": None,
            "model": None,
            "batch": None,
        },
    ),
    ("get", "/v1/organization/usage/embeddings"): _usage(
        "usage-embeddings",
        "What the key's project had embedded, by time",
        answers.EmbeddingsUsagePage,
        {
            "object": "organization.usage.embeddings.result",
            "input_tokens": 12,
            "num_model_requests": 1,
            "project_id": None,
            "user_id": None,
            "api_key_id": None,
            "model": None,
        },
    ),
    ("get", "/v1/organization/costs"): _usage(
        "usage-costs",
        "What all that the key's project used has cost, day by day",
        answers.CostsPage,
        {
            "object": "organization.costs.result",
            "amount": {"value": 0.000018, "currency": "usd"},
            "line_item": None,
            "project_id": None,
            "api_key_id": None,
        },
    ),
    ("get", "/v1/responses/{response_id}"): Operation(
        id="getResponse",
        tag="Responses",
        summary="Read a response that was kept",
        answer=answers.Response,
        answered=_RESPONSE,
        query=(
            Parameter(
                name="stream", schema={"type": "boolean"}, about="`true` is refused: it has ended already"
            ),
        ),
        refusals=(400, *_OF_A_READ),
    ),
    ("delete", "/v1/responses/{response_id}"): Operation(
        id="deleteResponse",
        tag="Responses",
        summary="Delete a response that was kept",
        answer=answers.DeletedResponse,
        answered={"id": KEPT, "object": "response.deleted", "deleted": True},
        refusals=_OF_A_READ,
    ),
    ("post", "/v1/responses/{response_id}/cancel"): Operation(
        id="cancelResponse",
        tag="Responses",
        summary="Cancel a response that runs in the background",
        about="None does here, so whatever is found is refused.",
        refusals=(400, *_OF_A_READ),
    ),
    ("get", "/v1/responses/{response_id}/input_items"): Operation(
        id="listInputItems",
        tag="Responses",
        summary="What a response answered",
        answer=answers.ItemList,
        answered={
            "object": "list",
            "data": [_ITEM],
            "first_id": "msg_1_0",
            "last_id": "msg_1_0",
            "has_more": False,
        },
        query=(
            Parameter(
                name="limit",
                schema={"type": "integer", "minimum": 1, "maximum": 100, "default": 20},
                about="items on a page",
            ),
            Parameter(
                name="order",
                schema={"enum": ["asc", "desc"], "default": "desc"},
                about="the newest first, or last",
            ),
            Parameter(name="after", schema=_NAMES, about="the last answer's `last_id`"),
        ),
        refusals=(400, *_OF_A_READ),
    ),
    ("post", "/v1/engines/{model}/embeddings"): replace(
        _EMBEDDINGS,
        request=endpoints.EMBEDDINGS.request,
        id="createEngineEmbedding",
        about="An old name of `/v1/embeddings`; the URL names the model, whatever the body says.",
        required=("input",),
        example={"input": ["king", "queen"]},
        deprecated=True,
    ),
    ("post", "/api/v1/token_check"): Operation(
        id="checkTokens",
        tag="Tokens",
        summary="Whether prompts fit their models",
        about="As FastChat answers it; `/tokenize` tells the same.",
        request=TokenChecks,
        example={"prompts": [{"model": MODEL, "prompt": "The capital of Japan", "max_tokens": 8}]},
        answer=answers.TokenChecked,
        answered={"prompts": [{"fits": True, "tokenCount": 4, "contextLength": 8192}]},
        deprecated=True,
    ),
    ("get", "/api/v1/projects"): Operation(
        id="listProjects",
        tag="Keys",
        summary="The projects in which one has a role",
        answer=answers.ProjectList,
        answered={"object": "list", "data": [_PROJECT]},
        refusals=(401, 500, 503),
        session=True,
    ),
    ("get", "/api/v1/keys"): Operation(
        id="listKeys",
        tag="Keys",
        summary="The keys of one's projects, the newest first",
        answer=answers.ApiKeyList,
        answered={
            "object": "list",
            "data": [_API_KEY],
            "first_id": KEY,
            "last_id": KEY,
            "has_more": False,
        },
        query=(
            Parameter(
                name="project",
                schema={"type": "integer", "minimum": 1, "maximum": 2**62},
                about="only this one's",
            ),
            Parameter(
                name="limit",
                schema={
                    "type": "integer",
                    "minimum": 1,
                    "maximum": management.MOST_ON_A_PAGE,
                    "default": management.PAGE,
                },
                about="keys on a page",
            ),
            Parameter(name="after", schema=_NAMES, about="the last answer's `last_id`"),
        ),
        refusals=(400, *_OF_A_SESSION),
        session=True,
    ),
    ("post", "/api/v1/keys"): Operation(
        id="createKey",
        tag="Keys",
        summary="Make a key of one's own",
        about="`key` is its text, shown this once. What is left out is as the project has it.",
        request=management.NewKeyRequest,
        example={"name": "nightly build", "project": 1, "scopes": ["chat"], "addresses": ["10.0.0.0/8"]},
        answer=answers.IssuedKey,
        answered=_API_KEY | {"key": _KEY_TEXT},
        status=201,
        refusals=(400, *_OF_A_SESSION, 413),
        session=True,
    ),
    ("get", "/api/v1/keys/{key_id}"): Operation(
        id="retrieveKey",
        tag="Keys",
        summary="One key, and which of its secrets is still used",
        answer=answers.ApiKey,
        answered=_API_KEY,
        refusals=_OF_A_SESSION,
        session=True,
    ),
    ("patch", "/api/v1/keys/{key_id}"): Operation(
        id="changeKey",
        tag="Keys",
        summary="Change what a key is called and may do",
        about="What is left out stays; `null` means as in a new key. With the change it must be a key that "
        "one could have made: what an administrator gave beyond that has to be given up with it.",
        request=management.KeyChangeRequest,
        example={"routes": ["smol*"], "priority": "batch"},
        answer=answers.ApiKey,
        answered=_API_KEY | {"routes": ["smol*"], "priority": "batch"},
        refusals=(400, *_OF_A_SESSION, 409, 413),
        session=True,
    ),
    ("post", "/api/v1/keys/{key_id}/rotate"): Operation(
        id="rotateKey",
        tag="Keys",
        summary="Give a key a new secret",
        about="`key` is its text, shown this once; the old ones work on for `overlap_seconds`.",
        request=management.KeyRotationRequest,
        example={"overlap_seconds": 3600},
        answer=answers.IssuedKey,
        answered=_API_KEY | {"key": _KEY_TEXT},
        refusals=(400, *_OF_A_SESSION, 409, 413),
        session=True,
    ),
    ("post", "/api/v1/keys/{key_id}/revoke"): Operation(
        id="revokeKey",
        tag="Keys",
        summary="Refuse a key everywhere within a second, for good",
        request=management.KeyRevocationRequest,
        example={"reason": "lost with a laptop"},
        answer=answers.ApiKey,
        answered=_API_KEY | {"state": "revoked", "revoked_at": _WHEN},
        refusals=(400, *_OF_A_SESSION, 413),
        session=True,
    ),
    ("get", "/v1/openapi.json"): Operation(
        id="getOpenApi",
        tag="Service",
        summary="This description",
        refusals=(500,),
        public=True,
        text="application/json",
    ),
    ("get", "/health"): Operation(
        id="getHealth",
        tag="Service",
        summary="Can any worker answer?",
        about="No body: 200, or 503 while no worker can answer anything. For load balancers.",
        refusals=(503,),
        public=True,
        bare=True,
    ),
    ("get", "/healthz"): Operation(
        id="getAlive",
        tag="Service",
        summary="Does the process answer?",
        answer=answers.Alive,
        answered={"status": "ok"},
        refusals=(),
        public=True,
    ),
    ("get", "/readyz"): Operation(
        id="getReady",
        tag="Service",
        summary="Can any key be served?",
        about="503, with the same fields, while the database does not answer.",
        answer=answers.Ready,
        answered={"status": "ok", "database": "ok", "redis": "ok", "spool_pending": 0},
        refusals=(503,),
        error=answers.Ready,
        public=True,
    ),
    ("get", "/version"): Operation(
        id="getVersion",
        tag="Service",
        summary="Which version this is",
        answer=answers.Version,
        answered={"version": "0.1.0"},
        refusals=(),
        public=True,
    ),
    ("get", "/metrics"): Operation(
        id="getMetrics",
        tag="Service",
        summary="Figures for Prometheus",
        about="For scrapers on this machine, with the token `ROUNDHOUSE_METRICS_TOKEN`, and for staff who "
        "are logged in; no API key opens it.",
        refusals=(403,),
        public=True,
        text="text/plain",
    ),
}

REFUSALS = {
    400: "A field cannot be used as it stands; `param` names it.",
    401: "No key was sent, or a wrong one; under `/api/v1/keys`: nobody is logged in.",
    403: "The key may not use this model; under `/api/v1/keys`: the person's role does not allow it.",
    404: "There is no such thing: the model, the response, or the key.",
    409: "The key has ended: it can no more be changed, or get a secret.",
    413: f"The body is larger than {limits.BODY_BYTES // 1024**2} MiB; under `/api/v1/keys`: than "
    f"{management.BODY_BYTES // 1024} KiB.",
    429: "A limit or a budget is used up; `Retry-After` says when to come back.",
    500: "A fault of ours; it is logged under the `x-request-id`.",
    503: "No capacity, or no storage, at the moment; `Retry-After` says when to come back.",
    504: "The operator gives a request of this model no more time.",
}
"""What a status means."""

_TEMPLATE = "Of the chat template; honoured where the model's engine can"
FIELDS: dict[str, str] = {
    "addresses": "Networks from which it may be used, such as `10.0.0.0/8`; none: from everywhere",
    "add_generation_prompt": "Whether the prompt ends by asking for an answer",
    "add_special_tokens": "Whether the tokenizer's own tokens are put around the text",
    "allowed_token_ids": "Only these tokens may be generated",
    "audio": "Refused: answers are text",
    "background": "Refused when true: an answer comes at once",
    "bad_words": f"Texts that are never generated, of {limits.STOP_STRING_BYTES} bytes each",
    "best_of": "Refused above `n`",
    "chat_template": "Refused: the model's own is used",
    "chat_template_kwargs": "Plain values for the model's template, such as `enable_thinking`",
    "continue_final_message": "Go on with the last message instead of answering it",
    "conversation": "Refused: name the `previous_response_id` instead",
    "data_1": "Another name of `text_1`",
    "data_2": "Another name of `text_2`",
    "dimensions": "Length of the vectors, where the model can shorten them",
    "documents": "Texts",
    "echo": "Begin the answer with the prompt",
    "embed_dtype": "`float32`, where the engine has no other",
    "expires_at": "When it ends; without a zone in UTC",
    "encoding_format": "Vectors as numbers, or as base64 of little-endian float32",
    "endianness": "Of base64",
    "frequency_penalty": "Lowers what was said, the more the oftener",
    "function_call": "The older `tool_choice`; refused",
    "functions": "The older `tools`; refused",
    "guided_choice": "The older `structured_outputs.choice`",
    "guided_grammar": "The older `structured_outputs.grammar`",
    "guided_json": "The older `structured_outputs.json`",
    "guided_regex": "The older `structured_outputs.regex`",
    "ignore_eos": "Go on when the model would end",
    "include": "`message.output_text.logprobs` asks for log probabilities; others change nothing",
    "include_reasoning": "Whether the answer tells what the model thought",
    "include_stop_str_in_output": "Keep the stop string in the answer",
    "input": "What is to be answered, or turned into vectors",
    "instruction": "What the ranking is for, where the model reads it",
    "instructions": "What the model is told before the conversation",
    "items": "Another name of `text_2`",
    "length_penalty": "Of beam search",
    "logit_bias": "What is added to a token's score, by its id",
    "logprob_token_ids": "Tokens whose log probability is told",
    "logprobs": "Tell log probabilities; of completions: of so many tokens at each place",
    "max_chunks_per_doc": "Of long documents, where the engine cuts them",
    "max_completion_tokens": "Most tokens of one answer; wins over `max_tokens`",
    "max_output_tokens": "Most tokens of the answer",
    "max_tokens": "Most tokens of one answer",
    "max_tokens_per_doc": "Most tokens that are read of one document",
    "max_tool_calls": "Of tools that the server runs; there are none",
    "mcp_servers": "Refused: declare tools instead",
    "messages": "The conversation, the oldest first",
    "metadata": "Kept with the response",
    "min_p": "Tokens less likely than this share of the likeliest are left out",
    "min_tokens": "The answer does not end before",
    "modalities": "`text`; any other is refused",
    "model": "One of `GET /v1/models`",
    "n": "How many answers",
    "name": "Who or what uses it; shown in reports",
    "normalize": "Whether vectors have length 1",
    "output_config": "Effort, and the JSON schema of the answer",
    "overlap_seconds": "How long the old secrets work on",
    "parallel_tool_calls": "Whether several tools may be called at once",
    "priority": "Who goes first when all workers are busy: `interactive`, `default`, `batch`",
    "project": "One in which one may issue keys",
    "presence_penalty": "Lowers what was said at all",
    "previous_response_id": "The response to go on from",
    "prompt": "The text to go on from; several, or token ids",
    "prompt_cache_key": "Requests that name the same go to the same worker, where its cache saves work",
    "prompt_logprobs": "Tell the prompt's log probabilities, so many at each place; not streamed",
    "queries": "Another name of `text_1`",
    "query": "What the documents are to answer",
    "rank_fields": "`text`, where the engine knows no other",
    "reason": "Why; shown in the key's timeline",
    "reasoning": "How hard the model thinks",
    "reasoning_effort": "How hard the model thinks",
    "repetition_detection": "Of vLLM: when an answer that repeats itself is ended",
    "repetition_penalty": "Above 1 lowers what was said, in the prompt too",
    "response_format": "Text, JSON, or JSON of a schema",
    "return_documents": "Whether the ranking repeats the texts",
    "return_prompt_text": "Tell the prompt as the model read it",
    "return_token_ids": "Tell token ids beside texts",
    "return_token_strs": "Tell tokens as texts too",
    "return_tokens_as_token_ids": "Write tokens as `token_id:N` in log probabilities",
    "routes": "Models that it may use; `*` stands for any characters. None: all that the project may",
    "scopes": "Groups of endpoints that it may use. None: all that the project may",
    "safety_identifier": "Changes nothing",
    "seed": "The same seed gives the same answer, as far as the engine can",
    "skip_special_tokens": "Leave the tokenizer's own tokens out of the text",
    "spaces_between_special_tokens": "Put spaces between them",
    "stop": f"Texts that end the answer, {limits.STOP_STRINGS} of {limits.STOP_STRING_BYTES} bytes",
    "stop_sequences": f"Texts that end the answer, of {limits.STOP_STRING_BYTES} bytes each",
    "stop_token_ids": "Tokens that end the answer",
    "store": "Keep the response; true unless given",
    "stream": "Send the answer while it is made",
    "stream_options": "`include_usage`: the last chunk tells the usage",
    "structured_outputs": "The form of the answer, one of them",
    "suffix": "The text that comes after, where the model can fill in",
    "system": "What the model is told before the conversation",
    "temperature": "0 takes the likeliest token, higher varies more",
    "text": "The form of the answer",
    "text_1": "The left side",
    "text_2": "The right side",
    "thinking": "Whether, and how long, the model thinks",
    "thinking_token_budget": "Most tokens of thought",
    "tokens": "Token ids",
    "tool_choice": "Which tool is called, if any",
    "tools": "Functions that the model may call",
    "top_k": "Only so many of the likeliest tokens; 0 or -1: all",
    "top_logprobs": "So many at each place; needs `logprobs`",
    "top_n": "Only the best of the ranking",
    "top_p": "Only the likeliest tokens that make up this share",
    "truncate_prompt_tokens": "Cut what is longer, -1: to the model's limit; else it is refused",
    "truncation_side": "Which side is cut",
    "use_activation": "Whether scores are brought between 0 and 1",
    "use_beam_search": "Of vLLM: search instead of sampling",
    "user": "Repeated in the answer",
    "verbosity": "How much the answer says",
    "web_search_options": "Refused: nothing is searched",
}
"""What a request's field means wherever it has this name, unless `OF_SCHEMA` says otherwise."""

OF_SCHEMA: dict[tuple[str, str], str] = {
    ("ChatCompletionRequest", "documents"): "Texts that the template shows the model",
    ("ChatCompletionRequest", "logprobs"): "Tell the log probability of each token",
    ("ChatCompletionRequest", "echo"): "Refused",
    ("ChatCompletionRequest", "max_tokens"): "The older `max_completion_tokens`",
    ("CompletionRequest", "logprobs"): "Tell the log probabilities of so many tokens at each place",
    (
        "CompletionRequest",
        "max_tokens",
    ): "Most tokens of one answer; 16 unless given, 0 only reads",
    ("EmbeddingRequest", "input"): "A text, several, or token ids",
    ("EmbeddingRequest", "messages"): "Refused: give `input`",
    ("NewKeyRequest", "metadata"): "Notes for programs",
    ("KeyChangeRequest", "metadata"): "Notes for programs",
    ("RerankRequest", "documents"): "The texts to order",
    ("ResponsesRequest", "input"): "A text, or the items of a conversation",
    ("ResponsesRequest", "prompt"): "Refused: stored prompts are not served",
    ("ScoreRequest", "documents"): "Another name of `text_2`",
    ("TokenizeRequest", "prompt"): "A text as it stands",
    ("TokenizeRequest", "messages"): "A conversation, as the model's template writes it",
}
