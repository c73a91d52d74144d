"""From a model folder to a model in memory. Every refusal is a LoadError with its cause."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from inference.engines.base import EngineSpec, LoadError
from inference.engines.memory import cache_per_token, estimate
from inference.engines.transformers import placing
from inference.engines.transformers.arguments import Arguments
from inference.protocol import Cause, Progress
from inference.sources.check import CODE_FORMATS, read_object, refuse_code
from inference.sources.headers import read_safetensors
from inference.sources.source import SourceError

logger = logging.getLogger("roundhouse.engine")

GIB = 1024**3
CPU_KV_CACHE_BYTES = GIB
CPU_BATCH_TOKENS = 256
"""Others wait while a piece of a prompt is read: for a small model well below a second at this size."""
ACCELERATOR_BATCH_TOKENS = 2048
CPU_PAGE = 64
"""Tokens per page of the KV cache: the least a request takes, and what equal prompts can share."""
ACCELERATOR_PAGE = 256
"""What paged attention kernels want."""
MASK_BYTES = GIB // 4
"""Bound of the attention mask, which is max_batch_tokens wide and as long as the whole cache."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachePlan:
    """How the KV cache is cut."""

    page: int
    blocks: int | None
    """None: as many as the accelerator's free memory holds."""
    batch_tokens: int
    context_length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    model: Any
    tokenizer: Any
    plan: CachePlan
    eos: frozenset[int]
    paged: bool
    """Continuous batching can run it."""


def load(spec: EngineSpec, arguments: Arguments, progress: Callable[[Progress], None]) -> Loaded:
    """Read `spec.model_path`. Blocks for seconds; raises LoadError."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    folder = spec.model_path
    if folder is None:
        raise LoadError(Cause.MISSING_FILE, "The transformers engine needs a model folder.")
    size = check_folder(folder)
    device = choose_device(arguments.device)
    dtype = _dtype(arguments.dtype, device)
    progress(Progress(step="loading weights", done=0, total=size))
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise refusal(error, folder, "The model's tokenizer is missing or damaged.") from error
    model = _read(folder, arguments, device, dtype)
    placing.check_places(placing.places(model), arguments)
    placing.settle(model)
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise LoadError(Cause.MISSING_FILE, "The model has no tokenizer.json.")
    progress(Progress(step="loading weights", done=size, total=size))
    plan = plan_cache(model.config.get_text_config(decoder=True), dtype, device, spec.slots, arguments)
    _tell_memory(folder, model, plan, arguments, device, dtype)
    return Loaded(
        model=model.eval(), tokenizer=tokenizer, plan=plan, eos=_eos(model, tokenizer), paged=_is_paged(model)
    )


def _read(folder: Path, arguments: Arguments, device: torch.device, dtype: torch.dtype) -> Any:
    otherwise = "The model's files cannot be understood."
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise refusal(error, folder, otherwise) from error
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    places = placing.options(config, arguments, device, dtype)
    try:
        model, info = kind.from_pretrained(
            folder,
            dtype=dtype,
            local_files_only=True,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **places,
        )
    except Exception as error:
        raise placing.cannot_read(config, error, device) or refusal(error, folder, otherwise) from error
    if info["missing_keys"]:
        # transformers fills what is missing with random numbers and goes on.
        raise LoadError(
            Cause.MISSING_FILE,
            f"The weights are not complete: {len(info['missing_keys'])} tensors are missing.",
        )
    return model


def _is_paged(model: Any) -> bool:
    """Whether continuous batching can run the model: one device, and attention of the kinds that it pages."""
    config = model.config.get_text_config(decoder=True)
    return (
        not model.config.is_encoder_decoder
        and not placing.is_split(model)
        and model._supports_attention_backend
        and not model._is_stateful
        and not getattr(config, "kv_lora_rank", None)
        and set(getattr(config, "layer_types", None) or ()) <= {"full_attention", "sliding_attention"}
    )


def _tell_memory(
    folder: Path,
    model: Any,
    plan: CachePlan,
    arguments: Arguments,
    device: torch.device,
    dtype: torch.dtype,
) -> None:
    placed = placing.places(model)
    try:
        expected = estimate(
            folder,
            dtype=str(dtype).removeprefix("torch."),
            quantization=arguments.quantization,
            tokens=(plan.blocks or 0) * plan.page,
            device=device.type,
        )
    except SourceError as error:  # what was loaded is loaded: this is for people
        logger.warning("What memory the model takes cannot be said: %s", error.detail)
        return
    logger.info(
        "event=memory weights=%d (%s; estimated %d) cache=%s cache_per_token=%d overhead=%d",
        sum(placed.values()),
        placing.shown(placed),
        expected.weights,
        expected.cache or "what is free",
        expected.cache_per_token,
        expected.overhead,
    )


def plan_cache(
    config: Any, dtype: torch.dtype, device: torch.device, slots: int, arguments: Arguments
) -> CachePlan:
    """Give every slot its whole context if memory allows, and one request always its whole context.

    A request that outgrows the whole cache would end the batching thread, so where memory is short
    the context is lowered to what fits (or the arguments are refused when they demand both).
    """
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if arguments.context_length is not None:
        context = min(context or arguments.context_length, arguments.context_length)
    if context is None:
        raise LoadError(
            Cause.BAD_ARGUMENT,
            "The model does not say its context length: give the argument 'context_length'.",
        )
    on_cpu = device.type == "cpu"
    page = CPU_PAGE if on_cpu else ACCELERATOR_PAGE
    batch = arguments.max_batch_tokens or (CPU_BATCH_TOKENS if on_cpu else ACCELERATOR_BATCH_TOKENS)
    batch = max(batch, slots)
    if arguments.kv_cache_bytes is None and not on_cpu:
        return CachePlan(page=page, blocks=None, batch_tokens=batch, context_length=context)

    budget = arguments.kv_cache_bytes or CPU_KV_CACHE_BYTES
    per_token = max(1, cache_per_token(config.to_dict(), dtype.itemsize))
    fitting = budget // per_token // page * page
    if fitting < context:
        if arguments.context_length is None and fitting >= page:
            logger.warning(
                "Context lowered from %d to %d tokens: 'kv_cache_bytes' holds no more.", context, fitting
            )
            context = fitting
        elif arguments.kv_cache_bytes is None:
            fitting = context
        else:
            raise LoadError(
                Cause.BAD_ARGUMENT,
                f"Argument 'kv_cache_bytes' holds {fitting} tokens, less than the context of {context}.",
            )
    blocks = min(ceil(fitting / page), slots * ceil(context / page))
    if arguments.max_batch_tokens is None:
        mask_row = (blocks * page + batch) * dtype.itemsize
        batch = max(min(batch, MASK_BYTES // mask_row), slots, 16)
    return CachePlan(
        page=page, blocks=max(blocks, ceil(context / page)), batch_tokens=batch, context_length=context
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on a device or in the machine."""
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError)
        and any(
            words in str(error) for words in ("can't allocate memory", "not enough memory", "out of memory")
        )
    )


