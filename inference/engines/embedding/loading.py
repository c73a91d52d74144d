"""From a model folder to an encoder in memory. Every refusal is a LoadError with its cause."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from transformers import AutoModel, AutoModelForSequenceClassification
from transformers.utils import logging as transformers_logging

from inference.engines.base import EngineSpec, LoadError
from inference.engines.embedding.arguments import Arguments
from inference.engines.embedding.folder import Kind, ModelFolder, read_folder
from inference.engines.embedding.packing import EXAMPLES, pack
from inference.engines.embedding.tokens import Piece, Tokens
from inference.engines.transformers.loading import check_folder, choose_device, is_out_of_memory, refusal
from inference.protocol import Cause, Progress

logger = logging.getLogger("roundhouse.engine")

CPU_BATCH_TOKENS = 512
"""Others wait while a step runs: below a second for a small model, a few for a large one."""
CPU_LANES = 2
"""Steps at a time, each with its part of the threads: a step's threads wait for one another after every
operation, and for whatever else takes their core."""
ACCELERATOR_BATCH_TOKENS = 16_384
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Encode(Protocol):
    def __call__(self, pieces: Sequence[Piece]) -> np.ndarray[Any, np.dtype[np.float32]]:
        """One float32 row per piece: a vector, or a score. Blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    folder: ModelFolder
    encode: Encode
    tokens: Tokens
    batch_tokens: int
    lanes: int
    """Steps that may run at a time."""
    padded: bool
    """A step takes as long as if all its pieces were as long as the longest."""
    width: int
    """Numbers in a row."""
    normalised: bool
    """The model's vectors have length 1."""


def load(spec: EngineSpec, arguments: Arguments, progress: Callable[[Progress], None]) -> Loaded:
    """Read `spec.model_path`. Blocks for seconds; raises LoadError."""
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    # It names folders of this machine.
    logging.getLogger("sentence_transformers").setLevel(logging.WARNING)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    if spec.model_path is None:
        raise LoadError(Cause.MISSING_FILE, "The embedding engine needs a model folder.")
    folder = read_folder(spec.model_path)
    size = check_folder(folder.weights)
    device = choose_device(arguments.device)
    progress(Progress(step="loading weights", done=0, total=size))
    try:
        _check_whole(folder)
        model = _read(folder, device, DTYPES.get(arguments.dtype, torch.float32))
    except LoadError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise LoadError(
                Cause.OUT_OF_MEMORY, "Memory ran out while loading the weights. Serve a smaller model."
            ) from error
        raise refusal(error, spec.model_path, "The model's files cannot be understood.") from error
    progress(Progress(step="loading weights", done=size, total=size))
    batch = CPU_BATCH_TOKENS if device.type == "cpu" else ACCELERATOR_BATCH_TOKENS
    return _loaded(folder, model.eval(), device, arguments, arguments.max_batch_tokens or batch)


def _read(folder: ModelFolder, device: torch.device, dtype: torch.dtype) -> Any:
    # Here, because its import takes a second that a refused folder need not wait for.
    from sentence_transformers import CrossEncoder, SentenceTransformer

    kind = CrossEncoder if folder.kind == Kind.CROSS_ENCODER else SentenceTransformer
    return kind(
        str(folder.path),
        device=str(device),
        local_files_only=True,
        trust_remote_code=False,
        model_kwargs={"dtype": dtype, "use_safetensors": True},
    )


def _check_whole(folder: ModelFolder) -> None:
    """Refuse weights with tensors missing: the loader would fill them with random numbers and go on."""
    kind = AutoModelForSequenceClassification if folder.kind == Kind.CROSS_ENCODER else AutoModel
    # On the meta device nothing but headers is read.
    _, info = kind.from_pretrained(
        folder.weights,
        device_map="meta",
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
    )
    # Encoders are stored with and without what only a classifier (pooler) or a writer (decoder) reads.
    needed = [
        name
        for name in info["missing_keys"]
        if folder.kind == Kind.CROSS_ENCODER or not name.startswith(("pooler.", "decoder."))
    ]
    if needed:
        raise LoadError(
            Cause.MISSING_FILE, f"The weights are not complete: {len(needed)} tensors are missing."
        )


