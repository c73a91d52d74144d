"""Between a worker's chat completion and a client of /v1/responses."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import Any

import msgspec
from django.db import Error as DatabaseError

from inference.errors import WorkerBroke
from inference.http import INTERNAL_ERROR, error_payload
from openai_api.answered import Answered
from openai_api.auth import Key
from openai_api.responses.items import item_id
from openai_api.responses.output import (
    ChatAnswer,
    ChatUsage,
    Choice,
    Delta,
    Event,
    Output,
    decode_answer,
)
from openai_api.responses.request import ResponsesRequest
from openai_api.responses.store import Turn, save
from openai_api.responses.words import in_these_words
from registry.threads import in_database

logger = logging.getLogger("roundhouse.responses")

UNFINISHED = {"length": "max_output_tokens", "content_filter": "content_filter"}
"""Why an answer that ended so is incomplete."""


class Responding:
    """Makes a response object, or a stream of its events, of what comes from a worker; keeps it for its
    project unless told not to, and passes it on."""

    def __init__(self, to: Answered, call: ResponsesRequest, key: Key, request_id: str) -> None:
        self._to = to
        self._call = call
        self._key = key
        self._id = f"resp_{request_id.removeprefix('req_')}"
        self._created_at = int(time.time())
        self._output = Output(self._id, len(call.items))
        self._finish_reason: str | None = None
        self._usage: ChatUsage | None = None
        self._stored = call.store is not False
        self._sequence = 0

    @property
    def client_gone(self) -> bool:
        return self._to.client_gone

    async def send_json(self, status: int, payload: object) -> None:
        answer = _read(payload if isinstance(payload, bytes) else msgspec.json.encode(payload))
        self._take(answer, whole=True)
        self._output.finish(self._last_status())
        await self._to.send_json(status, await self._kept(self._ended()))

    async def stream_start(self, prompt_tokens: int = 0) -> None:
        await self._to.stream_start()
        begun = self._object("in_progress")
        await self._tell(
            [
                {"type": "response.created", "response": begun},
                {"type": "response.in_progress", "response": begun},
            ]
        )

    async def stream_events(self, events: Sequence[bytes]) -> None:
        told = [one for event in events for one in self._take(_read(event[len(b"data: ") :]))]
        if told:
            await self._tell(told)

    async def stream_end(self, chunk: bytes = b"") -> None:
        if chunk.startswith(b"data: [DONE]"):
            await self._tell(self._output.finish(self._last_status()))
            ended = await self._kept(self._ended())
            await self._to.stream_end(self._event({"type": f"response.{ended['status']}", "response": ended}))
            return
        self._output.cut()
        error = in_these_words(_error_of(chunk))["error"]
        told = {"code": "server_error", "message": error["message"]}
        failed = await self._kept(self._object("failed", error=told))
        await self._tell([{"type": "error", "error": error}])
        await self._to.stream_end(self._event({"type": "response.failed", "response": failed}))

    # -- what comes

    def _take(self, answer: ChatAnswer, *, whole: bool = False) -> list[Event]:
        if answer.usage is not None:
            self._usage = answer.usage
        events: list[Event] = []
        for choice in answer.choices:
            said = _whole(choice) if whole else choice.delta
            if said is not None:
                events += self._output.take(said, choice.logprobs)
            self._finish_reason = choice.finish_reason or self._finish_reason
        return events

    def _last_status(self) -> str:
        return "incomplete" if self._finish_reason in UNFINISHED else "completed"

    # -- what goes

    async def _tell(self, events: list[Event]) -> None:
        await self._to.stream_events([b"".join(map(self._event, events))])

    def _event(self, event: Event) -> bytes:
        event["sequence_number"] = self._sequence
        self._sequence += 1
        return b"event: %s\ndata: %s\n\n" % (event["type"].encode(), msgspec.json.encode(event))

    async def _kept(self, response: dict[str, Any]) -> dict[str, Any]:
        """The response, after it was stored; it tells if that could not be."""
        if not self._stored:
            return response
        call = self._call
        items = [item.stored(item_id(item.kind, self._id, at)) for at, item in enumerate(call.resolved)]
        turn = Turn(response=response, items=items, earlier=call.earlier, project_id=self._key.project_id)
        try:
            await in_database(save, turn)
        except DatabaseError as error:
            logger.warning(
                "a response could not be stored (%s)",
                type(error).__name__,
                extra={"event": "response_not_stored"},
            )
            return response | {"store": False}
        return response

    def _ended(self) -> dict[str, Any]:
        reason = UNFINISHED.get(self._finish_reason or "")
        if reason is None:
            return self._object("completed", completed_at=int(time.time()))
        return self._object("incomplete", incomplete_details={"reason": reason})

    def _object(self, status: str, **told: Any) -> dict[str, Any]:
        call = self._call
        text = call.text
        asked_format = msgspec.to_builtins(text.format) if text and text.format else {"type": "text"}
        reasoning = call.reasoning
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_at,
            "completed_at": None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": call.instructions,
            "max_output_tokens": call.max_output_tokens,
            "max_tool_calls": call.max_tool_calls,
            "model": call.model,
            "output": list(self._output.items),
            "parallel_tool_calls": call.parallel_tool_calls is not False,
            "previous_response_id": call.previous_response_id,
            "prompt_cache_key": call.prompt_cache_key,
            "reasoning": {
                "effort": reasoning.effort if reasoning else None,
                "summary": reasoning.summary if reasoning else None,
            },
            "safety_identifier": call.safety_identifier,
            "service_tier": "default",
            "store": self._stored,
            "temperature": 1.0 if call.temperature is None else call.temperature,
            "top_p": 1.0 if call.top_p is None else call.top_p,
            "presence_penalty": call.presence_penalty or 0.0,
            "frequency_penalty": call.frequency_penalty or 0.0,
            "text": {
                "format": asked_format,
                "verbosity": (text.verbosity if text else None) or "medium",
            },
            "tool_choice": call.tool_choice or "auto",
            "tools": msgspec.to_builtins(call.tools or []),
            "top_logprobs": call.top_logprobs or 0,
            # What is too long is refused, never cut.
            "truncation": "disabled",
            "usage": self._usage.told() if self._usage else None,
            "user": call.user,
            "metadata": call.metadata or {},
            **told,
        }


def _read(answer: bytes) -> ChatAnswer:
    try:
        return decode_answer(answer)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise WorkerBroke("The worker sent what is no chat completion.") from error


def _whole(choice: Choice) -> Delta | None:
    """The message of a whole completion. Its calls have no index: they count from 0."""
    message = choice.message
    if message is not None:
        for at, call in enumerate(message.tool_calls or ()):
            call.index = at
    return message


def _error_of(chunk: bytes) -> dict[str, Any]:
    try:
        payload: dict[str, Any] = msgspec.json.decode(chunk[len(b"data: ") :])
    except (msgspec.DecodeError, UnicodeDecodeError):
        return error_payload(INTERNAL_ERROR, "server_error")
    return payload
