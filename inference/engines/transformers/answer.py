"""The tokens of one answer on their way to deltas."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from inference.engines.base import Delta, Detail, GenerationRequest, Token
from inference.engines.reasoning import Thoughts
from inference.engines.stops import StopStrings
from inference.engines.transformers.likely import Likely
from inference.engines.transformers.text import Detokenizer, Vocabulary

_NO_MARKS: Mapping[int, str] = {}


class Answer:
    """`ends`: the tokens that end it, whose own text is none of it. `shown`: control tokens that are text
    all the same."""

    def __init__(
        self,
        request: GenerationRequest,
        vocabulary: Vocabulary,
        ends: frozenset[int],
        *,
        prompt: list[int],
        thoughts: Thoughts | None = None,
        shown: Mapping[int, str] = _NO_MARKS,
    ) -> None:
        sampling = request.sampling
        self._text = Detokenizer(vocabulary.text)
        self._stops = StopStrings(sampling.stop, include=sampling.include_stop)
        self._thoughts = thoughts
        self._thought_tokens = 0
        self._marks = shown
        self._ends = ends
        self._shows_end = sampling.include_stop
        self._by_id = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._prompt_tokens = len(prompt)
        self._tokens = 0
        self._begun = 0
        self._untold: list[int] = []
        self._telling = Telling(vocabulary) if wants_tokens(request) else None
        # An echo has told it.
        self._prompt = tuple(prompt) if request.token_ids and not request.echo else None

    def resume(self, tokens: Sequence[int], *, most: int) -> Delta | None:
        """Take the answer's first tokens, whose deltas were told already. If they are the whole answer, which
        has at most so many, the delta that says so; it has no text."""
        self._begun = len(tokens)
        for at, token in enumerate(tokens, start=1):
            delta = self.take(token, last=token in self._ends or at >= most)
            if delta is not None and delta.finish_reason is not None:
                return replace(delta, text="", completion_tokens=0, ids=(), detail=None)
        self._untold.clear()
        return None

    def take(self, token: int, *, last: bool, likely: Likely | None = None) -> Delta | None:
        """The delta this token makes; None while its text is kept back."""
        self._tokens += 1
        self._untold.append(token)
        ends = last and token in self._ends
        piece = "" if ends and not self._shows_end else self._text_of(token)
        if last:
            piece += self._text.flush()
        thought = ""
        if self._thoughts is not None:
            thought, piece = self._think(self._thoughts, piece, last)
        if self._telling is not None and (self._thoughts is None or self._thoughts.answering):
            self._telling.add(token, piece, likely)
        # Text that is out before the least length is no part of a stop string.
        text = piece if self._tokens < self._min_tokens else self._stops.feed(piece)
        if last:
            text += self._stops.flush()
        stop: str | int | None = self._stops.met
        if stop is not None:
            reason = "stop"
        elif last:
            reason = "stop" if ends else "length"
            stop = token if token in self._by_id and ends else None
        else:
            reason = None
        if not text and not thought and reason is None:
            return None
        ids = tuple(self._untold)
        self._untold.clear()
        return Delta(
            text=text,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._tokens - self._begun,
            finish_reason=reason,
            stop=stop,
            ids=ids,
            detail=self._detail(thought, text, ended=reason is not None),
        )

    def _text_of(self, token: int) -> str:
        mark = self._marks.get(token)
        return self._text.push(token) if mark is None else self._text.flush() + mark

    def _think(self, thoughts: Thoughts, piece: str, last: bool) -> tuple[str, str]:
        """What of the piece, and of what was held, is thought and what is answer."""
        self._thought_tokens += thoughts.thinking
        thought, text = thoughts.feed(piece)
        if last:
            rest = thoughts.flush()
            thought, text = thought + rest[0], text + rest[1]
        return thought, text

    def _detail(self, thought: str, text: str, *, ended: bool) -> Detail | None:
        telling = self._telling
        if telling is None and not self._thought_tokens:
            return None
        prompt, self._prompt = self._prompt, None
        return Detail(
            reasoning=thought,
            reasoning_tokens=self._thought_tokens,
            tokens=() if telling is None else telling.shown(text, ended=ended),
            prompt_token_ids=prompt,
        )


class Telling:
    """Tokens wait here until all of their text is shown: one of a stop string never is."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        self._vocabulary = vocabulary
        self._waiting: deque[tuple[int, Token]] = deque()
        """Tokens, each with where in the text it ends."""
        self._said = 0
        self._shown = 0

    def add(self, id_: int, text: str, likely: Likely | None) -> None:
        self._said += len(text)
        self._waiting.append((self._said, told(id_, text, likely, self._vocabulary)))

    def shown(self, text: str, *, ended: bool) -> tuple[Token, ...]:
        """The tokens that are out with this text."""
        self._shown += len(text)
        out: list[Token] = []
        while self._waiting and self._waiting[0][0] <= self._shown:
            out.append(self._waiting.popleft()[1])
        if ended and self._waiting:
            end, token = self._waiting[0]
            begin = end - len(token.text)
            if begin < self._shown:
                out.append(_cut(token, self._shown - begin))
        return tuple(out)


