"""Token ids in, token ids out: transformers' continuous batching behind a small, asynchronous face.

The manager runs the model in a thread of its own. Requests and cancellations reach it by queues;
its tokens come back to the event loop in one call per step. What we replace of it, through the
places it has for that, is the sampler and the router of outputs: its own keeps the outputs of
cancelled requests for ever.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import queue
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from transformers import ContinuousBatchingConfig, GenerationConfig

from inference.engines.base import EngineError
from inference.engines.transformers import attention, linear
from inference.engines.transformers.loading import Loaded
from inference.engines.transformers.sampling import KEY, Choice, Row, Sampler
from inference.protocol import Load

logger = logging.getLogger("roundhouse.engine")

NO_EOS = -1


class Ticket:
    """One request in the batcher: await `next()` for its tokens."""

    def __init__(self, number: str, row: Row) -> None:
        self.number = number
        self.told = row.told
        """What was said of each token, when the choice asks for it: as long as the tokens are."""
        self._seen = 0
        self._news: asyncio.Queue[tuple[list[int], bool] | EngineError] = asyncio.Queue()

    async def next(self) -> tuple[list[int], bool]:
        """New tokens, and whether they are the last. Raises EngineError when the request failed."""
        news = await self._news.get()
        if isinstance(news, EngineError):
            raise news
        return news

    def deliver(self, tokens: list[int], last: bool) -> int:
        """Take what is new of all tokens so far; return how many that are."""
        fresh = tokens[self._seen :]
        self._seen += len(fresh)
        self._news.put_nowait((fresh, last))
        return len(fresh)

    def fail(self, error: EngineError) -> None:
        self._news.put_nowait(error)


def call_in_loop(loop: asyncio.AbstractEventLoop, call: Callable[..., None], *about: Any) -> None:
    """From a batcher's thread. Nothing happens where the loop has ended: nobody waits there any more."""
    try:
        loop.call_soon_threadsafe(call, *about)
    except RuntimeError:
        logger.debug("The event loop is closed: outputs of the last step are dropped.")


