"""Is this folder a LoRA adapter that can be loaded without running anything it brings along?"""

from __future__ import annotations

from pathlib import Path

from inference.engines.base import LoadError
from inference.protocol import Cause
from inference.sources.check import CODE_FORMATS, check_safetensors, read_object, refuse_code
from inference.sources.source import SourceError

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
DEFAULT_RANK = 16
"""vLLM's own, when `max_lora_rank` is not given."""


def check_adapter(name: str, folder: Path, max_rank: int) -> None:
    """Raises LoadError that names the adapter. Only headers are read."""
    try:
        _check(folder, max_rank)
    except SourceError as error:
        raise LoadError(error.cause, f"The adapter {name!r} cannot be used: {error}") from None
    except OSError:
        raise LoadError(
            Cause.MISSING_FILE, f"The adapter {name!r} cannot be used: its folder cannot be read."
        ) from None


def _check(folder: Path, max_rank: int) -> None:
    if not folder.is_dir():
        raise SourceError(Cause.MISSING_FILE, "its folder does not exist on this node.")
    names = {entry.name for entry in folder.iterdir()}
    # vLLM would rather take these than say that there is nothing else; the others it never asks for.
    for code in sorted(names):
        if Path(code).suffix.lower() in CODE_FORMATS:
            raise SourceError(
                Cause.UNSAFE_FORMAT, f"its folder holds {code[:100]!r}, in a format that can carry code."
            )
    refuse_code(folder, names)
    for needed in (CONFIG, WEIGHTS):
        if needed not in names:
            raise SourceError(Cause.MISSING_FILE, f"its folder has no {needed}.")
    config = read_object(folder / CONFIG)
    if config.get("peft_type") != "LORA":
        raise SourceError(Cause.BAD_ARGUMENT, f"its {CONFIG} is not of a LoRA.")
    rank = config.get("r")
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise SourceError(Cause.MISSING_FILE, f"{CONFIG} is damaged: it has no rank.")
    if rank > max_rank:
        raise SourceError(Cause.BAD_ARGUMENT, f"its rank is {rank}, and 'max_lora_rank' allows {max_rank}.")
    check_safetensors(folder / WEIGHTS)
