"""The `transformers` engine: one request from messages to deltas."""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any

from inference.engines.base import (
    PLAIN,
    BadRequest,
    Delta,
    EngineError,
    EngineSpec,
    GenerationRequest,
    LoadError,
    Sampling,
    Template,
    check_token_ids,
    too_long,
)
from inference.engines.stops import StopStrings
from inference.engines.transformers.arguments import read_arguments
from inference.engines.transformers.batcher import Batcher
from inference.engines.transformers.loading import Loaded, is_out_of_memory, load, out_of_memory
from inference.engines.transformers.prompt import Prompts
from inference.engines.transformers.sampling import GREEDY, Choice
from inference.engines.transformers.text import Detokenizer
from inference.protocol import Cause, Load, Progress

logger = logging.getLogger("roundhouse.engine")

_CAPABILITIES = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "stop",
        "ignore_eos",
        "n",
        "echo",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
        "endpoint:chat",
        "endpoint:completions",
        "endpoint:tokenize",
    }
)
STOP_SECONDS = 4.0
WARM_UP_TOKENS = 2
LEAST_TEMPERATURE = 0.01
"""Below it, dividing by the temperature overflows, and all that is left is the likeliest token."""
MOST_TEMPERATURE = 100.0


class TransformersEngine:
    """Serves one model folder by Hugging Face transformers. See `inference.engines.base.Engine`.

    Creating it checks the arguments (LoadError) and reads nothing.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.capabilities = _CAPABILITIES
        self.context_length = 0
        self._spec = spec
        self._arguments = read_arguments(spec.arguments)
        if spec.slots < 1:
            raise LoadError(Cause.BAD_ARGUMENT, "'slots' must be at least 1.")
        self._loaded: Loaded | None = None
        self._prompts: Prompts | None = None
        self._batcher: Batcher | None = None

    async def load(self, progress: Callable[[Progress], None]) -> None:
        """Get ready to generate, reporting progress. Raises LoadError."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[tuple[Loaded, Batcher, int]] = loop.create_future()

        def tell(callback: Callable[..., object], *about: object) -> None:
            try:
                loop.call_soon_threadsafe(callback, *about)
            except RuntimeError:
                logger.debug("The event loop closed before the engine did.")

        def report(step: Progress) -> None:
            tell(progress, step)

        def run() -> None:
            # A daemon thread, and so is the batching thread that it starts: a process that has to
            # end is not held up by a long step. It stays to tell us when the batching thread ends.
            try:
                loaded = load(self._spec, self._arguments, report)
                report(Progress(step="warming up"))
                batcher = Batcher(loaded, self._spec.slots, loop)
                room = batcher.prepare()
            except BaseException as error:
                tell(_settle, ready, _as_load_error(error))
                return
            tell(_settle, ready, (loaded, batcher, room))
            if batcher.thread is not None:
                batcher.thread.join()
            tell(batcher.ended)

        threading.Thread(target=run, name="engine", daemon=True).start()
        loaded, batcher, room = await ready
        self._loaded, self._batcher = loaded, batcher
        self._prompts = Prompts(loaded.tokenizer, self._spec.chat_template)
        if not self._prompts.can_chat:
            self.capabilities -= {"endpoint:chat"}
        self.context_length = min(loaded.plan.context_length, room)
        await self._warm_up(batcher)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Yield the answer. Closing the iterator aborts. See `Engine.generate` for what it raises."""
        loaded, prompts, batcher = self._loaded, self._prompts, self._batcher
        if loaded is None or prompts is None or batcher is None:
            raise EngineError("The engine is not loaded.")
        sampling = request.sampling
        choice = check_sampling(sampling, least_tokens=1 if request.prompt is None else 0)
        if request.prompt is None:
            prompt = await prompts.encode(request.messages, template=request.template)
        else:
            prompt = await prompts.encode_text(request.prompt)
            # The largest id that has a row of weights; beyond it the batching thread would end.
            check_token_ids(prompt, loaded.model.get_input_embeddings().num_embeddings)
        left = self.context_length - len(prompt)
        if left < 1:
            raise too_long(self.context_length, len(prompt), request)
        nothing_wanted = sampling.max_tokens == 0
        if request.echo or nothing_wanted:
            given = request.prompt if isinstance(request.prompt, str) else prompts.text_of(prompt)
            yield Delta(
                text=given if request.echo else "",
                prompt_tokens=len(prompt),
                completion_tokens=0,
                finish_reason="length" if nothing_wanted else None,
            )
            if nothing_wanted:
                return
        ticket = batcher.submit(
            prompt,
            max_tokens=left if sampling.max_tokens is None else min(sampling.max_tokens, left),
            eos=frozenset() if sampling.ignore_eos else loaded.eos,
            choice=choice,
        )
        answer = _Answer(loaded, sampling, prompt_tokens=len(prompt))
        try:
            while True:
                tokens, last = await ticket.next()
                for at, token in enumerate(tokens, start=1):
                    delta = answer.take(token, last=last and at == len(tokens))
                    if delta is None:
                        continue
                    if delta.finish_reason is not None:
                        # Before the last words are sent: a stop string ends the work at once.
                        batcher.cancel(ticket)
                        yield delta
                        return
                    yield delta
                if last:
                    raise EngineError("The engine ended an answer without a reason.")
        finally:
            batcher.cancel(ticket)

    async def tokenize(
        self,
        prompt: str | list[dict[str, Any]],
        *,
        special_tokens: bool,
        template: Template = PLAIN,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[tuple[int, str]]:
        """See `Engine.tokenize`. `special_tokens` is about texts: a template writes its own."""
        if self._prompts is None:
            raise EngineError("The engine is not loaded.")
        if isinstance(prompt, str):
            tokens = await self._prompts.encode_text(prompt, special_tokens=special_tokens, empty=True)
        else:
            tokens = await self._prompts.encode(prompt, template=template, tools=tools)
        return list(zip(tokens, self._prompts.spelled(tokens), strict=True))

    async def detokenize(self, tokens: list[int]) -> str:
        """See `Engine.detokenize`. Special tokens are spelled out."""
        if self._prompts is None or self._loaded is None:
            raise EngineError("The engine is not loaded.")
        size = self._loaded.model.get_input_embeddings().num_embeddings
        check_token_ids(tokens, size, param="tokens")
        return self._prompts.text_of(tokens, special_tokens=True)

    def load_report(self) -> Load:
        """See `Engine.load_report`. Costs microseconds."""
        return Load() if self._batcher is None else self._batcher.report()

    def healthy(self) -> bool:
        """False once the batching thread has ended. Before `load` there is nothing to be ill."""
        return self._batcher is None or self._batcher.alive()

    async def close(self) -> None:
        """End the batching thread, open answers with it. May be called twice."""
        batcher, self._batcher = self._batcher, None
        if self._prompts is not None:
            self._prompts.close()
        if batcher is not None:
            await asyncio.to_thread(batcher.stop, STOP_SECONDS)
            batcher.ended()

    async def _warm_up(self, batcher: Batcher) -> None:
        """Answer one tiny prompt: the first step is the slow one, and a model that cannot is not ready."""
        ticket = batcher.submit([0] * 8, max_tokens=WARM_UP_TOKENS, eos=frozenset(), choice=GREEDY)
        try:
            while not (await ticket.next())[1]:
                pass
        except EngineError as error:
            raise LoadError(
                Cause.CRASHED, "The model failed at its first tokens; the log says why."
            ) from error


class _Answer:
    """The tokens of one request on their way to deltas."""

    def __init__(self, loaded: Loaded, sampling: Sampling, *, prompt_tokens: int) -> None:
        backend = loaded.tokenizer.backend_tokenizer
        self._text = Detokenizer(lambda ids: backend.decode(ids, skip_special_tokens=True))
        self._stops = StopStrings(sampling.stop)
        self._eos = frozenset() if sampling.ignore_eos else loaded.eos
        self._prompt_tokens = prompt_tokens
        self._tokens = 0

    def take(self, token: int, *, last: bool) -> Delta | None:
        """The delta this token makes; None while its text is kept back."""
        self._tokens += 1
        text = self._stops.feed(self._text.push(token))
        if last:
            text += self._stops.feed(self._text.flush()) + self._stops.flush()
        if self._stops.met is not None:
            reason = "stop"
        elif last:
            reason = "stop" if token in self._eos else "length"
        else:
            reason = None
        if not text and reason is None:
            return None
        return Delta(
            text=text,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._tokens,
            finish_reason=reason,
            stop=self._stops.met,
        )


def check_sampling(sampling: Sampling, *, least_tokens: int = 1) -> Choice:
    """Check every value once more, whoever calls: the batching thread must never see a bad one."""
    most = sampling.max_tokens
    if most is not None and (not _is_int(most) or most < least_tokens):
        raise BadRequest(f"max_tokens must be at least {least_tokens}.", param="max_tokens")
    temperature = _number(sampling.temperature, "temperature", most=math.inf)
    top_p = _number(sampling.top_p, "top_p", most=1.0)
    if not _is_int(sampling.top_k) or not 0 <= sampling.top_k < 2**31:
        raise BadRequest("top_k must be a whole number of at least 0 (0 is off).", param="top_k")
    if any(not isinstance(stop, str) or not stop for stop in sampling.stop):
        raise BadRequest("stop must be strings that are not empty.", param="stop")
    if temperature > 0:
        temperature = min(max(temperature, LEAST_TEMPERATURE), MOST_TEMPERATURE)
    return Choice(temperature=temperature, top_p=top_p, top_k=sampling.top_k)


def _number(value: float, name: str, *, most: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadRequest(f"{name} must be a finite number.", param=name)
    if not 0 <= value <= most:
        upto = "at least 0" if math.isinf(most) else f"between 0 and {most:g}"
        raise BadRequest(f"{name} must be {upto}.", param=name)
    return float(value)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _as_load_error(error: BaseException) -> LoadError:
    if isinstance(error, LoadError):
        return error
    logger.error("The model cannot be prepared: %s: %s", type(error).__name__, error)
    if is_out_of_memory(error):
        return out_of_memory("allocating the KV cache")
    return LoadError(
        Cause.CRASHED, f"The model cannot be prepared ({type(error).__name__}); the log says why."
    )


def _settle(
    future: asyncio.Future[tuple[Loaded, Batcher, int]], outcome: tuple[Loaded, Batcher, int] | LoadError
) -> None:
    if future.done():
        return
    if isinstance(outcome, LoadError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
