"""OpenAI's objects as we send them. Answers are relayed, not built from these: they are what the OpenAPI
document says, and tests read real answers by them."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

import msgspec


class PromptDetails(msgspec.Struct):
    cached_tokens: int | None = None
    audio_tokens: int | None = None


class CompletionDetails(msgspec.Struct):
    reasoning_tokens: int | None = None
    audio_tokens: int | None = None
    accepted_prediction_tokens: int | None = None
    rejected_prediction_tokens: int | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails | None = None
    completion_tokens_details: CompletionDetails | None = None


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float | None
    bytes: list[int] | None = None


class ContentLogprob(TokenLogprob):
    top_logprobs: list[TokenLogprob] = []


class ChatLogprobs(msgspec.Struct):
    content: list[ContentLogprob] | None
    refusal: list[ContentLogprob] | None = None


class CalledFunction(msgspec.Struct):
    name: str
    arguments: str
    """JSON."""


class ToolCall(msgspec.Struct):
    id: str
    type: Literal["function"]
    function: CalledFunction


class AnswerMessage(msgspec.Struct):
    role: Literal["assistant"]
    content: str | None
    refusal: str | None = None
    annotations: list[dict[str, Any]] | None = None
    tool_calls: list[ToolCall] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    """The same, under its older name."""


class ChatChoice(msgspec.Struct):
    index: int
    message: AnswerMessage
    finish_reason: str
    logprobs: ChatLogprobs | None = None


class ChatCompletion(msgspec.Struct):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class FunctionDelta(msgspec.Struct):
    name: str | None = None
    arguments: str | None = None


class ToolCallDelta(msgspec.Struct):
    index: int
    id: str | None = None
    type: Literal["function"] | None = None
    function: FunctionDelta | None = None


class MessageDelta(msgspec.Struct):
    role: Literal["assistant"] | None = None
    content: str | None = None
    refusal: str | None = None
    tool_calls: list[ToolCallDelta] | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class ChatDelta(msgspec.Struct):
    index: int
    delta: MessageDelta
    finish_reason: str | None
    logprobs: ChatLogprobs | None = None


class ChatCompletionChunk(msgspec.Struct):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatDelta]
    """Empty in the chunk that tells the usage."""
    usage: Usage | None = None


class TextLogprobs(msgspec.Struct):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float | None] | None] | None
    text_offset: list[int]


class TextChoice(msgspec.Struct):
    index: int
    text: str
    finish_reason: str | None
    logprobs: TextLogprobs | None = None


class Completion(msgspec.Struct):
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage | None = None


class CompletionChunk(Completion):
    """A completion, of which only the next piece is told."""


class Embedding(msgspec.Struct):
    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or little-endian float32 in base64."""


class EmbeddingList(msgspec.Struct):
    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: Usage


class RankedDocument(msgspec.Struct):
    text: str


class Ranked(msgspec.Struct):
    index: int
    relevance_score: float
    document: RankedDocument | None = None
    truncated: bool | None = None


class RankingUsage(msgspec.Struct):
    total_tokens: int
    prompt_tokens: int | None = None


class Ranking(msgspec.Struct):
    model: str
    results: list[Ranked]
    usage: RankingUsage
    id: str | None = None


class CohereRanked(msgspec.Struct):
    index: int
    relevance_score: float


class CohereRanking(msgspec.Struct):
    id: str
    results: list[CohereRanked]
    meta: dict[str, Any]


class ResponseUsage(msgspec.Struct):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class Response(msgspec.Struct):
    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "in_progress", "failed"]
    background: bool
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    max_tool_calls: int | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    prompt_cache_key: str | None
    reasoning: dict[str, Any]
    safety_identifier: str | None
    service_tier: str
    store: bool
    temperature: float
    top_p: float
    presence_penalty: float
    frequency_penalty: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_logprobs: int
    truncation: Literal["disabled"]
    usage: ResponseUsage | None
    user: str | None
    metadata: dict[str, str]


class ResponseEvent(msgspec.Struct):
    """Its further fields are the type's."""

    type: str
    sequence_number: int


class DeletedResponse(msgspec.Struct):
    id: str
    object: Literal["response.deleted"]
    deleted: Literal[True]


class ItemList(msgspec.Struct):
    object: Literal["list"]
    data: list[dict[str, Any]]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Model(msgspec.Struct):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int | None
    parent: str | None = None
    """Only of a route with an adapter: the route itself."""


class ModelList(msgspec.Struct):
    object: Literal["list"]
    data: list[Model]