def out_of_memory(what: str) -> LoadError:
    return LoadError(
        Cause.OUT_OF_MEMORY,
        f"Memory ran out while {what}. Lower 'kv_cache_bytes', 'context_length' or 'max_batch_tokens', "
        "or serve a smaller model.",
    )


def check_folder(folder: Path) -> int:
    """Bytes of the weights. Only safetensors count, whose headers must be true: pickles can carry code, and
    what reads the weights trusts their headers. The model may not name code either: a second wall behind
    preparation's, before transformers looks at it."""
    if not folder.is_dir():
        raise LoadError(Cause.MISSING_FILE, "The model's folder is missing.")
    if not (folder / "config.json").is_file():
        raise LoadError(Cause.MISSING_FILE, "The model's folder has no config.json.")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        found = {path.suffix.lower() for path in folder.iterdir()} & CODE_FORMATS
        if found:
            raise LoadError(
                Cause.UNSAFE_FORMAT,
                f"The model's weights are in a format that can carry code ({', '.join(sorted(found))}). "
                "Convert them to safetensors.",
            )
        raise LoadError(Cause.MISSING_FILE, "The model's folder has no safetensors weights.")
    try:
        read_object(folder / "config.json")
        refuse_code(folder, [path.name for path in folder.iterdir() if path.is_file()])
        for path in weights:
            read_safetensors(path)
    except SourceError as error:
        raise LoadError(error.cause, error.detail) from None
    return sum(path.stat().st_size for path in weights)


def refusal(error: Exception, folder: Path, otherwise: str) -> LoadError:
    """What went wrong, in a sentence without paths; `otherwise` when it is nothing we know."""
    text = str(error).replace(str(folder), "<model>")
    logger.error("The model cannot be loaded: %s: %.300s", type(error).__name__, " ".join(text.split()))
    if is_out_of_memory(error):
        return out_of_memory("loading the weights")
    if isinstance(error, SafetensorError):
        return LoadError(Cause.MISSING_FILE, "A safetensors file of the model is damaged or cut short.")
    if isinstance(error, json.JSONDecodeError) or "JSON" in text:
        return LoadError(Cause.MISSING_FILE, "A JSON file of the model is damaged.")
    if "trust_remote_code" in text:
        return LoadError(Cause.UNSAFE_FORMAT, "The model needs code of its own to load, which is not run.")
    if isinstance(error, ValueError) and (
        "does not recognize this architecture" in text or "model_type" in text
    ):
        return LoadError(
            Cause.BAD_ARGUMENT, "The transformers engine does not know this model's architecture."
        )
    if isinstance(error, ValueError) and "Unrecognized configuration class" in text:
        return LoadError(Cause.BAD_ARGUMENT, "The model is not one that generates text.")
    if isinstance(error, OSError):
        return LoadError(Cause.MISSING_FILE, "A file of the model is missing or cannot be read.")
    if isinstance(error, RuntimeError) and ("size mismatch" in text or "mismatch" in text):
        return LoadError(Cause.MISSING_FILE, "The weights do not fit the model's config.json.")
    return LoadError(Cause.MISSING_FILE, otherwise)


def choose_device(name: str) -> torch.device:
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda", 0)
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    missing = (name == "cuda" and not torch.cuda.is_available()) or (
        name == "mps" and not torch.backends.mps.is_available()
    )
    if missing:
        raise LoadError(Cause.BAD_ARGUMENT, f"Argument 'device' is {name!r}, but this machine has none.")
    return torch.device("cuda", 0) if name == "cuda" else torch.device(name)


def _dtype(name: str, device: torch.device) -> torch.dtype:
    if name != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if device.type == "mps":
        return torch.float16
    # Elsewhere bfloat16 works too, but slower than float32.
    return torch.bfloat16 if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32


def _eos(model: Any, tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: as the model's generation config says, else its tokenizer."""
    eos = model.generation_config.eos_token_id
    if eos is None:
        eos = tokenizer.eos_token_id
    if eos is None:
        return frozenset()
    return frozenset([eos] if isinstance(eos, int) else eos)
