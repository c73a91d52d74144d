"""Static batches, for models that continuous batching cannot run: encoder-decoder ones, those without paged
attention, and those whose weights are split over several devices, the processor or the disk.

`model.generate` does the work, in a thread: requests that wait together go as one padded batch, and those
that come later wait for its end. Each step's tokens are chosen by the very sampler of the other batcher and
reach the event loop at once; a request that is over or cancelled gives nothing more, and when all are, the
batch ends before its next step.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import threading
import traceback
from collections import deque
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import GenerationConfig, LogitsProcessorList
from transformers.generation import StoppingCriteriaList

from inference.engines.base import EngineError
from inference.engines.memory import cache_per_token
from inference.engines.transformers import placing
from inference.engines.transformers.batcher import Ticket, call_in_loop
from inference.engines.transformers.loading import Loaded, is_out_of_memory
from inference.engines.transformers.sampling import GREEDY, KEY, Choice, Row, Sampler
from inference.protocol import Load

logger = logging.getLogger("roundhouse.engine")

_OVER = Row(GREEDY)


@dataclass(slots=True)
class _Request:
    """One request, with the members that the sampler knows of continuous batching's states."""

    ticket: Ticket
    initial_tokens: list[int]
    row: Row
    max_tokens: int
    ends: frozenset[int]
    generated_tokens: list[int] = field(default_factory=list)
    over: bool = False
    """Nothing more is wanted of it. Only ever set, by either thread."""

    @property
    def request_id(self) -> str:
        return self.ticket.number

    @property
    def logit_processor_kwargs(self) -> dict[str, Row]:
        return {KEY: _OVER if self.over else self.row}

    @property
    def _true_initial_tokens(self) -> int:
        return len(self.initial_tokens)

    @property
    def tokens(self) -> int:
        """Of the cache, when it is at its longest."""
        return len(self.initial_tokens) + self.max_tokens


@dataclass(frozen=True, slots=True)
class _InBatch:
    state: _Request
    has_new_token: bool = True


class StaticBatcher:
    """The same face as `Batcher`: `prepare` and `stop` block and belong in a thread; all else belongs to
    `loop`."""

    def __init__(self, loaded: Loaded, slots: int, loop: asyncio.AbstractEventLoop) -> None:
        model = loaded.model
        self._model = model
        self._loop = loop
        self._slots = slots
        self._two_parts = bool(model.config.is_encoder_decoder)
        self._pads = _pads(model)
        self._device = placing.first_device(model)
        self._pad = loaded.tokenizer.pad_token_id or 0
        self._generation = _plain_generation(model, self._pad)
        self._room = _room(loaded)
        self._numbers = itertools.count()
        self._requests: dict[str, _Request] = {}
        self._waiting: deque[_Request] = deque()
        self._batch: list[_Request] = []
        self._changed = threading.Condition()
        """Guards `_waiting` and `_stopping`."""
        self._stopping = False
        self._steps = 0
        self._tokens = 0
        self._sampler = Sampler(partial(call_in_loop, loop, self._fail))
        self.thread: threading.Thread | None = None

    def prepare(self) -> int:
        """Start the thread; return how many tokens of one request memory holds."""
        self.thread = threading.Thread(target=self._run, name="static-batches", daemon=True)
        self.thread.start()
        return self._room

    def submit(self, prompt: list[int], *, max_tokens: int, eos: frozenset[int], choice: Choice) -> Ticket:
        """Queue one request. Everything is checked by the caller."""
        if not self.alive():
            raise EngineError("The engine has ended.")
        row = Row(choice)
        ticket = Ticket(str(next(self._numbers)), row)
        request = _Request(ticket, prompt, row, max_tokens, eos)
        self._requests[ticket.number] = request
        with self._changed:
            self._waiting.append(request)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """No further step is spent on this request alone. Harmless when it is over."""
        request = self._requests.pop(ticket.number, None)
        if request is not None:
            request.over = True
            with self._changed:
                if request in self._waiting:
                    self._waiting.remove(request)

    def pause(self) -> AbstractContextManager[None]:
        raise RuntimeError("A static batch cannot be paused.")

    def alive(self) -> bool:
        return not self._stopping and self.thread is not None and self.thread.is_alive()

    def report(self) -> Load:
        """What the thread is doing."""
        batch = [request for request in self._batch if not request.over]
        running, waiting = len(batch), len(self._waiting)
        if waiting and not running:
            # As in `Batcher`: a thread that is well takes it at once.
            running, waiting = 1, waiting - 1
        used = sum(len(one.initial_tokens) + len(one.generated_tokens) for one in batch)
        return Load(
            running=running,
            waiting=waiting,
            kv_use=min(1.0, used / self._room),
            steps=self._steps,
            tokens=self._tokens,
        )

    def ended(self) -> None:
        """The thread is gone: nobody may wait for it any longer."""
        self._stopping = True
        for request in self._requests.values():
            request.over = True
            request.ticket.fail(EngineError("The engine ended while it was answering."))
        self._requests.clear()

    def stop(self, timeout: float) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self.thread is not None:
            self.thread.join(timeout)

    # -- the thread

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._stopping)
                if self._stopping:
                    return
                self._batch = batch = self._next_batch()
            try:
                self._generate(batch)
            except Exception as error:
                self._failed(batch, error)
                if not is_out_of_memory(error):
                    return  # a model or a device that is broken: the worker is replaced
            finally:
                self._batch = []

    def _next_batch(self) -> list[_Request]:
        """The request that waits longest, and those after it that go with it: as many as there are slots and
        memory for, and of one length where the model cannot do without."""
        batch = [self._waiting.popleft()]
        for request in list(self._waiting):
            together = [*batch, request]
            if len(together) > self._slots:
                break
            same = len(request.initial_tokens) == len(batch[0].initial_tokens)
            longest = max(one.tokens for one in together)
            if (self._pads or same) and len(together) * longest <= self._room:
                batch = together
                self._waiting.remove(request)
        return batch

    def _generate(self, batch: list[_Request]) -> None:
        width = max(len(request.initial_tokens) for request in batch)
        prompts, mask = [], []
        for request in batch:
            gap = width - len(request.initial_tokens)
            before, after = (0, gap) if self._two_parts else (gap, 0)
            prompts.append([self._pad] * before + request.initial_tokens + [self._pad] * after)
            mask.append([0] * before + [1] * len(request.initial_tokens) + [0] * after)
        self._model.generate(
            torch.tensor(prompts, device=self._device),
            attention_mask=torch.tensor(mask, device=self._device),
            generation_config=self._generation,
            max_new_tokens=max(request.max_tokens for request in batch),
            logits_processor=LogitsProcessorList([_Choosing(self, batch)]),
            stopping_criteria=StoppingCriteriaList([_Over(self, batch)]),
        )

    def choose(self, batch: list[_Request], scores: torch.Tensor) -> torch.Tensor:
        """From the thread, at each step: scores whose largest value is the token chosen, which is told."""
        self._steps += 1
        self._sampler.prepare_tensor_args([_InBatch(request) for request in batch], scores)
        scores = self._sampler(scores, scores, scores)
        news: list[tuple[Ticket, list[int], bool]] = []
        for request, token in zip(batch, scores.argmax(-1).tolist(), strict=True):
            if request.over:
                continue
            request.generated_tokens.append(token)
            last = token in request.ends or len(request.generated_tokens) == request.max_tokens
            request.over = last
            news.append((request.ticket, list(request.generated_tokens), last))
        call_in_loop(self._loop, self._take, news)
        return scores

    def over(self, batch: Sequence[_Request]) -> list[bool]:
        return [self._stopping or request.over for request in batch]

    def _failed(self, batch: list[_Request], error: Exception) -> None:
        # Where, but not its message: that may have what a client wrote.
        where = "".join(traceback.format_tb(error.__traceback__))
        logger.error("A batch failed in the engine: %s\n%s", type(error).__name__, where)
        why = EngineError("The engine failed while it was answering.")
        for request in batch:
            request.over = True
            call_in_loop(self._loop, self._fail, request.request_id, why)

    # -- the loop

    def _take(self, news: list[tuple[Ticket, list[int], bool]]) -> None:
        for ticket, tokens, last in news:
            if ticket.number not in self._requests:
                continue  # cancelled while this step ran
            if last:
                del self._requests[ticket.number]
            self._tokens += ticket.deliver(tokens, last)

    def _fail(self, number: str, error: EngineError) -> None:
        request = self._requests.pop(number, None)
        if request is not None:
            request.over = True
            request.ticket.fail(error)


