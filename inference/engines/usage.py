"""What an answer has cost, counted while it is made and told in OpenAI's shape."""

from __future__ import annotations

import msgspec

from inference.engines.base import Delta


class Totals:
    """What the choices of one request have cost together so far.

    Every prompt has `samples` choices, one after the other; its own tokens count once.
    """

    def __init__(self, prompts: int = 1, samples: int = 1) -> None:
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0
        self.reasoning_tokens = 0
        self._ids: list[int] = []
        """Tokens that no chunk has told yet."""
        self.unfinished = prompts * samples
        self._alone = self.unfinished == 1
        self._samples = samples
        self._prompts = [(0, 0)] * prompts
        self._choices = [(0, 0)] * self.unfinished

    def take(self, at: int, delta: Delta) -> None:
        """Count a delta of choice `at`."""
        detail = delta.detail
        if self._alone:  # most requests are, and this is done for every token
            self.prompt_tokens = delta.prompt_tokens
            self.completion_tokens = delta.completion_tokens
            self.cached_tokens = delta.cached_tokens
            self._ids += delta.ids
            if detail is not None:
                self.reasoning_tokens = detail.reasoning_tokens
        else:
            completion, reasoning = self._choices[at]
            thought = reasoning if detail is None else detail.reasoning_tokens
            self._choices[at] = delta.completion_tokens, thought
            self.completion_tokens += delta.completion_tokens - completion
            self.reasoning_tokens += thought - reasoning
            self._take_prompt(at, delta)
        if delta.finish_reason is not None:
            self.unfinished -= 1

    def begin(self, at: int, delta: Delta) -> None:
        """Count the prompt of choice `at` alone, before its first delta."""
        if self._alone:
            self.prompt_tokens = delta.prompt_tokens
        else:
            self._take_prompt(at, delta)

    def _take_prompt(self, at: int, delta: Delta) -> None:
        prompt, sample = divmod(at, self._samples)
        counted, cached = self._prompts[prompt]
        # Later samples find the whole prompt cached, by the first one's work: that is no saving.
        now = delta.prompt_tokens, cached if sample else delta.cached_tokens
        self._prompts[prompt] = now
        self.prompt_tokens += now[0] - counted
        self.cached_tokens += now[1] - cached

    def usage(self) -> dict[str, object]:
        """The usage of a whole answer, streamed or not."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens, "audio_tokens": 0},
            "completion_tokens_details": {
                "reasoning_tokens": self.reasoning_tokens,
                "audio_tokens": 0,
                "accepted_prediction_tokens": 0,
                "rejected_prediction_tokens": 0,
            },
        }

    def tail(self) -> bytes:
        """The end of a chunk with the usage so far, and with the tokens that are new: who has them all can
        ask another worker to go on after them."""
        ids = b""
        if self._ids:
            ids = b',"token_ids":' + msgspec.json.encode(self._ids)
            self._ids.clear()
        return b',"usage":{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d%b}}\n\n' % (
            self.prompt_tokens,
            self.completion_tokens,
            self.prompt_tokens + self.completion_tokens,
            ids,
        )
