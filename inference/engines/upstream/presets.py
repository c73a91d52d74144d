"""What each kind of server understands, as data, with a note for whoever sets one up.

A preset errs on the careful side: a field that it does not list is refused at the gateway by name, which is
better than a server that ignores it. `capabilities` of a deployment replaces the list where the server at
hand can do more, or less.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from inference.engines.vllm.arguments import Arguments as VllmArguments
from inference.engines.vllm.capabilities import capabilities as vllm_capabilities

Usage = Literal["every", "last", "none"]
"""Which `stream_options` it understands: usage in every chunk, in the last one, or none; it may tell its
usage all the same."""

_CHAT = frozenset({"endpoint:chat"})
_TEXT = frozenset({"endpoint:chat", "endpoint:completions"})
_PLAIN = frozenset({"temperature", "top_p", "stop"})
_PENALTIES = frozenset({"frequency_penalty", "presence_penalty"})
_LOGPROBS = frozenset({"logprobs", "top_logprobs"})
_TOOLS = frozenset({"tools", "tool_choice", "parallel_tool_calls"})
_FORM = frozenset({"response_format"})
_OPENAI = _PLAIN | _PENALTIES | _LOGPROBS | _TOOLS | _FORM | {"seed", "n", "logit_bias"}
_SAMPLERS = frozenset({"top_k", "min_p", "repetition_penalty"})
_VLLM = vllm_capabilities(VllmArguments(tool_call_parser="any", reasoning_parser="any"), chat=True)

KNOWN = (
    _VLLM
    | _OPENAI
    | {"endpoint:embeddings", "endpoint:rerank", "endpoint:score", "dimensions", "normalize"}
    | {"suffix", "verbosity", "max_tokens_per_doc", "instruction", "use_beam_search", "length_penalty"}
)
"""What a deployment may list as its capabilities."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    title: str
    url: str
    """What its URL looks like, with its usual port."""
    note: str
    """What an operator should know."""
    capabilities: frozenset[str]
    usage: Usage = "last"
    health: str | None = None
    """A path, beside its /v1, that answers 200 while it is well; None: its list of models does."""
    lists_models: bool = True
    """It answers GET /models to this key."""
    lists_all: bool = True
    """What it does not list it does not serve. Else names have other forms, or are loaded when asked for."""
    context_at: tuple[str, tuple[str, ...]] | None = None
    """A path beside its /v1, and the keys that lead to its context length there."""
    renamed: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    """Fields that it knows under another name."""
    strict_tools: bool = False
    """It holds calls to the schemas of those tools only that say `strict`."""
    poll_seconds: float = 5.0


_COMMERCIAL = 60.0
"""Providers count what they are asked."""