class UsageResult(msgspec.Struct):
    object: Literal["organization.usage.completions.result"]
    input_tokens: int
    output_tokens: int
    input_cached_tokens: int
    input_audio_tokens: int
    output_audio_tokens: int
    num_model_requests: int
    project_id: str | None
    user_id: str | None
    api_key_id: str | None
    model: str | None
    batch: bool | None


class UsageBucket(msgspec.Struct):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[UsageResult]


class UsagePage(msgspec.Struct):
    object: Literal["page"]
    data: list[UsageBucket]
    has_more: bool
    next_page: str | None


class EmbeddingsUsageResult(msgspec.Struct):
    object: Literal["organization.usage.embeddings.result"]
    input_tokens: int
    num_model_requests: int
    project_id: str | None
    user_id: str | None
    api_key_id: str | None
    model: str | None


class EmbeddingsUsageBucket(msgspec.Struct):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[EmbeddingsUsageResult]


class EmbeddingsUsagePage(msgspec.Struct):
    object: Literal["page"]
    data: list[EmbeddingsUsageBucket]
    has_more: bool
    next_page: str | None


class Amount(msgspec.Struct):
    value: float
    currency: str


class CostsResult(msgspec.Struct):
    object: Literal["organization.costs.result"]
    amount: Amount
    line_item: str | None
    project_id: str | None
    api_key_id: str | None


class CostsBucket(msgspec.Struct):
    object: Literal["bucket"]
    start_time: int
    end_time: int
    results: list[CostsResult]


class CostsPage(msgspec.Struct):
    object: Literal["page"]
    data: list[CostsBucket]
    has_more: bool
    next_page: str | None


class ErrorDetail(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class Error(msgspec.Struct):
    error: ErrorDetail


class MessageUsage(msgspec.Struct):
    input_tokens: int
    output_tokens: int
    cache_read_input_tokens: int = 0
    cache_creation_input_tokens: int = 0


class Message(msgspec.Struct):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "refusal"]
    stop_sequence: str | None
    usage: MessageUsage


class MessageEvent(msgspec.Struct):
    """Its further fields are the type's."""

    type: str


class MessageErrorDetail(msgspec.Struct):
    type: str
    message: str


class MessageError(msgspec.Struct):
    type: Literal["error"]
    error: MessageErrorDetail
    request_id: str | None


class InputTokens(msgspec.Struct):
    input_tokens: int


class Tokenization(msgspec.Struct):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenization(msgspec.Struct):
    prompt: str


class CheckedPrompt(msgspec.Struct):
    fits: bool
    tokenCount: int
    contextLength: int


class TokenChecked(msgspec.Struct):
    prompts: list[CheckedPrompt]


class Score(msgspec.Struct):
    index: int
    object: Literal["score"]
    score: float
    truncated: bool | None = None


class Scores(msgspec.Struct):
    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[Score]
    usage: Usage


class Project(msgspec.Struct):
    """What its keys may do at most, and what one's role in it is."""

    id: int
    object: Literal["project"]
    name: str
    role: Literal["owner", "member", "viewer"]
    may_issue_keys: bool
    time_zone: str
    routes: list[str]
    scopes: list[str]
    priority: str
    key_days: int | None
    """How long keys that members issue live at most."""
    max_keys: int | None


class ProjectList(msgspec.Struct):
    object: Literal["list"]
    data: list[Project]


class KeySecret(msgspec.Struct):
    last4: str
    created_at: datetime
    expires_at: datetime | None
    last_used_at: datetime | None
    works: bool


class ApiKey(msgspec.Struct, kw_only=True):
    """Empty lists of routes, scopes and addresses allow all that the project does."""

    id: str
    object: Literal["api_key"]
    name: str
    shown: str
    project: int
    project_name: str
    owner: str | None
    """Whom it ends with; null: a program's."""
    state: Literal["usable", "expired", "revoked"]
    routes: list[str]
    scopes: list[str]
    addresses: list[str]
    priority: str
    metadata: dict[str, str]
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None
    secrets: list[KeySecret]
    may_change: bool
    may_rotate: bool
    may_revoke: bool


class IssuedKey(ApiKey, kw_only=True):
    key: str
    """Shown this once."""


class ApiKeyList(msgspec.Struct):
    object: Literal["list"]
    data: list[ApiKey]
    first_id: str | None
    last_id: str | None
    has_more: bool


class Alive(msgspec.Struct):
    status: Literal["ok"]


class Ready(msgspec.Struct):
    status: str
    database: str
    redis: str
    spool_pending: int


class Version(msgspec.Struct):
    version: str
