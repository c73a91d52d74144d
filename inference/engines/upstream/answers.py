"""The server's answers as gateways expect them, and their tokens counted.

Servers differ in all that clients can do without: nulls, heads that change from chunk to chunk, roles told
again and again, missing ids, ends without `[DONE]`. What goes out here has one form, in which every chunk
ends with the usage so far. Only fields that clients know are passed on.
"""

from __future__ import annotations

from typing import Any

import msgspec

from inference.engines.chat import DONE
from inference.engines.upstream.requests import BYTES_PER_TOKEN, GENERATING, TOKENIZING, Prepared
from inference.engines.usage import Totals

_decode_object = msgspec.json.Decoder(dict[str, Any]).decode
_decode_parts = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode

_REASONS = {
    "eos_token": "stop",
    "eos": "stop",
    "stop_sequence": "stop",
    "end_turn": "stop",
    "max_tokens": "length",
    "model_length": "length",
}
"""What some servers call it."""

_SAID = ("refusal", "tool_calls", "function_call", "annotations")
_OF_AN_ANSWER = ("system_fingerprint", "prompt_logprobs", "prompt_token_ids", "prompt_text")
_OF_A_CHOICE = ("stop_reason", "token_ids", "prompt_logprobs", "prompt_token_ids")
_RESULTS = {"/v1/embeddings": "data", "/v1/score": "data", "/v1/rerank": "results"}
"""What an answer is none without."""


class NoAnswer(Exception):
    """What the server sent is none, or is cut off."""


