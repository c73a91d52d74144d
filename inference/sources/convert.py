"""GGUF to bf16 safetensors: `python -m inference.sources.convert MODEL.gguf FOLDER WEIGHTS`.

A process of its own, so that its memory returns and its crash is only a cause; held to what so many weights
as the checked header tells may need. Prints one JSON
`Step` or `Failed` per line; the folder is whole when it exits 0.

Transformers reads the GGUF; three things are added:
- the file's header is parsed once instead of three times, and name maps are made once instead of
  once per module (16 s became 8 s for 135 M parameters on 2 cores);
- the pre-tokenizer of the files that say so splits digits one by one, which transformers leaves
  out (`\\n\\n1` would become other tokens than the model was trained with);
- every end-of-turn token that the file names ends a generation.
"""

from __future__ import annotations

import errno
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from inference.bounds import hold_conversion
from inference.protocol import Cause
from inference.sources.progress import Failed, Line, Step

# llama.cpp's pre-tokenizers that take digits one by one before the GPT-2 split.
_SINGLE_DIGITS = frozenset(
    {"smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"}
)


def say(line: Line) -> None:
    sys.stdout.write(msgspec.json.encode(line).decode() + "\n")
    sys.stdout.flush()


def convert(source: Path, folder: Path, progress: Callable[[Step], None]) -> None:
    """Write config, generation config, tokenizer with chat template and weights into `folder`."""
    progress(Step(step="start"))
    import gguf
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    reader = _read_once(gguf, progress)(str(source))
    where = str(source.parent)
    options = {"gguf_file": source.name, "local_files_only": True}

    config = AutoConfig.from_pretrained(where, **options)
    tokenizer = AutoTokenizer.from_pretrained(where, config=config, **options)
    _split_digits(tokenizer, _text(reader, "tokenizer.ggml.pre"))
    tokenizer.model_max_length = config.max_position_embeddings
    model = AutoModelForCausalLM.from_pretrained(
        where,
        config=config,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        **options,
    )
    ends = [_number(reader, f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")]
    eos = list(dict.fromkeys(end for end in ends if end is not None))
    model.generation_config = GenerationConfig(
        bos_token_id=_number(reader, "tokenizer.ggml.bos_token_id"),
        eos_token_id=eos[0] if len(eos) == 1 else eos or None,
        pad_token_id=tokenizer.pad_token_id,
    )
    progress(Step(step="save"))
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)


def _read_once(gguf: Any, progress: Callable[[Step], None]) -> Callable[[str], Any]:
    """Make transformers share one parsed header and one name map, and count the tensors it unpacks.

    It imports these three names from `gguf` whenever it reads a file.
    """
    open_file = functools.cache(gguf.GGUFReader)
    gguf.GGUFReader = lambda path, *_: open_file(str(path))
    gguf.get_tensor_name_map = functools.cache(gguf.get_tensor_name_map)
    unpack, done = gguf.dequantize, 0

    def counted(data: Any, kind: Any) -> Any:
        nonlocal done
        weights = unpack(data, kind)
        done += 1
        progress(Step(step="convert", done=done, total=total))
        return weights

    gguf.dequantize = counted
    total = 0

    def opened(path: str) -> Any:
        nonlocal total
        reader = open_file(path)
        total = len(reader.tensors)
        return reader

    return opened


def _split_digits(tokenizer: Any, kind: str) -> None:
    if kind not in _SINGLE_DIGITS:
        return
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _text(reader: Any, key: str) -> str:
    field = reader.get_field(key)
    return str(field.contents()) if field is not None else ""


def _number(reader: Any, key: str) -> int | None:
    field = reader.get_field(key)
    return int(field.contents()) if field is not None else None


def failure(error: Exception, source: Path, folder: Path) -> Failed:
    """What went wrong, as a cause and a sentence without this machine's paths."""
    text = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    for path in (source, folder, source.parent, folder.parent):
        text = text.replace(str(path), path.name)
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return Failed(cause=Cause.OUT_OF_MEMORY, detail="Memory ran out while the model was converted.")
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return Failed(cause=Cause.DISK, detail="The disk became full while the model was converted.")
    if "not supported" in text or isinstance(error, NotImplementedError):
        return Failed(cause=Cause.BAD_ARGUMENT, detail=f"This GGUF model cannot be converted: {text[:200]}")
    return Failed(cause=Cause.CRASHED, detail=f"The conversion failed: {type(error).__name__}: {text[:200]}")


def main(arguments: list[str]) -> int:
    source, folder = Path(arguments[0]), Path(arguments[1])
    hold_conversion(int(arguments[2]))
    try:
        convert(source, folder, say)
    except Exception as error:
        say(failure(error, source, folder))
        raise  # the trace goes to stderr, for the log
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