PRESETS: Mapping[str, Preset] = MappingProxyType(
    {
        "openai-compatible": Preset(
            title="Any server that speaks the OpenAI API",
            url="http://HOST:PORT/v1",
            note="Only what nearly every server understands. If the server can do more, list it as "
            "`capabilities`; if it refuses `stream_options`, choose the preset `openai-plain`.",
            capabilities=_TEXT | _PLAIN | _PENALTIES | {"seed"},
            lists_all=False,
        ),
        "openai-plain": Preset(
            title="A server that knows no stream_options",
            url="http://HOST:PORT/v1",
            note="Without usage from the server tokens are estimated: one per piece of a stream, or one per "
            "four bytes, whichever is more.",
            capabilities=_TEXT | _PLAIN,
            usage="none",
            lists_all=False,
        ),
        "vllm": Preset(
            title="vLLM's own server",
            url="http://HOST:8000/v1",
            note="`--api-key` of the server is the key. Tools need its `--enable-auto-tool-choice "
            "--tool-call-parser …`. For embeddings set `capabilities` to endpoint:embeddings.",
            capabilities=_VLLM,
            usage="every",
            health="/health",
            strict_tools=True,
        ),
        "sglang": Preset(
            title="SGLang",
            url="http://HOST:30000/v1",
            note="`--api-key` of the server is the key. Tools need its `--tool-call-parser`.",
            capabilities=_TEXT
            | _OPENAI
            | _SAMPLERS
            | {"stop_token_ids", "ignore_eos", "min_tokens", "skip_special_tokens", "continue_final_message"},
            health="/health",
        ),
        "tgi": Preset(
            title="Text Generation Inference (Hugging Face)",
            url="http://HOST:3000/v1",
            note="Serves one model under any name; `n` and `top_k` are not honoured by its chat endpoint.",
            capabilities=(_TEXT | _OPENAI) - {"n", "logit_bias", "parallel_tool_calls"},
            health="/health",
            lists_all=False,
            context_at=("/info", ("max_total_tokens",)),
        ),
        "llama.cpp": Preset(
            title="llama.cpp's llama-server",
            url="http://HOST:8080/v1",
            note="`--api-key` of the server is the key; tools need its `--jinja`. Its `-c` is shared by all "
            "of its `-np` slots: set the deployment's slots to `-np`. Serves one model under any name.",
            capabilities=_TEXT
            | _PLAIN
            | _PENALTIES
            | _SAMPLERS
            | _TOOLS
            | _LOGPROBS
            | _FORM
            | {"seed", "logit_bias", "ignore_eos"},
            health="/health",
            lists_all=False,
            context_at=("/props", ("default_generation_settings", "n_ctx")),
            renamed=MappingProxyType({"repetition_penalty": "repeat_penalty"}),
        ),
        "ollama": Preset(
            title="Ollama",
            url="http://HOST:11434/v1",
            note="Needs no key. `model` is required where several are pulled, with its tag (`llama3.2:3b`). "
            "Its context is small unless OLLAMA_CONTEXT_LENGTH says otherwise: set `context_length` to the "
            "same. It cuts prompts that are too long without a word.",
            capabilities=_TEXT | _PLAIN | _PENALTIES | _LOGPROBS | _FORM | {"seed", "tools"},
            lists_all=False,
        ),
        "tensorrt-llm": Preset(
            title="TensorRT-LLM (trtllm-serve)",
            url="http://HOST:8000/v1",
            note="Does not tell its context length: set `context_length` to its `--max_seq_len`.",
            capabilities=_TEXT | _OPENAI | _SAMPLERS | {"stop_token_ids", "ignore_eos", "min_tokens"},
            health="/health",
        ),
        "xinference": Preset(
            title="Xinference",
            url="http://HOST:9997/v1",
            note="`model` is the uid of a launched model. Which fields hold depends on the engine behind it.",
            capabilities=_TEXT | _PLAIN | _PENALTIES | _SAMPLERS | {"seed", "tools", "tool_choice"} | _FORM,
        ),
        "openllm": Preset(
            title="OpenLLM (BentoML)",
            url="http://HOST:3000/v1",
            note="A vLLM behind BentoML's server, of whatever version it pins.",
            capabilities=_TEXT | _OPENAI | _SAMPLERS,
            health="/readyz",
        ),
        "lmdeploy": Preset(
            title="LMDeploy (api_server)",
            url="http://HOST:23333/v1",
            note="`--api-keys` of the server are the keys. Does not tell its context length: set "
            "`context_length` to its `--session-len`. `n` above 1 is not honoured.",
            capabilities=_TEXT
            | _PLAIN
            | _LOGPROBS
            | _TOOLS
            | _FORM
            | {"top_k", "min_p", "repetition_penalty", "seed", "ignore_eos"},
            health="/health",
        ),
        "deepspeed-mii": Preset(
            title="DeepSpeed-MII (its OpenAI server)",
            url="http://HOST:8000/v1",
            note="Knows no stream_options and tells no usage in streams, so tokens of streams are estimated.",
            capabilities=_TEXT | _PLAIN,
            usage="none",
            lists_all=False,
        ),
        "ray-serve-llm": Preset(
            title="Ray Serve LLM",
            url="http://HOST:8000/v1",
            note="`model` is a `model_id` of its `llm_configs`. vLLM runs behind it.",
            capabilities=_TEXT | _OPENAI | _SAMPLERS | {"stop_token_ids", "ignore_eos", "min_tokens"},
        ),
        "fastchat": Preset(
            title="FastChat (openai_api_server)",
            url="http://HOST:8000/v1",
            note="`--api-keys` of the server are the keys. Knows no stream_options and tells no usage in "
            "chat streams, so tokens of those are estimated. Roundhouse can replace it.",
            capabilities=_TEXT | _PLAIN | {"top_k", "n", "presence_penalty", "frequency_penalty"},
            usage="none",
        ),
        "transformers-serve": Preset(
            title="`transformers serve` (Hugging Face)",
            url="http://HOST:8000/v1",
            note="`model` is required: a hub id, or the folder it was started with, whose path must hold no "
            "@. It knows few fields, and takes `frequency_penalty` for another one: that is not passed on. "
            "One request at a time unless started with `--continuous-batching`.",
            capabilities=_TEXT | _PLAIN | {"seed", "tools"},
            usage="none",
            health="/health",
            # What it lists is the hub's cache of its machine, and without one it answers 500.
            lists_models=False,
        ),
        "openai": Preset(
            title="OpenAI",
            url="https://api.openai.com/v1",
            note="`model` is required. Reasoning models refuse temperature, top_p, stop and penalties: give "
            "those deployments a shorter list of `capabilities`. The context length is not told. The new "
            "API of Azure OpenAI (…/openai/v1) is the same, with the name of the deployment as `model`.",
            capabilities=_CHAT | _OPENAI | {"reasoning_effort", "verbosity"},
            lists_all=False,
            renamed=MappingProxyType({"max_tokens": "max_completion_tokens"}),
            poll_seconds=_COMMERCIAL,
        ),
        "anthropic": Preset(
            title="Anthropic, by its OpenAI-compatible endpoint",
            url="https://api.anthropic.com/v1",
            note="`model` is required, and `context_length` is not told. Caching of prompts, documents and "
            "thoughts are not reached this way. The key is checked by the first request, not before.",
            capabilities=_CHAT | _PLAIN | _TOOLS,
            lists_models=False,
            poll_seconds=_COMMERCIAL,
        ),
        "openrouter": Preset(
            title="OpenRouter",
            url="https://openrouter.ai/api/v1",
            note="`model` is required, such as `mistralai/mistral-nemo`. Which fields hold depends on who "
            "serves it there. Its list of models is public: the key is checked by the first request.",
            capabilities=_CHAT | _OPENAI | _SAMPLERS | {"reasoning_effort"},
            lists_all=False,
            poll_seconds=_COMMERCIAL,
        ),
        "together": Preset(
            title="Together AI",
            url="https://api.together.xyz/v1",
            note="`model` is required.",
            capabilities=(_TEXT | _OPENAI | _SAMPLERS) - _LOGPROBS,
            lists_all=False,
            poll_seconds=_COMMERCIAL,
        ),
        "groq": Preset(
            title="Groq",
            url="https://api.groq.com/openai/v1",
            note="`model` is required; `n`, logit_bias and logprobs are refused there.",
            capabilities=_CHAT | _PLAIN | _PENALTIES | _TOOLS | _FORM | {"seed", "reasoning_effort"},
            lists_all=False,
            poll_seconds=_COMMERCIAL,
        ),
        "mistral": Preset(
            title="Mistral AI",
            url="https://api.mistral.ai/v1",
            note="`model` is required. It refuses fields that it does not know, stream_options among them, "
            "and tells usage without being asked.",
            capabilities=_CHAT | _PLAIN | _PENALTIES | _TOOLS | _FORM | {"n", "seed"},
            usage="none",
            lists_all=False,
            renamed=MappingProxyType({"seed": "random_seed"}),
            poll_seconds=_COMMERCIAL,
        ),
        "deepseek": Preset(
            title="DeepSeek",
            url="https://api.deepseek.com/v1",
            note="`model` is required, and `context_length` is not told.",
            capabilities=_CHAT | _PLAIN | _PENALTIES | _LOGPROBS | {"tools", "tool_choice"} | _FORM,
            poll_seconds=_COMMERCIAL,
        ),
        "gemini": Preset(
            title="Google Gemini, by its OpenAI-compatible endpoint",
            url="https://generativelanguage.googleapis.com/v1beta/openai",
            note="`model` is required, and `context_length` is not told.",
            capabilities=_CHAT | _PLAIN | {"tools", "tool_choice", "n", "reasoning_effort"} | _FORM,
            lists_all=False,
            poll_seconds=_COMMERCIAL,
        ),
    }
)