def _cut(token: Token, characters: int) -> Token:
    """What is shown of a token in which a stop string begins."""
    text = token.text[:characters]
    cut = replace(token, text=text, raw=text.encode(), top=())
    return replace(cut, top=tuple(cut if one.id == token.id else one for one in token.top))


def wants_tokens(request: GenerationRequest) -> bool:
    return request.token_ids or request.top_logprobs is not None


def echoed(
    prompt: Sequence[int], given: str, likely: Sequence[Likely | None], vocabulary: Vocabulary
) -> tuple[Token, ...]:
    """The tokens of an echoed prompt, whose text is `given`."""
    pieces = _pieces(prompt, Detokenizer(vocabulary.spelled_text))
    if "".join(pieces) != given:  # it has special tokens that nobody wrote
        pieces = _pieces(prompt, Detokenizer(vocabulary.text))
    return tuple(told(*one, vocabulary) for one in zip(prompt, pieces, likely, strict=True))


def prompt_logprobs(
    prompt: Sequence[int], likely: Sequence[Likely | None], vocabulary: Vocabulary
) -> list[dict[str, dict[str, Any]] | None]:
    """What is said of a prompt's tokens, in vLLM's words."""

    def entry(id_: int, logprob: float, rank: int) -> dict[str, Any]:
        text = vocabulary.raw(id_).decode(errors="replace")
        return {"logprob": logprob, "rank": rank, "decoded_token": text}

    told: list[dict[str, dict[str, Any]] | None] = []
    for id_, one in zip(prompt, likely, strict=True):
        if one is None:
            told.append(None)
            continue
        entries = {str(id_): entry(id_, one.logprob, one.rank)}
        for rank, (other, logprob) in enumerate(one.top, 1):
            entries.setdefault(str(other), entry(other, logprob, rank))
        told.append(entries)
    return told


def _pieces(prompt: Sequence[int], text: Detokenizer) -> list[str]:
    pieces = [text.push(token) for token in prompt]
    pieces[-1] += text.flush()
    return pieces


def told(id_: int, text: str, likely: Likely | None, vocabulary: Vocabulary) -> Token:
    """A token as answers tell it. `likely`: None for one that nothing is said of."""
    token = Token(
        id=id_,
        text=text,
        raw=b"" if not text and id_ in vocabulary.special else vocabulary.raw(id_),
        logprob=None if likely is None else likely.logprob,
    )
    if likely is None or not likely.top:
        return token
    return replace(
        token,
        top=tuple(token if one == id_ else _other(one, logprob, vocabulary) for one, logprob in likely.top),
    )


def _other(id_: int, logprob: float, vocabulary: Vocabulary) -> Token:
    raw = vocabulary.raw(id_)
    return Token(id=id_, text=raw.decode(errors="replace"), raw=raw, logprob=logprob)
