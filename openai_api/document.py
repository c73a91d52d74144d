"""The OpenAPI document: made from the structs that parse requests and from the DRF views' URLs, so that
what is served and what is described cannot differ by name, type or bound."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass
from functools import cache
from typing import Any

import msgspec

from openai_api import answers, endpoints
from openai_api.endpoints import ENDPOINTS
from openai_api.urls import urlpatterns

VERSION = "1.0"

_MODEL = "smollm2-135m-instruct"
_EMBEDDER = "all-minilm-l6-v2"
_USAGE = {"prompt_tokens": 12, "completion_tokens": 3, "total_tokens": 15}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Told:
    """What is said of an operation beside its types."""

    summary: str
    answer: type[msgspec.Struct] | None = None
    about: str = ""
    required: tuple[str, ...] = ()
    example: dict[str, Any] | None = None
    answered: dict[str, Any] | None = None
    query: tuple[tuple[str, dict[str, Any], str], ...] = ()


_STREAMED = (
    "With `stream: true` the answer is a stream of server-sent events, each `data: {…}`, the last "
    "`data: [DONE]`. One that could not be finished ends with an error event and without `[DONE]`. "
    "Fields of OpenAI's that are not listed are ignored; listed ones that the model cannot honour are "
    "refused by name."
)

_OF_ENDPOINT = {
    endpoints.CHAT.path: _Told(
        summary="Answer a conversation",
        about=_STREAMED,
        answer=answers.ChatCompletion,
        required=("model", "messages"),
        example={"model": _MODEL, "messages": [{"role": "user", "content": "What is the capital of Japan?"}]},
        answered={
            "id": "chatcmpl-req_1",
            "object": "chat.completion",
            "created": 1790000000,
            "model": _MODEL,
            "choices": [
                {
                    "index": 0,
                    "message": {"role": "assistant", "content": "Tokyo.", "refusal": None},
                    "logprobs": None,
                    "finish_reason": "stop",
                }
            ],
            "usage": _USAGE,
        },
    ),
    endpoints.COMPLETIONS.path: _Told(
        summary="Go on from a text",
        about="`max_tokens` is 16 unless given. A choice's index is that of its prompt. " + _STREAMED,
        answer=answers.Completion,
        required=("model", "prompt"),
        example={"model": _MODEL, "prompt": "The capital of France is", "max_tokens": 8},
        answered={
            "id": "cmpl-req_1",
            "object": "text_completion",
            "created": 1790000000,
            "model": _MODEL,
            "choices": [{"index": 0, "text": " Paris.", "logprobs": None, "finish_reason": "length"}],
            "usage": _USAGE,
        },
    ),
    endpoints.EMBEDDINGS.path: _Told(
        summary="Turn texts into vectors",
        about="`dimensions` is refused where the model cannot shorten its vectors.",
        answer=answers.EmbeddingList,
        required=("model", "input"),
        example={"model": _EMBEDDER, "input": ["king", "queen"]},
        answered={
            "object": "list",
            "data": [
                {"object": "embedding", "index": 0, "embedding": [0.1, -0.2]},
                {"object": "embedding", "index": 1, "embedding": [0.2, -0.1]},
            ],
            "model": _EMBEDDER,
            "usage": {"prompt_tokens": 6, "total_tokens": 6},
        },
    ),
    endpoints.RERANK.path: _Told(
        summary="Order documents by how well they answer a query",
        answer=answers.Ranking,
        required=("model", "query", "documents"),
        example={"model": _EMBEDDER, "query": "steam engine", "documents": ["a locomotive", "a cake"]},
        answered={
            "id": "rank-1",
            "model": _EMBEDDER,
            "results": [{"index": 0, "relevance_score": 0.8}, {"index": 1, "relevance_score": 0.1}],
            "usage": {"total_tokens": 12, "prompt_tokens": 12},
        },
    ),
    endpoints.RERANK_COHERE.path: _Told(
        summary="The same, answered in Cohere's shape",
        answer=answers.CohereRanking,
        required=("model", "query", "documents"),
        example={"model": _EMBEDDER, "query": "steam engine", "documents": ["a locomotive", "a cake"]},
        answered={
            "id": "rank-1",
            "results": [{"index": 0, "relevance_score": 0.8}, {"index": 1, "relevance_score": 0.1}],
            "meta": {"api_version": {"version": "2"}, "billed_units": {"search_units": 1}},
        },
    ),
    endpoints.RESPONSES.path: _Told(
        summary="Answer a conversation, and keep it to go on from",
        about="Only tools of type `function` are supported. Unless `store` is `false`, the response is kept "
        "for the key's project: `previous_response_id` goes on from it, `GET` and `DELETE` on "
        "`/v1/responses/{id}` read and delete it, `GET /v1/responses/{id}/input_items` lists what it "
        "answered. With `stream: true` the answer is a stream of events, from `response.created` to "
        "`response.completed`, `.incomplete` or `.failed`. Fields of OpenAI's that are not listed are "
        "ignored; listed ones that the model cannot honour are refused by name.",
        answer=answers.Response,
        required=("model", "input"),
        example={"model": _MODEL, "input": "What is the capital of Japan?"},
        answered={
            "id": "resp_1",
            "object": "response",
            "created_at": 1790000000,
            "completed_at": 1790000001,
            "status": "completed",
            "incomplete_details": None,
            "error": None,
            "model": _MODEL,
            "previous_response_id": None,
            "instructions": None,
            "output": [
                {
                    "id": "msg_1_1",
                    "type": "message",
                    "status": "completed",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "Tokyo.", "annotations": [], "logprobs": []}],
                }
            ],
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": True,
            "text": {"format": {"type": "text"}, "verbosity": "medium"},
            "reasoning": {"effort": None, "summary": None},
            "max_output_tokens": None,
            "temperature": 1.0,
            "top_p": 1.0,
            "store": True,
            "usage": {
                "input_tokens": 12,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": 3,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 15,
            },
            "metadata": {},
        },
    ),
    endpoints.MESSAGES.path: _Told(
        summary="Answer a conversation, in Anthropic's format",
        about="What chat completions refuse, this refuses. Errors have Anthropic's shape. With "
        "`stream: true` the answer is a stream of Anthropic's events, the last `message_stop`; one that "
        "could not be finished ends with an `error` event instead. The key may be sent as `x-api-key`.",
        answer=answers.Message,
        required=("model", "max_tokens", "messages"),
        example={
            "model": _MODEL,
            "max_tokens": 64,
            "messages": [{"role": "user", "content": "What is the capital of Japan?"}],
        },
        answered={
            "id": "msg_1",
            "type": "message",
            "role": "assistant",
            "model": _MODEL,
            "content": [{"type": "text", "text": "Tokyo."}],
            "stop_reason": "end_turn",
            "stop_sequence": None,
            "usage": {"input_tokens": 12, "output_tokens": 3},
        },
    ),
    endpoints.COUNT_TOKENS.path: _Told(
        summary="How many tokens a conversation is, in Anthropic's format",
        answer=answers.InputTokens,
        required=("model", "messages"),
        example={"model": _MODEL, "messages": [{"role": "user", "content": "Hello"}]},
        answered={"input_tokens": 12},
    ),
    endpoints.TOKENIZE.path: (
        _TOKENIZE := _Told(
            summary="A text, or a conversation, as the model's tokens",
            about="Give `prompt` or `messages`.",
            answer=answers.Tokenization,
            required=("model",),
            example={"model": _MODEL, "prompt": "The capital of Japan"},
            answered={"count": 4, "max_model_len": 8192, "tokens": [504, 3575, 282, 4409]},
        )
    ),
    endpoints.DETOKENIZE.path: (
        _DETOKENIZE := _Told(
            summary="Tokens as text",
            answer=answers.Detokenization,
            required=("model", "tokens"),
            example={"model": _MODEL, "tokens": [504, 3575, 282, 4409]},
            answered={"prompt": "The capital of Japan"},
        )
    ),
    endpoints.SCORE.path: (
        _SCORE := _Told(
            summary="How alike two texts are, or how well one answers the other",
            about="`text_1` may also be named `queries` or `data_1`; `text_2` also `documents`, `items` or "
            "`data_2`. One text on the left goes with each on the right, else they go pair by pair.",
            answer=answers.Scores,
            required=("model",),
            example={"model": _EMBEDDER, "text_1": "steam engine", "text_2": ["a locomotive", "a cake"]},
            answered={
                "id": "score-1",
                "object": "list",
                "created": 1790000000,
                "model": _EMBEDDER,
                "data": [
                    {"object": "score", "index": 0, "score": 0.8},
                    {"object": "score", "index": 1, "score": 0.1},
                ],
                "usage": {"prompt_tokens": 12, "total_tokens": 12},
            },
        )
    ),
    **{
        alias.path: told
        for alias, told in zip(endpoints.ALIASES, (_TOKENIZE, _DETOKENIZE, _SCORE), strict=True)
    },
}
_A_MODEL = {
    "id": _MODEL,
    "object": "model",
    "created": 1790000000,
    "owned_by": "roundhouse",
    "max_model_len": 8192,
}
_SECONDS = {"type": "integer", "minimum": 0}
_OF_VIEW = {
    "Models": _Told(
        summary="The models that this key may use",
        answer=answers.ModelList,
        answered={"object": "list", "data": [_A_MODEL]},
    ),
    "ModelDetail": _Told(
        summary="One model",
        about="The name may hold slashes.",
        answer=answers.Model,
        answered=_A_MODEL,
    ),
    "CompletionsUsage": _Told(
        summary="What the key's project used, by time",
        answer=answers.UsagePage,
        answered={"object": "page", "data": [], "has_more": False, "next_page": None},
        query=(
            ("start_time", _SECONDS, "Unix seconds; required"),
            ("end_time", _SECONDS, "Unix seconds; now unless given"),
            ("bucket_width", {"enum": ["1m", "1h", "1d"]}, "one day unless given"),
            ("group_by", {"type": "string"}, "project_id, api_key_id, user_id, model; may be repeated"),
            ("limit", {"type": "integer", "minimum": 1}, "buckets on a page"),
            ("page", {"type": "string"}, "the last answer's `next_page`"),
        ),
    ),
}

_REFUSALS = {
    "400": "A field cannot be used as it stands; `param` names it.",
    "401": "No key was sent, or a wrong one.",
    "403": "The key may not use this model.",
    "404": "There is no such model.",
    "413": "The body is too large.",
    "503": "No capacity, or no storage, at the moment; `Retry-After` says when to come back.",
}
_REFUSED = {
    "error": {
        "message": "Missing required parameter: 'model'.",
        "type": "invalid_request_error",
        "param": "model",
        "code": "missing_required_parameter",
    }
}


@cache
def document() -> dict[str, Any]:
    """The OpenAPI 3.1 document. Callers do not change it."""
    told = {one: _OF_ENDPOINT[one.path] for one in ENDPOINTS}
    types: list[Any] = [one.request for one in ENDPOINTS]
    types += [one.answer for one in (*told.values(), *_OF_VIEW.values()) if one.answer is not None]
    _, schemas = msgspec.json.schema_components(
        list(dict.fromkeys([*types, answers.Error])), ref_template="#/components/schemas/{name}"
    )
    paths: dict[str, Any] = {}
    for endpoint, about in told.items():
        name = endpoint.request.__name__
        schemas[name]["required"] = list(about.required)
        paths[endpoint.path] = {"post": _operation(endpoint.path, about, request=name)}
    for pattern in urlpatterns:
        view = pattern.callback.view_class  # type: ignore[attr-defined]
        url, names = _url(str(pattern.pattern))
        paths[url] = {"get": _operation(url, _OF_VIEW.get(view.__name__) or _from_docstring(view), names)}
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Roundhouse",
            "version": VERSION,
            "description": "Language models behind OpenAI's API. Every error, on every path, has the one "
            "shape `Error`; every answer carries `x-request-id`.",
        },
        "servers": [{"url": "/"}],
        "security": [{"key": []}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "key": {"type": "http", "scheme": "bearer", "description": "A key: `Authorization: Bearer …`"}
            },
            "responses": {
                status: {
                    "description": sentence,
                    "content": {
                        "application/json": {
                            "schema": {"$ref": "#/components/schemas/Error"},
                            **({"example": _REFUSED} if status == "400" else {}),
                        }
                    },
                }
                for status, sentence in _REFUSALS.items()
            },
        },
    }


@cache
def document_json() -> bytes:
    return msgspec.json.encode(document())


def _operation(
    url: str, told: _Told, parameters: tuple[str, ...] = (), *, request: str | None = None
) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{told.answer.__name__}"} if told.answer else {"type": "object"}
    answer: dict[str, Any] = {"schema": schema}
    if told.answered is not None:
        answer["example"] = told.answered
    content = {"application/json": answer}
    if request in ("MessagesRequest", "ChatCompletionRequest", "CompletionRequest", "ResponsesRequest"):
        content["text/event-stream"] = {"schema": {"type": "string"}}
    operation: dict[str, Any] = {
        "operationId": re.sub(r"\W+", "_", url.strip("/")),
        "summary": told.summary,
        "responses": {
            "200": {"description": "The answer.", "content": content},
            **{status: {"$ref": f"#/components/responses/{status}"} for status in _REFUSALS},
        },
    }
    if told.about:
        operation["description"] = told.about
    named = [
        {"name": one, "in": "path", "required": True, "schema": {"type": "string"}} for one in parameters
    ]
    asked = [
        {
            "name": name,
            "in": "query",
            "required": text.endswith("required"),
            "schema": schema,
            "description": text,
        }
        for name, schema, text in told.query
    ]
    if named or asked:
        operation["parameters"] = named + asked
    if request is not None:
        operation["requestBody"] = {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {"$ref": f"#/components/schemas/{request}"},
                    "example": told.example,
                }
            },
        }
    return operation


def _url(pattern: str) -> tuple[str, tuple[str, ...]]:
    """Django's pattern as OpenAPI writes it, and its parameters."""
    names = tuple(re.findall(r"<(?:\w+:)?(\w+)>", pattern))
    return "/" + re.sub(r"<(?:\w+:)?(\w+)>", r"{\1}", pattern), names


def _from_docstring(view: type) -> _Told:
    return _Told(summary=(inspect.getdoc(view) or view.__name__).split("\n")[0])
