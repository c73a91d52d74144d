"""Token ids to text as they come, never half a character."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

HALF = "\N{REPLACEMENT CHARACTER}"
"""What decoders write for bytes that are not (yet) a whole character."""

MAX_PENDING = 64
"""Tokens kept back for a character that does not end: so many are no character, but noise."""


class Detokenizer:
    """Text of a growing list of tokens; the pieces joined equal the text of the whole list."""

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        # The last tokens that gave text, then those that did not yet. A token is decoded together
        # with what precedes it, because its text depends on that (spaces, bytes of one character).
        self._window: list[int] = []
        self._context = 0
        self._sent = ""

    def push(self, token: int) -> str:
        """The text that became certain with this token; often one word, "" while a character is open."""
        self._window.append(token)
        text = self._decode(self._window)
        if text.endswith(HALF):
            if len(self._window) - self._context < MAX_PENDING:
                return ""
            # Only the very end can still change.
            piece = text[len(self._sent) : -1]
            self._window = self._window[-8:]
            self._context = 0
            self._sent = self._decode(self._window)[:-1]
            return piece
        piece = text[len(self._sent) :]
        if piece:
            self._window = self._window[self._context :]
            self._context = len(self._window)
            self._sent = self._decode(self._window)
        elif len(self._window) - self._context >= MAX_PENDING:
            del self._window[self._context :]  # tokens without text, such as control tokens
        return piece

    def flush(self) -> str:
        """What is left when no more tokens come."""
        piece = self._decode(self._window)[len(self._sent) :]
        self._window, self._context, self._sent = [], 0, ""
        return piece


class Vocabulary:
    """Texts and bytes of token ids."""

    def __init__(self, tokenizer: Any) -> None:
        self._backend = tokenizer.backend_tokenizer
        added = self._backend.get_added_tokens_decoder()
        self._added: dict[int, str] = {id_: token.content for id_, token in added.items()}
        self.special = frozenset(id_ for id_, token in added.items() if token.special)
        """Tokens that are no text."""
        self._bytes_of = _kind_of(self._backend)
        self._raw: dict[int, bytes] = {}

    def text(self, ids: list[int]) -> str:
        """Without special tokens."""
        decoded: str = self._backend.decode(ids, skip_special_tokens=True)
        return decoded

    def spelled_text(self, ids: list[int]) -> str:
        """With special tokens as they are written."""
        decoded: str = self._backend.decode(ids, skip_special_tokens=False)
        return decoded

    def raw(self, id_: int) -> bytes:
        """The bytes that a token stands for, which need not be whole characters."""
        raw = self._raw.get(id_)
        if raw is None:
            raw = self._raw[id_] = self._find(id_)
        return raw

    def _find(self, id_: int) -> bytes:
        if id_ in self._added:
            return self._added[id_].encode()
        return self._bytes_of(self._backend.id_to_token(id_) or "")


def _kind_of(backend: Any) -> Callable[[str], bytes]:
    """How the vocabulary spells bytes: by what the tokenizer's decoder undoes."""
    decoder = {} if backend.decoder is None else json.loads(backend.decoder.__getstate__())
    kinds = {one.get("type") for one in decoder.get("decoders", [decoder])}
    return _of_byte_level if "ByteLevel" in kinds else _of_sentence_piece


def _byte_level() -> dict[str, int]:
    """GPT-2's letters for bytes: those that print stand for themselves, the others come after Latin-1."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTES = _byte_level()
_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _of_byte_level(spelled: str) -> bytes:
    return b"".join(bytes([_BYTES[one]]) if one in _BYTES else one.encode() for one in spelled)


def _of_sentence_piece(spelled: str) -> bytes:
    byte = _BYTE.fullmatch(spelled)
    return bytes([int(byte[1], 16)]) if byte else spelled.replace("\u2581", " ").encode()
