"""The words of the simulated engine: its vocabulary, and what it tells of single tokens."""

from __future__ import annotations

import hashlib
import itertools
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import replace
from random import Random
from typing import Any

import msgspec

from inference.engines.base import Detail, GenerationRequest, Token

_VOCABULARY = (
    "steam whistle signal track engine turntable roundhouse coal water valve piston wheel rail "
    "sleeper bridge tunnel station platform carriage buffer coupling driver fireman guard timetable "
    "junction siding freight express local evening morning slowly gently onward north south"
)
_WORDS = _VOCABULARY.split()
_KNOWN = _WORDS + [word.capitalize() for word in _WORDS]
_IDS = {word: at for at, word in enumerate(_KNOWN)}

VOCABULARY_SIZE = 32768


def token_id(word: str) -> int:
    """Its own words have ids of their own; all others share the rest."""
    known = _IDS.get(word.strip())
    if known is not None:
        return known
    return len(_KNOWN) + zlib.crc32(word.strip().encode(errors="replace")) % (VOCABULARY_SIZE - len(_KNOWN))


def text_of(tokens: list[int]) -> str:
    return " ".join(_KNOWN[token % len(_KNOWN)] for token in tokens)


def split(text: str) -> list[str]:
    """The text as tokens: words, each with the space before it; joined they are the text."""
    return re.findall(r"\s*\S+(?:\s+\Z)?", text) or ([text] if text else [])


def digest(messages: list[dict[str, Any]], sample: int) -> bytes:
    # Not Python's hash(): that differs between processes, and two replicas must say the same.
    encoded = msgspec.json.encode(messages)
    return hashlib.sha256(encoded if not sample else encoded + b"%d" % sample).digest()


def lorem(seed: bytes) -> Iterator[str]:
    choose = Random(seed)  # noqa: S311 - words for show
    yield choose.choice(_WORDS).capitalize()
    while True:
        yield " " + choose.choice(_WORDS)


def after(words: Iterator[str], characters: int) -> tuple[Iterator[str], int]:
    """The words after so many characters, the first perhaps from its middle, and how many came before."""
    for before, word in enumerate(words):
        if characters < len(word):
            return itertools.chain([word[characters:]], words), before
        characters -= len(word)
    return iter(()), 0


class Telling:
    """What one answer's deltas tell beyond text."""

    def __init__(self, request: GenerationRequest, messages: list[dict[str, Any]], thoughts: int) -> None:
        self._top = request.top_logprobs
        self._tokens = wants_tokens(request)
        self._thoughts = thoughts
        self._prompt = (
            tuple(token_id(word) for one in messages for word in str(one.get("content") or "").split())
            if request.token_ids
            else None
        )
        if request.echo:  # the echo has told it
            self._prompt = None
        self._unshown: list[Token] = []
        self._ahead = 0
        """How much of the first unshown token's text was shown."""
        self.needed = self._tokens or thoughts > 0

    def of(self, count: int, word: str, text: str) -> Detail:
        """For the token that is the `count`th, of which `text` is shown now."""
        prompt, self._prompt = self._prompt, None
        thinking = count <= self._thoughts
        return Detail(
            reasoning=word if thinking else "",
            reasoning_tokens=min(count, self._thoughts),
            tokens=() if thinking or not self._tokens else self._shown(count, word, text),
            prompt_token_ids=prompt,
        )

    def _shown(self, count: int, word: str, text: str) -> tuple[Token, ...]:
        """The tokens whose text is out with this. Text held for a stop string holds its tokens too."""
        self._unshown.append(_token(word, count, self._top or 0))
        self._ahead += len(text)
        shown: list[Token] = []
        while self._unshown and self._ahead >= len(self._unshown[0].text):
            token = self._unshown.pop(0)
            self._ahead -= len(token.text)
            shown.append(token)
        return tuple(shown)


def wants_tokens(request: GenerationRequest) -> bool:
    return request.token_ids or request.top_logprobs is not None


def echoed(request: GenerationRequest, text: str) -> Detail | None:
    """What the echo of a prompt tells of its tokens; None when nobody asks."""
    if not wants_tokens(request):
        return None
    tokens = tuple(_token(word, at, request.top_logprobs or 0) for at, word in enumerate(split(text)))
    return Detail(
        tokens=tokens, prompt_token_ids=tuple(token.id for token in tokens) if request.token_ids else None
    )


def _token(word: str, at: int, top: int) -> Token:
    """A made-up probability between a half and one, and alternatives that share the rest. The first of a
    prompt, at 0, has none."""
    if at == 0:
        return Token(id=token_id(word), text=word, raw=word.encode(errors="replace"), logprob=None)
    chance = 0.5 + zlib.crc32(b"%d" % at + word.encode(errors="replace")) % 1000 / 2100
    return replace(_plain(word, chance), top=tuple(_likely(word, chance, top)))


def _likely(word: str, chance: float, top: int) -> Iterator[Token]:
    if top:
        yield _plain(word, chance)
    others = (other for other in (f" {one}" for one in _WORDS) if other != word)
    for rank, other in zip(range(1, top), others, strict=False):
        yield _plain(other, (1 - chance) / 2**rank)


def _plain(word: str, chance: float) -> Token:
    raw = word.encode(errors="replace")
    return Token(id=token_id(word), text=word, raw=raw, logprob=math.log(chance))