class Batcher:
    """`prepare` and `stop` block and belong in a thread; all else belongs to `loop`."""

    def __init__(self, loaded: Loaded, slots: int, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._tickets: dict[str, Ticket] = {}
        self._numbers = itertools.count()
        self._tokens = 0
        self._ended = False
        linear.pack_in(loaded.model)
        self._manager = _manager(loaded, slots)
        attention.use_in(loaded.model)
        self._manager.output_router = _Router(self)
        self._manager.logit_processor = Sampler(partial(call_in_loop, loop, self._fail))
        self.thread: threading.Thread | None = None

    def prepare(self) -> int:
        """Allocate the cache and start the thread; return how many tokens the cache holds."""
        self._manager.warmup()
        cache = self._manager.batch_processor.cache
        self._manager.start()
        self.thread = self._manager._generation_thread
        return int(cache.num_blocks * self._manager.continuous_batching_config.page_size)

    def submit(self, prompt: list[int], *, max_tokens: int, eos: frozenset[int], choice: Choice) -> Ticket:
        """Queue one request. Everything is checked by the caller."""
        row = Row(choice)
        ticket = Ticket(str(next(self._numbers)), row)
        if not self.alive():
            raise EngineError("The engine has ended.")
        self._tickets[ticket.number] = ticket
        taken = self._manager.add_request(
            prompt,
            request_id=ticket.number,
            max_new_tokens=max_tokens,
            streaming=True,
            eos_token_id=sorted(eos) or NO_EOS,
            **{KEY: row},
        )
        if taken is None:
            del self._tickets[ticket.number]
            raise EngineError("The engine has ended.")
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """No further step is spent on this request. Harmless when it is over."""
        if self._tickets.pop(ticket.number, None) is not None:
            self._manager.cancel_request(ticket.number)

    def pause(self) -> AbstractContextManager[None]:
        """Within it, in any thread, no step is made. Raises RuntimeError when there is no thread."""
        pause: AbstractContextManager[None] = self._manager.pause()
        return pause

    def alive(self) -> bool:
        return (
            not self._ended
            and self._manager.is_running()
            and self._manager.background_thread_status.can_accept_new_requests() is None
        )

    def report(self) -> Load:
        """What the thread is doing. Reads sizes only, so it needs no lock."""
        processor = self._manager.batch_processor
        if processor is None:
            return Load(tokens=self._tokens)
        active = set(processor.scheduler.active_requests)
        running, waiting = len(active), len(self._tickets.keys() - active)
        if waiting and not running:
            # Nothing stands before it: a thread that is well takes it at once, so one that hangs
            # shows as "running, and no steps".
            running, waiting = 1, waiting - 1
        cache = processor.cache
        cached = sum(
            len(allocator.ledger.cached_blocks) * allocator.bytes_per_block
            for allocator in cache.cache_allocators.values()
        )
        total = cache.num_sectors * cache.bytes_per_sector
        free = cache.compute_free_capacity(relative=False) + cached
        return Load(
            running=running,
            waiting=waiting,
            kv_use=min(1.0, max(0.0, 1 - free / total)),
            steps=self._manager.current_batch,
            tokens=self._tokens,
        )

    def ended(self) -> None:
        """The thread is gone: nobody may wait for it any longer."""
        self._ended = True
        for ticket in self._tickets.values():
            ticket.fail(EngineError("The engine ended while it was answering."))
        self._tickets.clear()

    def stop(self, timeout: float) -> None:
        self._manager.stop(block=True, timeout=timeout, hard_stop=True)

    def hand_over(self, outputs: list[Any]) -> None:
        """From the thread: one step's outputs."""
        call_in_loop(self._loop, self._take, outputs)

    def _fail(self, number: str, error: EngineError) -> None:
        """The sampler gave one request up; the others go on."""
        ticket = self._tickets.get(number)
        if ticket is not None:
            self.cancel(ticket)
            ticket.fail(error)

    def _take(self, outputs: list[Any]) -> None:
        for output in outputs:
            ticket = self._tickets.get(output.request_id)
            if ticket is None:
                if not output.is_finished():
                    # Cancelled while this step ran, or (rarely) the cancellation overtook the
                    # request between the manager's two queues and was lost: say it again.
                    self._manager.cancel_request(output.request_id)
            elif output.error is not None:
                logger.error("A request failed in the engine: %s", output.error)
                del self._tickets[output.request_id]
                ticket.fail(EngineError("The engine failed while it was answering."))
            else:
                last = output.is_finished()
                if last:
                    del self._tickets[output.request_id]
                self._tokens += ticket.deliver(output.generated_tokens, last)


class _Router:
    """Stands in for the manager's `OutputRouter` (same members that the thread calls)."""

    def __init__(self, batcher: Batcher) -> None:
        self._batcher = batcher
        self.output_queue: queue.Queue[Any] = queue.Queue()

    def deliver(self, output: Any) -> None:
        self._batcher.hand_over([output])

    def deliver_batch(self, outputs: list[Any]) -> None:
        self._batcher.hand_over(outputs)

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        state.error = f"{type(error).__name__}: {error}"
        self.deliver(state.to_generation_output())


def _manager(loaded: Loaded, slots: int) -> Any:
    """A manager with defaults of our own: the model's generation config may ask for what it cannot do."""
    generation = GenerationConfig(
        do_sample=False,
        max_new_tokens=1,
        eos_token_id=sorted(loaded.eos) or NO_EOS,
        pad_token_id=loaded.tokenizer.pad_token_id,
    )
    batching = ContinuousBatchingConfig(
        page_size=loaded.plan.page,
        num_blocks=loaded.plan.blocks,
        max_batch_tokens=loaded.plan.batch_tokens,
        max_requests_per_batch=slots,
        # The sampler decides on the processor which rows to sort: no recorded graphs, no overlap.
        use_cuda_graph=False,
        use_async_batching=False,
    )
    return loaded.model.init_continuous_batching(
        generation_config=generation, continuous_batching_config=batching
    )