class _Choosing:
    """A logits processor of `generate`: the last one."""

    def __init__(self, batcher: StaticBatcher, batch: list[_Request]) -> None:
        self._batcher, self._batch = batcher, batch

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._batcher.choose(self._batch, scores)


class _Over:
    """A stopping criterion of `generate`."""

    def __init__(self, batcher: StaticBatcher, batch: list[_Request]) -> None:
        self._batcher, self._batch = batcher, batch

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        over = self._batcher.over(self._batch)
        return torch.tensor(over, device=input_ids.device, dtype=torch.bool)


def _pads(model: Any) -> bool:
    """Whether padding leaves the other rows' answers as they are: not where a state goes through it."""
    kinds = set(getattr(model.config.get_text_config(decoder=True), "layer_types", None) or ())
    return not model._is_stateful and all("attention" in kind and "linear" not in kind for kind in kinds)


def _plain_generation(model: Any, pad: int) -> GenerationConfig:
    """Only what a model cannot do without: the rest of its generation config are wishes about answers, and
    those come with each request. The model's own is replaced, for `generate` would take from it."""
    own = model.generation_config
    plain = GenerationConfig(
        do_sample=False,
        bos_token_id=own.bos_token_id,
        pad_token_id=pad,
        decoder_start_token_id=own.decoder_start_token_id,
        forced_bos_token_id=own.forced_bos_token_id,
    )
    model.generation_config = plain
    return plain


def _room(loaded: Loaded) -> int:
    """Tokens that there is memory for, in all requests of a batch together."""
    plan, model = loaded.plan, loaded.model
    if plan.blocks is not None:
        return plan.blocks * plan.page
    config = model.config.get_text_config(decoder=True)
    per_token = max(1, cache_per_token(config.to_dict(), model.dtype.itemsize))
    numbers = {place for place in placing.places(model) if place.startswith("cuda")}
    # Half of what is free: generate builds a batch's cache anew at each step while it grows.
    free = sum(torch.cuda.mem_get_info(torch.device(place))[0] // 2 for place in numbers)
    return max(plan.page, free // per_token) if numbers else plan.context_length
