"""Thoughts that a model writes before its answer, between `<think>` and `</think>`."""

from __future__ import annotations

OPEN, CLOSE = "<think>", "</think>"
MARKS = (OPEN, CLOSE)


def thinks(template: str) -> bool:
    """Whether a model with this chat template writes thoughts."""
    return CLOSE in template


def begins_in(prompt: str) -> bool:
    """Whether the prompt ends with the beginning of thoughts: some templates write it."""
    return prompt.rstrip().endswith(OPEN)


def stops_in(message: str) -> bool:
    """Whether this message, which is to be continued, was left within thoughts."""
    return message.rfind(OPEN) > message.rfind(CLOSE)


class Thoughts:
    """Feed it text as it comes; it gives back what is thought and what is answer, without the marks and
    without the spaces around them. `opened`: the text begins within thoughts; else only one that begins
    with `<think>` has any."""

    def __init__(self, *, opened: bool) -> None:
        self.thinking = opened
        self._decided = opened
        self._held = ""
        self._trims = opened
        """Spaces that come next are left out."""

    @property
    def answering(self) -> bool:
        """What comes now is answer, spaces too."""
        return self._decided and not self.thinking and not self._trims

    def feed(self, text: str) -> tuple[str, str]:
        self._held += text
        if not self._decided:
            self._decide()
        if not self._decided:
            return "", ""
        if self.thinking:
            return self._thought()
        return "", self._answer()

    def flush(self) -> tuple[str, str]:
        """What was held when the text ended."""
        held, self._held = self._held, ""
        if self.thinking:
            return held, ""
        return "", "" if self._trims and held.isspace() else held

    def _decide(self) -> None:
        text = self._held.lstrip()
        if text.startswith(OPEN):
            self.thinking = self._trims = True
            self._held = text[len(OPEN) :]
        self._decided = self.thinking or not OPEN.startswith(text)

    def _thought(self) -> tuple[str, str]:
        thought = self._trimmed()
        at = thought.find(CLOSE)
        if at >= 0:
            self.thinking, self._trims = False, True
            self._held = thought[at + len(CLOSE) :]
            return thought[:at].rstrip(), self._answer()
        cut = len(thought) - _open_end(thought)
        self._held = thought[cut:]
        return thought[:cut], ""

    def _answer(self) -> str:
        answer, self._held = self._trimmed(), ""
        return answer

    def _trimmed(self) -> str:
        text = self._held.lstrip() if self._trims else self._held
        self._trims = self._trims and not text
        return text


def _open_end(text: str) -> int:
    """Length of the end of the text that may yet turn out to be the closing mark, or spaces before it."""
    for length in range(min(len(CLOSE) - 1, len(text)), 0, -1):
        if text.endswith(CLOSE[:length]):
            break
    else:
        length = 0
    shown = text[: len(text) - length]
    return len(text) - len(shown.rstrip())
