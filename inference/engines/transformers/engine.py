"""The `transformers` engine: one request from messages to deltas."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from inference.engines.base import (
    PLAIN,
    Delta,
    Detail,
    EngineError,
    EngineSpec,
    GenerationRequest,
    LoadError,
    Template,
    Token,
    check_token_ids,
    too_long,
)
from inference.engines.chat import unsupported
from inference.engines.tool_forms import HERMES, Form
from inference.engines.transformers.answer import Answer, echoed, prompt_logprobs, wants_tokens
from inference.engines.transformers.arguments import read_arguments
from inference.engines.transformers.batcher import Batcher, call_in_loop
from inference.engines.transformers.choices import Choices
from inference.engines.transformers.forms import Forms
from inference.engines.transformers.likely import Likely
from inference.engines.transformers.loading import Loaded, is_out_of_memory, load, out_of_memory
from inference.engines.transformers.prompt import Prompts
from inference.engines.transformers.sampling import GREEDY
from inference.engines.transformers.scoring import Scoring
from inference.engines.transformers.static import StaticBatcher
from inference.engines.transformers.text import Vocabulary
from inference.protocol import Cause, Load, Progress

logger = logging.getLogger("roundhouse.engine")

AnyBatcher = Batcher | StaticBatcher
_Prepared = tuple[Loaded, Forms, AnyBatcher, int]

_CAPABILITIES = frozenset(
    {
        "temperature",
        "top_p",
        "top_k",
        "min_p",
        "presence_penalty",
        "frequency_penalty",
        "repetition_penalty",
        "logit_bias",
        "seed",
        "stop",
        "include_stop_str_in_output",
        "stop_token_ids",
        "ignore_eos",
        "min_tokens",
        "bad_words",
        "allowed_token_ids",
        "n",
        "echo",
        "prompt_logprobs",
        "logprobs",
        "top_logprobs",
        "return_token_ids",
        "continue_token_ids",
        "add_generation_prompt",
        "continue_final_message",
        "chat_template_kwargs",
        "endpoint:chat",
        "endpoint:completions",
        "endpoint:tokenize",
    }
)
_PAGED_ONLY = frozenset({"echo", "prompt_logprobs"})
"""What a static batch cannot do: a prompt's own tokens have no scores there."""
_DECODER_ONLY = frozenset({"add_generation_prompt", "continue_final_message", "continue_token_ids"})
"""What needs a prompt that the answer continues."""
STOP_SECONDS = 4.0
WARM_UP_TOKENS = 2