class Count(Totals):
    """What one answer costs: as the server says, and until it does, or if it never does, an estimate: one
    token for each piece of a stream, or one for four bytes, whichever is more."""

    def __init__(self, prepared: Prepared) -> None:
        super().__init__(prepared.prompts, prepared.samples)
        self.prompt_tokens = prepared.prompt_tokens
        self._pieces = 0
        self._bytes = 0
        self._told = False
        self._one_prompt = prepared.prompts == 1

    def said(self, text: str) -> None:
        """One more piece of the answer."""
        if text:
            self._pieces += 1
            self._bytes += len(text.encode("utf-8", "replace"))
            if not self._told:
                self.completion_tokens = max(self._pieces, -(-self._bytes // BYTES_PER_TOKEN))

    def told(self, usage: Any, *, of_all: bool) -> None:
        """The server's own figures, of all choices or of one of them. Zeros for what is not nothing are no
        figures."""
        if not isinstance(usage, dict):
            return
        prompt, total = _number(usage.get("prompt_tokens")), _number(usage.get("total_tokens"))
        completion = _number(usage.get("completion_tokens"))
        if of_all or self._one_prompt:
            self.prompt_tokens = prompt or max(0, total - completion) or self.prompt_tokens
        if not of_all:
            return
        if completion or not self._pieces:
            self._told, self.completion_tokens = True, completion
        of_prompt, of_completion = (usage.get(f"{part}_tokens_details") for part in ("prompt", "completion"))
        if isinstance(of_prompt, dict):
            self.cached_tokens = min(_number(of_prompt.get("cached_tokens")), self.prompt_tokens)
        if isinstance(of_completion, dict):
            self.reasoning_tokens = _number(of_completion.get("reasoning_tokens"))


class Stream:
    """The events of one streamed answer."""

    def __init__(
        self, path: str, prepared: Prepared, count: Count, *, request_id: str, model: str, created: int
    ) -> None:
        self._chat = path == "/v1/chat/completions"
        self._count = count
        self._choices = prepared.prompts * prepared.samples
        self._begun: set[int] = set()
        self._finished: set[int] = set()
        self._calls: dict[int, int] = {}
        """Calls begun, by choice."""
        self._request_id = request_id
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        self._head = (
            b'data: {"id":'
            + msgspec.json.encode(f"{'chatcmpl' if self._chat else 'cmpl'}-{request_id}")
            + b',"object":"%b","created":%d,"model":' % (kind.encode(), created)
            + msgspec.json.encode(model)
            + b',"choices":['
        )

    def event(self, event: bytes) -> bytes:
        """What clients get of one event, `b"data: …"`; may be nothing. Raises NoAnswer."""
        try:
            chunk = _decode_object(event.removeprefix(b"data: "))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise NoAnswer("an event that is no JSON object") from None
        if chunk.get("error"):
            raise NoAnswer("an error event")
        choices = _objects(chunk.get("choices"))
        told = [one for choice in choices if (one := self._choice(choice)) is not None]
        # Beside one of several choices stands the usage of that one.
        self._count.told(chunk.get("usage"), of_all=self._choices == 1 or not choices)
        return self._chunk(told, _more(chunk)) if told else b""

    def end(self, *, done: bool) -> bytes:
        """The rest of it; `done`: the server said that this is the end. Raises NoAnswer when it is cut."""
        unfinished = [at for at in range(self._choices) if at not in self._finished]
        if unfinished and not (done and self._begun):
            raise NoAnswer("a stream that ends too early")
        last = b"".join(self._chunk([self._ending(at)], {}) for at in unfinished)
        usage = msgspec.json.encode(self._count.usage())
        return last + self._head + b'],"usage":' + usage + b"}\n\n" + DONE

    def _chunk(self, choices: list[dict[str, Any]], more: dict[str, Any]) -> bytes:
        rest = b"," + msgspec.json.encode(more)[1:-1] if more else b""
        return self._head + msgspec.json.encode(choices)[1:] + rest + self._count.tail()

    def _ending(self, at: int) -> dict[str, Any]:
        said: dict[str, Any] = {"delta": {}} if self._chat else {"text": ""}
        return {"index": at, **said, "logprobs": None, "finish_reason": "stop"}

    def _choice(self, choice: dict[str, Any]) -> dict[str, Any] | None:
        at = choice.get("index") or 0
        if not isinstance(at, int) or not 0 <= at < self._choices or at in self._finished:
            return None
        if self._chat:
            delta = self._delta(at, choice.get("delta"))
            said: dict[str, Any] = {"delta": delta}
        else:
            text = _text(choice.get("text"))
            self._count.said(text)
            delta, said = {"text": text} if text else {}, {"text": text}
        rest = _rest(choice, self._chat)
        if not delta and rest["finish_reason"] is None and rest["logprobs"] is None:
            return None
        self._begun.add(at)
        if rest["finish_reason"] is not None:
            self._finished.add(at)
        return {"index": at, **said, **rest}

    def _delta(self, at: int, given: Any) -> dict[str, Any]:
        said = _said(given)
        calls = [self._call(at, call) for call in _objects(said.pop("tool_calls", None))]
        if calls:
            said["tool_calls"] = calls
        self._count.said(_spoken(said))
        # The first one names the role, and no other.
        return said if at in self._begun else {"role": "assistant", "content": "", "refusal": None, **said}

    def _call(self, at: int, call: dict[str, Any]) -> dict[str, Any]:
        name, arguments = _function(call)
        begun = self._calls.get(at, 0)
        index = call.get("index")
        if not isinstance(index, int):  # some send whole calls, one after the other
            index = begun if name else max(begun - 1, 0)
        if not name:
            return {"index": index, "function": {"arguments": arguments}}
        self._calls[at] = max(begun, index + 1)
        id_ = _id(call) or f"call_{self._request_id}_{at}_{index}"
        return {
            "index": index,
            "id": id_,
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }


def whole(
    path: str,
    answer: bytes,
    count: Count,
    *,
    request_id: str,
    model: str,
    created: int,
) -> bytes:
    """A whole answer. Raises NoAnswer for what is none."""
    try:
        if path in GENERATING:
            return _generated(path, _decode_object(answer), count, request_id, model, created)
        parts = _decode_parts(answer)
        if msgspec.json.decode(parts.pop("error", b"null")):
            raise NoAnswer("an error with the status 200")
        if path in TOKENIZING:
            return answer
        if _RESULTS[path] not in parts:
            raise NoAnswer(f"an answer without {_RESULTS[path]}")
        usage = msgspec.json.decode(parts.pop("usage", b"null"))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise NoAnswer("an answer that is no JSON object") from None
    # The rest, millions of numbers perhaps, is passed on unread.
    count.told(usage, of_all=True)
    figures = {"prompt_tokens": count.prompt_tokens, "total_tokens": count.prompt_tokens}
    told = parts | {"model": msgspec.Raw(msgspec.json.encode(model))}
    if path != "/v1/embeddings":
        name = "rerank" if path == "/v1/rerank" else "score"
        told["id"] = msgspec.Raw(msgspec.json.encode(f"{name}-{request_id}"))
    return msgspec.json.encode(told | {"usage": msgspec.Raw(msgspec.json.encode(figures))})


def _generated(
    path: str, answer: dict[str, Any], count: Count, request_id: str, model: str, created: int
) -> bytes:
    choices = _objects(answer.get("choices"))
    if answer.get("error") or not choices:
        raise NoAnswer("an answer without choices")
    chat = path == "/v1/chat/completions"
    told = []
    for at, choice in enumerate(choices):
        if chat:
            message = _message(choice.get("message"), f"{request_id}_{at}")
            count.said(_spoken(message))
            said: dict[str, Any] = {"message": message}
        else:
            said = {"text": _text(choice.get("text"))}
            count.said(said["text"])
        index = choice.get("index")
        told.append({"index": index if isinstance(index, int) else at, **said, **_rest(choice, chat)})
    count.told(answer.get("usage"), of_all=True)
    return msgspec.json.encode(
        {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}",
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
            "choices": told,
            **_more(answer),
            "usage": count.usage(),
        }
    )


def _message(given: Any, request_id: str) -> dict[str, Any]:
    said = _said(given)
    calls = []
    for at, call in enumerate(_objects(said.pop("tool_calls", None))):
        name, arguments = _function(call)
        id_ = _id(call) or f"call_{request_id}_{at}"
        calls.append({"id": id_, "type": "function", "function": {"name": name, "arguments": arguments}})
    if calls:
        said["tool_calls"] = calls
    content = said.pop("content", "") or (None if calls else "")
    return {"role": "assistant", "content": content, "refusal": None, "annotations": [], **said}


def _said(given: Any) -> dict[str, Any]:
    """What a message or a delta says, and nothing that it leaves open."""
    if not isinstance(given, dict):
        return {}
    content, thoughts = _parts(given.get("content"))
    said: dict[str, Any] = {"content": content} if content else {}
    thoughts = thoughts or _text(given.get("reasoning_content")) or _text(given.get("reasoning"))
    if thoughts:  # some clients read the one, some the other
        said["reasoning"] = said["reasoning_content"] = thoughts
    return said | {name: given[name] for name in _SAID if given.get(name)}


def _parts(content: Any) -> tuple[str, str]:
    """Text and thoughts of a content, which some servers tell in parts."""
    if not isinstance(content, list):
        return _text(content), ""
    text, thoughts = "", ""
    for part in _objects(content):
        text += _text(part.get("text"))
        thinking = part.get("thinking")
        thoughts += _text(thinking) or "".join(_text(one.get("text")) for one in _objects(thinking))
    return text, thoughts


def _spoken(said: dict[str, Any]) -> str:
    """All text of it, to be counted."""
    functions = [call.get("function", {}) for call in _objects(said.get("tool_calls"))]
    called = "".join(_text(one.get("name")) + _text(one.get("arguments")) for one in functions)
    content, thoughts, refusal = (_text(said.get(one)) for one in ("content", "reasoning", "refusal"))
    return content + thoughts + refusal + called


def _more(answer: dict[str, Any]) -> dict[str, Any]:
    """What an answer, or a chunk of it, says besides its choices."""
    return {name: answer[name] for name in _OF_AN_ANSWER if answer.get(name) is not None}


def _rest(choice: dict[str, Any], chat: bool) -> dict[str, Any]:
    reason = choice.get("finish_reason") or None
    logprobs = choice.get("logprobs")
    if isinstance(logprobs, dict) and chat:
        logprobs = {"refusal": None, **logprobs}
    told = {
        "logprobs": logprobs if isinstance(logprobs, dict) else None,
        "finish_reason": _REASONS.get(reason, reason) if isinstance(reason, str) else None,
    }
    return told | {name: choice[name] for name in _OF_A_CHOICE if choice.get(name) is not None}


def _id(call: dict[str, Any]) -> str:
    id_ = _text(call.get("id"))
    own = id_.removeprefix("chatcmpl-tool-")  # vLLM's
    return id_ if own == id_ else f"call_{own}"


def _function(call: dict[str, Any]) -> tuple[str, str]:
    function = call.get("function")
    if not isinstance(function, dict):
        return "", ""
    arguments = function.get("arguments")
    if isinstance(arguments, dict):
        arguments = msgspec.json.encode(arguments).decode()
    return _text(function.get("name")), _text(arguments)


def _objects(given: Any) -> list[dict[str, Any]]:
    return [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []


def _text(given: Any) -> str:
    return given if isinstance(given, str) else ""


def _number(given: Any) -> int:
    return given if isinstance(given, int) and not isinstance(given, bool) and 0 <= given < 2**31 else 0
