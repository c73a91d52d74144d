"""What a request asks of a worker, as far as can be told without a tokenizer."""

from __future__ import annotations

from inference.dispatch.prefixes import Prefixes

BYTES_PER_TOKEN = 4
"""Of JSON around mostly English text; other scripts have fewer tokens to the character, and longer ones."""
ANSWER_WORTH = 4
"""A generated token keeps an engine busy about as long as so many tokens of a prompt."""
USUAL_ANSWER = 256
"""Tokens taken for an answer that may be of any length: most end long before their limit."""

BLOCK_BYTES = 512
BLOCK_TOKENS = BLOCK_BYTES // BYTES_PER_TOKEN
MAX_BLOCKS = 128
"""Of a prompt; what comes after them has little to do with where it is answered best."""


class Demand:
    """One request. Made for each, so it keeps what it is given and computes the rest when asked."""

    __slots__ = ("_blocks", "answer_tokens", "body", "cached_tokens", "prompt_tokens", "session")

    def __init__(
        self, body: bytes = b"", *, most_tokens: int | None = 0, answers: int = 1, session: int = 0
    ) -> None:
        """`body` is the JSON for the worker; `most_tokens` bounds each of the answers, None: nothing does.
        Requests of the same `session` build on one another; 0: nobody said so."""
        self.body = body
        self.session = session
        self._blocks: tuple[int, ...] | None = None
        self.cached_tokens = 0
        """Of the prompt's beginning, probably in the cache of the worker that was chosen."""
        self.prompt_tokens = len(body) // BYTES_PER_TOKEN
        self.answer_tokens = answers * (
            USUAL_ANSWER if most_tokens is None else min(most_tokens, USUAL_ANSWER)
        )

    def work(self, cached_tokens: int = 0) -> int:
        """What it costs a worker that has the prompt's first tokens in its cache, in tokens of a prompt."""
        return max(0, self.prompt_tokens - cached_tokens) + ANSWER_WORTH * self.answer_tokens

    def cached_by(self, prefixes: Prefixes) -> int:
        """Tokens of the prompt that a worker which was sent these probably has in its cache."""
        if self.session and prefixes.matched((self.session,)):
            # What came before in its session is most of a prompt.
            return self.prompt_tokens
        return prefixes.matched(self.blocks) * BLOCK_TOKENS

    def note_sent(self, prefixes: Prefixes) -> None:
        """It goes to the worker that was sent these."""
        prefixes.note((*self.blocks, self.session) if self.session else self.blocks)

    @property
    def blocks(self) -> tuple[int, ...]:
        """Hashes of the prompt's blocks, each of all up to its end: two prompts that begin alike share
        their first ones. Empty for a prompt shorter than a block. Good within this process only."""
        if self._blocks is None:
            self._blocks = _blocks(self.body)
        return self._blocks


NO_DEMAND = Demand()


def _blocks(body: bytes) -> tuple[int, ...]:
    # What stands before, the model's name and options, does not reach the engine's cache.
    start = max(body.find(b'"messages":'), body.find(b'"prompt":'), 0)
    end = min(len(body), start + MAX_BLOCKS * BLOCK_BYTES)
    blocks = []
    before = 0
    for at in range(start, end - BLOCK_BYTES + 1, BLOCK_BYTES):
        before = hash((before, body[at : at + BLOCK_BYTES]))
        blocks.append(before)
    return tuple(blocks)
