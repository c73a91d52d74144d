"""Two formats on an engine's port: OpenAI's embeddings and Jina's rerank. A body in, an answer out."""

from __future__ import annotations

import base64
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from inference.engines.base import BadRequest
from inference.engines.chat import decode
from inference.engines.embedding.batcher import Row
from inference.engines.embedding.engine import Answer
from inference.engines.tokenize import DetokenizeRequest, TokenizeRequest

MAX_INPUTS = 2048
MAX_DOCUMENTS = 2048

_Token = Annotated[int, msgspec.Meta(ge=0, lt=2**31)]
_Keep = Annotated[int, msgspec.Meta(ge=-1)]


class EmbeddingsRequest(msgspec.Struct):
    """The fields this server reads; null means "not given", unknown ones are ignored."""

    input: str | list[str | _Token | list[_Token]]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, msgspec.Meta(ge=1)] | None = None
    truncate_prompt_tokens: _Keep | None = None
    """Cut longer inputs to so many tokens, -1: to the model's limit; null refuses them."""


class _Document(msgspec.Struct):
    text: str


class RerankRequest(msgspec.Struct):
    """As `EmbeddingsRequest`."""

    query: str
    documents: Annotated[list[str | _Document], msgspec.Meta(min_length=1, max_length=MAX_DOCUMENTS)]
    model: str | None = None
    top_n: Annotated[int, msgspec.Meta(ge=1)] | None = None
    return_documents: bool | None = None
    truncate_prompt_tokens: _Keep | None = None
    max_tokens_per_doc: Annotated[int, msgspec.Meta(ge=1)] | None = None
    """Of longer documents only the beginning is read."""


_Texts = Annotated[list[str], msgspec.Meta(min_length=1, max_length=MAX_DOCUMENTS)]


class ScoreRequest(msgspec.Struct):
    """As `EmbeddingsRequest`."""

    text_1: str | _Texts
    text_2: str | _Texts
    model: str | None = None
    truncate_prompt_tokens: _Keep | None = None


_Request = TypeVar(
    "_Request", EmbeddingsRequest, RerankRequest, ScoreRequest, TokenizeRequest, DetokenizeRequest
)


def parse(body: bytes, kind: type[_Request]) -> _Request:
    """Read and check a body. Raises BadRequest with the field's name."""
    return decode(body, msgspec.json.Decoder(kind).decode)


def inputs_of(request: EmbeddingsRequest) -> list[str | list[int]]:
    """One text or list of token ids per vector. Raises BadRequest for an empty or a mixed list."""
    given = request.input
    found: list[Any] = [given] if isinstance(given, str) else given
    if found and all(isinstance(each, int) for each in found):
        found = [found]
    if not found:
        raise BadRequest("'input' must not be empty.", param="input", code="empty_array")
    if len(found) > MAX_INPUTS:
        raise BadRequest(
            f"'input' holds {len(found)} inputs; {MAX_INPUTS} are the most.",
            param="input",
            code="array_above_max_length",
        )
    if any(isinstance(each, int) for each in found) or len({type(each) for each in found}) > 1:
        raise BadRequest(
            "'input' must be a text, a list of texts, a list of token ids or a list of such lists.",
            param="input",
            code="invalid_type",
        )
    for at, each in enumerate(found):
        if not each:
            param = "input" if len(found) == 1 else f"input[{at}]"
            raise BadRequest(f"'{param}' must not be empty.", param=param, code="invalid_value")
    return found


def documents_of(request: RerankRequest) -> list[str]:
    """The documents' texts. Raises BadRequest for an empty one, and for an empty query."""
    if not request.query:
        raise BadRequest("'query' must not be empty.", param="query", code="invalid_value")
    texts = [each if isinstance(each, str) else each.text for each in request.documents]
    for at, text in enumerate(texts):
        if not text:
            raise BadRequest(
                f"'documents[{at}]' must not be empty.", param=f"documents[{at}]", code="invalid_value"
            )
    return texts


def sides_of(request: ScoreRequest) -> tuple[list[str], list[str]]:
    """The texts on the left and on the right. Raises BadRequest for an empty one, and for two sides that do
    not go together."""
    left, right = ([side] if isinstance(side, str) else side for side in (request.text_1, request.text_2))
    for name, texts in (("text_1", left), ("text_2", right)):
        for at, text in enumerate(texts):
            if not text:
                raise BadRequest(f"'{name}[{at}]' must not be empty.", param=name, code="invalid_value")
    if len(left) not in (1, len(right)):
        raise BadRequest(
            "'text_1' must be one text, or as many as 'text_2'.", param="text_1", code="invalid_value"
        )
    return left, right


def prompt_of(request: TokenizeRequest) -> str:
    """The text. Raises BadRequest where there is none."""
    if request.messages is not None:
        raise BadRequest(
            "This model has no conversations: give a 'prompt'.", param="messages", code="unsupported_value"
        )
    if request.prompt is None:
        raise BadRequest("'prompt' is missing.", param="prompt", code="missing_required_parameter")
    return request.prompt


def embeddings_answer(request: EmbeddingsRequest, answer: Answer, model: str) -> bytes:
    packed = request.encoding_format == "base64"
    data = [
        {"object": "embedding", "index": at, "embedding": _base64(row) if packed else row.tolist()}
        | ({"truncated": True} if answer.truncated[at] else {})
        for at, row in enumerate(answer.rows)
    ]
    return msgspec.json.encode(
        {"object": "list", "data": data, "model": model, "usage": _usage(answer)},
    )


def rerank_answer(
    request: RerankRequest, texts: list[str], answer: Answer, *, model: str, request_id: str
) -> bytes:
    """The best documents first; of equal ones the earlier."""
    scores = answer.rows[:, 0].tolist()
    order = sorted(range(len(scores)), key=lambda at: -scores[at])[: request.top_n]
    results = [
        {"index": at, "relevance_score": scores[at]}
        | ({"document": {"text": texts[at]}} if request.return_documents else {})
        | ({"truncated": True} if answer.truncated[at] else {})
        for at in order
    ]
    return msgspec.json.encode(
        {"id": f"rerank-{request_id}", "model": model, "usage": _usage(answer), "results": results}
    )


def score_answer(answer: Answer, *, model: str, request_id: str, created: int) -> bytes:
    """In the order of the pairs."""
    data = [
        {"index": at, "object": "score", "score": score}
        | ({"truncated": True} if answer.truncated[at] else {})
        for at, score in enumerate(answer.rows[:, 0].tolist())
    ]
    head = {"id": f"score-{request_id}", "object": "list", "created": created, "model": model}
    return msgspec.json.encode(head | {"data": data, "usage": _usage(answer)})


def _usage(answer: Answer) -> dict[str, int]:
    return {"prompt_tokens": answer.prompt_tokens, "total_tokens": answer.prompt_tokens}


def _base64(row: Row) -> str:
    return base64.b64encode(row.astype("<f4", copy=False).tobytes()).decode("ascii")
