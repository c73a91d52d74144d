"""A small client of our own public API, for commands: what they see is what any client sees."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

CONNECT_SECONDS = 10.0
SILENCE_SECONDS = 300.0
"""The longest wait for the next piece of an answer."""


class Unanswered(Exception):
    """Why there is no answer, in one sentence; `status` is None when nothing answered at all."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(slots=True, kw_only=True)
class Answer:
    """What is known of an answer so far."""

    text: str = ""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    began: float = field(default_factory=time.monotonic)
    first: float | None = None
    last: float | None = None

    def speed(self) -> str:
        """`31 tokens, first after 0.12 s, 45.1 tok/s`."""
        if self.first is None or self.last is None:
            return "no text"
        said = f"first after {self.first - self.began:.2f} s"
        if not self.completion_tokens:
            return said
        taken = self.last - self.first
        # The first token is there when the clock of the others starts.
        rate = f", {(self.completion_tokens - 1) / taken:.1f} tok/s" if taken > 0.001 else ""
        return f"{self.completion_tokens} tokens, {said}{rate}"


class Api:
    """One base URL and one key."""

    def __init__(self, base_url: str, key: str) -> None:
        try:
            parts = urlsplit(base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                raise ValueError
        except ValueError as error:  # of urlsplit, or of a port that is no number
            raise Unanswered(f"The URL must be like http://127.0.0.1:8000/v1, not {base_url}.") from error
        self.base_url = base_url.rstrip("/")
        self._parts = parts
        self._key = key

    def models(self) -> list[str]:
        """Ids of the models that the key may use. Raises Unanswered."""
        connection, response = self._send("GET", "/models", None)
        try:
            return [str(model["id"]) for model in self._decoded(response)["data"]]
        except (KeyError, TypeError) as error:
            raise Unanswered(f"{self.base_url} answers, but not as an OpenAI API does.") from error
        finally:
            connection.close()

    def chat(self, model: str, messages: Sequence[dict[str, str]], **options: Any) -> Iterator[Answer]:
        """Yield the same, growing answer after each piece of text. Closing the iterator stops the answer.

        Raises Unanswered, also in mid-answer.
        """
        answer = Answer()
        body = {"model": model, "messages": list(messages), "stream": True, **options}
        body["stream_options"] = {"include_usage": True}
        connection, response = self._send("POST", "/chat/completions", body)
        try:
            for event in _events(response):
                if error := event.get("error"):
                    said = error.get("message") if isinstance(error, dict) else error
                    raise Unanswered(str(said or "The answer was interrupted."))
                usage = event.get("usage") or {}
                answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
                answer.completion_tokens = usage.get("completion_tokens", answer.completion_tokens)
                for choice in event.get("choices") or ():
                    if text := (choice.get("delta") or {}).get("content"):
                        answer.last = time.monotonic()
                        answer.first = answer.first or answer.last
                        answer.text += text
                        yield answer
            yield answer
        except (OSError, http.client.HTTPException) as error:
            raise Unanswered("The connection broke in the middle of the answer.") from error
        finally:
            connection.close()

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None
    ) -> tuple[http.client.HTTPConnection, http.client.HTTPResponse]:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=CONNECT_SECONDS)
        try:
            connection.connect()
        except OSError as error:
            raise Unanswered(f"Nothing answers at {self.base_url}: {error.strerror or error}.") from error
        connection.sock.settimeout(SILENCE_SECONDS)
        headers = {"Authorization": f"Bearer {self._key}", "Content-Type": "application/json"}
        try:
            connection.request(
                method,
                self._parts.path.rstrip("/") + path,
                json.dumps(body) if body is not None else None,
                headers,
            )
            response = connection.getresponse()
            if response.status != 200:
                raise Unanswered(self._refusal(response), response.status)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Unanswered(f"{self.base_url} closed the connection without an answer.") from error
        except BaseException:
            connection.close()
            raise
        return connection, response

    def _decoded(self, response: http.client.HTTPResponse) -> Any:
        try:
            return json.loads(response.read(16 * 1024 * 1024))
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unanswered(f"{self.base_url} answers, but not as an OpenAI API does.") from error

    def _refusal(self, response: http.client.HTTPResponse) -> str:
        try:
            return str(json.loads(response.read(1024 * 1024))["error"]["message"])
        except (ValueError, KeyError, TypeError):
            return f"{self.base_url} answered with status {response.status}."


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event."""
    for line in response:
        if not line.startswith(b"data:"):
            continue
        data = line[5:].strip()
        if data == b"[DONE]":
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise Unanswered("The answer cannot be read.") from error
        if isinstance(event, dict):
            yield event