class TransformersEngine:
    """Serves one model folder by Hugging Face transformers. See `inference.engines.base.Engine`.

    Creating it checks the arguments (LoadError) and reads nothing.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.capabilities = _CAPABILITIES
        self.tool_form: Form = HERMES
        self.context_length = 0
        self._spec = spec
        self._arguments = read_arguments(spec.arguments)
        if spec.slots < 1:
            raise LoadError(Cause.BAD_ARGUMENT, "'slots' must be at least 1.")
        self._serving: _Serving | None = None

    async def load(self, progress: Callable[[Progress], None]) -> None:
        """Get ready to generate, reporting progress. Raises LoadError."""
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[_Prepared] = loop.create_future()

        tell = partial(call_in_loop, loop)

        def report(step: Progress) -> None:
            tell(progress, step)

        def run() -> None:
            # A daemon thread, and so is the batching thread that it starts: a process that has to
            # end is not held up by a long step. It stays to tell us when the batching thread ends.
            try:
                loaded = load(self._spec, self._arguments, report)
                report(Progress(step="warming up"))
                forms = self._forms_of(loaded)
                batcher = (Batcher if loaded.paged else StaticBatcher)(loaded, self._spec.slots, loop)
                room = batcher.prepare()
            except BaseException as error:
                tell(_settle, ready, _as_load_error(error))
                return
            tell(_settle, ready, (loaded, forms, batcher, room))
            if batcher.thread is not None:
                batcher.thread.join()
            tell(batcher.ended)

        threading.Thread(target=run, name="engine", daemon=True).start()
        loaded, forms, batcher, room = await ready
        self._serving = serving = _Serving(loaded, forms, batcher, self._spec.chat_template)
        self.capabilities |= forms.capabilities
        if not loaded.paged:
            self.capabilities -= _PAGED_ONLY
        if loaded.model.config.is_encoder_decoder:
            self.capabilities -= _DECODER_ONLY
        self.tool_form = forms.tool_form
        if not serving.prompts.can_chat:
            self.capabilities -= {"endpoint:chat"}
        self.context_length = min(loaded.plan.context_length, room)
        await self._warm_up(batcher)

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[Delta, None]:
        """Yield the answer. Closing the iterator aborts. See `Engine.generate` for what it raises."""
        serving, sampling = self._ready(), request.sampling
        if request.echo and "echo" not in self.capabilities:
            raise unsupported("echo")
        choice = serving.choices.of(
            sampling,
            sample=request.sample,
            top_logprobs=request.top_logprobs,
            least_tokens=1 if request.prompt is None else 0,
        )
        if request.prompt is None:
            prompt = await serving.prompts.encode(
                request.messages,
                template=serving.forms.template_of(request),
                tools=None if request.tools is None else request.tools.functions,
            )
        else:
            prompt = await serving.prompts.encode_text(request.prompt)
            # Beyond them the batching thread would end.
            check_token_ids(prompt, serving.readable)
        begun = list(request.begun)
        check_token_ids(begun, serving.readable, param="continue_token_ids")
        left = self.context_length - len(prompt)
        if left < 1:
            raise too_long(self.context_length, len(prompt), request)
        if request.echo or sampling.max_tokens == 0 or request.prompt_logprobs is not None:
            yield await serving.prompt_of(request, prompt)
            if sampling.max_tokens == 0:
                return
        grammar = await serving.forms.grammar_of(request, prompt)
        if grammar is not None:  # when its form is whole, the answer ends
            choice = replace(choice, grammar=grammar, ends=tuple({*choice.ends, *serving.forms.eos}))
        ends = frozenset(choice.ends)
        answer = Answer(
            request,
            serving.vocabulary,
            ends,
            prompt=prompt,
            thoughts=serving.forms.thoughts_of(request, prompt),
            shown=serving.forms.shown(request),
        )
        most = left if sampling.max_tokens is None else min(sampling.max_tokens, left)
        if begun:
            whole = answer.resume(begun, most=most)
            if whole is not None:
                yield whole
                return
        ticket = serving.batcher.submit(
            prompt + begun, max_tokens=most - len(begun), eos=ends, choice=replace(choice, begun=len(begun))
        )
        likely = iter(ticket.told)  # as long as the tokens are, or nothing at all
        try:
            while True:
                tokens, last = await ticket.next()
                for at, token in enumerate(tokens, start=1):
                    delta = answer.take(token, last=last and at == len(tokens), likely=next(likely, None))
                    if delta is None:
                        continue
                    if delta.finish_reason is not None:
                        # Before the last words are sent: a stop string ends the work at once.
                        serving.batcher.cancel(ticket)
                        yield delta
                        return
                    yield delta
                if last:
                    raise EngineError("The engine ended an answer without a reason.")
        finally:
            serving.batcher.cancel(ticket)

    async def tokenize(
        self,
        prompt: str | list[dict[str, Any]],
        *,
        special_tokens: bool,
        template: Template = PLAIN,
        tools: list[dict[str, Any]] | None = None,
    ) -> list[tuple[int, str]]:
        """See `Engine.tokenize`. `special_tokens` is about texts: a template writes its own."""
        prompts = self._ready().prompts
        if isinstance(prompt, str):
            tokens = await prompts.encode_text(prompt, special_tokens=special_tokens, empty=True)
        else:
            tokens = await prompts.encode(prompt, template=template, tools=tools)
        return list(zip(tokens, prompts.spelled(tokens), strict=True))

    async def detokenize(self, tokens: list[int]) -> str:
        """See `Engine.detokenize`. Special tokens are spelled out."""
        serving = self._ready()
        check_token_ids(tokens, serving.readable, param="tokens")
        return serving.prompts.text_of(tokens, special_tokens=True)

    def load_report(self) -> Load:
        """See `Engine.load_report`. Costs microseconds."""
        return Load() if self._serving is None else self._serving.batcher.report()

    def healthy(self) -> bool:
        """False once the batching thread has ended. Before `load` there is nothing to be ill."""
        return self._serving is None or self._serving.batcher.alive()

    async def close(self) -> None:
        """End the batching thread, open answers with it. May be called twice."""
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.prompts.close()
            serving.scoring.close()
            await serving.forms.close()
            await asyncio.to_thread(serving.batcher.stop, STOP_SECONDS)
            serving.batcher.ended()

    def _forms_of(self, loaded: Loaded) -> Forms:
        template = self._spec.chat_template or loaded.tokenizer.chat_template or ""
        return Forms(
            loaded.tokenizer,
            template if isinstance(template, str) else "\n".join(template.values()),
            size=_scored(loaded.model),
            eos=loaded.eos,
            tool_form=self._arguments.tool_call_parser,
        )

    def _ready(self) -> _Serving:
        if self._serving is None:
            raise EngineError("The engine is not loaded.")
        return self._serving

    async def _warm_up(self, batcher: AnyBatcher) -> None:
        """Answer one tiny prompt: the first step is the slow one, and a model that cannot is not ready."""
        ticket = batcher.submit([0] * 8, max_tokens=WARM_UP_TOKENS, eos=frozenset(), choice=GREEDY)
        try:
            while not (await ticket.next())[1]:
                pass
        except EngineError as error:
            raise LoadError(
                Cause.CRASHED, "The model failed at its first tokens; the log says why."
            ) from error


class _Serving:
    """What there is once a model is loaded."""

    def __init__(self, loaded: Loaded, forms: Forms, batcher: AnyBatcher, chat_template: str | None) -> None:
        tokenizer, model = loaded.tokenizer, loaded.model
        backend = tokenizer.backend_tokenizer
        self.forms = forms
        self.batcher = batcher
        self.prompts = Prompts(tokenizer, chat_template)
        self.scoring = Scoring(model, batcher.pause)
        self.vocabulary = Vocabulary(tokenizer)
        self.readable: int = model.get_input_embeddings().num_embeddings
        """The model can read ids below: it has a row of weights for each."""
        self.choices = Choices(
            size=_scored(model),
            eos=loaded.eos,
            encode=lambda text: list(backend.encode(text, add_special_tokens=False).ids),
        )

    async def prompt_of(self, request: GenerationRequest, prompt: list[int]) -> Delta:
        """The delta that comes before the first token, when the request asks for one."""
        given, detail = "", None
        if request.echo:
            given = request.prompt if isinstance(request.prompt, str) else self.prompts.text_of(prompt)
        if wants_tokens(request):
            tokens: tuple[Token, ...] = ()
            if request.echo:
                likely: list[Likely | None] = [None] * len(prompt)
                if request.top_logprobs is not None:
                    likely = await self.scoring.likely(prompt, request.top_logprobs)
                tokens = echoed(prompt, given, likely, self.vocabulary)
            detail = Detail(tokens=tokens, prompt_token_ids=tuple(prompt) if request.token_ids else None)
        if request.prompt_logprobs is not None:
            scored = await self.scoring.likely(prompt, request.prompt_logprobs)
            detail = replace(
                detail or Detail(), prompt_logprobs=prompt_logprobs(prompt, scored, self.vocabulary)
            )
        return Delta(
            text=given,
            prompt_tokens=len(prompt),
            completion_tokens=0,
            finish_reason="length" if request.sampling.max_tokens == 0 else None,
            detail=detail,
        )


def _scored(model: Any) -> int:
    """The model scores tokens with ids below."""
    readable: int = model.get_input_embeddings().num_embeddings
    scored = model.get_output_embeddings()
    return readable if scored is None else min(readable, scored.out_features)


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
    future: asyncio.Future[_Prepared],
    outcome: _Prepared | LoadError,
) -> None:
    if future.done():
        return
    if isinstance(outcome, LoadError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)