def _loaded(
    folder: ModelFolder, model: Any, device: torch.device, arguments: Arguments, batch_tokens: int
) -> Loaded:
    first = model[0]
    if list(first.modality_config) != ["text"]:
        raise LoadError(
            Cause.BAD_ARGUMENT, "The model reads more than plain text; the embedding engine does not."
        )
    if not hasattr(first.tokenizer, "backend_tokenizer"):
        raise LoadError(Cause.MISSING_FILE, "The model has no tokenizer.json.")
    pooling = next((module for module in model if type(module).__name__ == "Pooling"), None)
    if folder.kind == Kind.ENCODER and pooling is None:
        raise LoadError(Cause.BAD_ARGUMENT, "The model does not say how to pool its tokens into one vector.")
    tokens = Tokens(
        first.tokenizer,
        limit=_limit(model, arguments.context_length),
        prompts=model.prompts,
        default_prompt=model.prompts.get(model.default_prompt_name) or "",
        marks_prompts=pooling is not None and not pooling.include_prompt,
    )
    if pooling is not None and not folder.described:
        logger.warning(
            "The folder has no modules.json: the vector of a text is the %s of its tokens' vectors, "
            "not normalised.",
            pooling.pooling_mode,
        )
    threads = torch.get_num_threads()
    lanes = CPU_LANES if device.type == "cpu" and threads >= CPU_LANES and not _remembers(first) else 1
    encode = _encoder(model, device, tokens, folder.kind, threads // lanes)
    packed = False
    if folder.kind == Kind.ENCODER and device.type == "cpu":
        examples = [tokens.input(text, param="input", keep=-1) for text in EXAMPLES]
        packed = pack(first, encode, examples)
    return Loaded(
        folder=folder,
        encode=lambda pieces: encode(pieces, packed),
        tokens=tokens,
        batch_tokens=batch_tokens,
        lanes=lanes,
        padded=not packed,
        width=1 if folder.kind == Kind.CROSS_ENCODER else int(model.get_embedding_dimension()),
        normalised=any(type(module).__name__ == "Normalize" for module in model),
    )


def _limit(model: Any, lowered: int | None) -> int:
    """Most tokens per input: what the model says, but never more than it has positions for."""
    config = model[0].config.get_text_config()
    given = [model.max_seq_length, getattr(config, "max_position_embeddings", None), lowered]
    # A tokenizer that knows no limit says so with an enormous number.
    known = [limit for limit in given if isinstance(limit, int) and 0 < limit < 10**7]
    if not known:
        raise LoadError(
            Cause.BAD_ARGUMENT,
            "The model does not say how many tokens it reads: give the argument 'context_length'.",
        )
    limit = min(known)
    if first := _first_position(config):
        limit = min(limit, int(config.max_position_embeddings) - first)
    return limit


def _first_position(config: Any) -> int:
    """Some count positions from one behind the padding's id."""
    offset = getattr(config, "pad_token_id", None)
    if config.model_type in ("roberta", "xlm-roberta", "camembert", "mpnet") and isinstance(offset, int):
        return offset + 1
    return 0


def _remembers(transformer: Any) -> bool:
    """One step changes what the next is computed with: positions that are stretched to the longest text."""
    rope = str(getattr(transformer.config.get_text_config(), "rope_parameters", None))
    return "dynamic" in rope or "longrope" in rope


def _encoder(
    model: Any, device: torch.device, tokens: Tokens, kind: Kind, threads: int
) -> Callable[[Sequence[Piece], bool], np.ndarray[Any, np.dtype[np.float32]]]:
    first_position = _first_position(model[0].config.get_text_config())

    def encode(pieces: Sequence[Piece], packed: bool) -> np.ndarray[Any, np.dtype[np.float32]]:
        torch.set_num_threads(threads)  # of the thread that asks
        arrays = tokens.packed(pieces, first_position) if packed else tokens.batch(pieces)
        features: dict[str, Any] = {
            name: torch.from_numpy(array).to(device) for name, array in arrays.items()
        }
        features["modality"] = "text"
        if pieces[0].prompt_tokens:
            features["prompt_length"] = pieces[0].prompt_tokens
        with torch.inference_mode():
            answer = model(features)
            if kind == Kind.CROSS_ENCODER:
                rows = model.activation_fn(answer["scores"]).reshape(len(pieces), 1)
            else:
                rows = answer["sentence_embedding"]
            array: np.ndarray[Any, np.dtype[np.float32]] = rows.float().cpu().numpy()
            return array

    return encode
