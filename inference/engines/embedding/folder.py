"""What kind of model a folder holds, and whether it can be loaded without running what it brings along.

sentence-transformers trusts a local folder: it would import whatever class `modules.json` names from
there. So every name is checked here first.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path, PurePosixPath
from typing import Any

from inference.engines.base import LoadError
from inference.protocol import Cause
from inference.sources.check import TOKENIZER_FILES

MODULES = frozenset({"Transformer", "Pooling", "Normalize", "Dense", "LayerNorm", "Dropout"})
"""Modules of sentence-transformers that a model may be made of."""

_WITH_WEIGHTS = frozenset({"Dense", "LayerNorm"})
_LARGEST_JSON = 64 * 1024 * 1024


class Kind(StrEnum):
    ENCODER = "encoder"
    """Texts to vectors."""
    CROSS_ENCODER = "cross_encoder"
    """Pairs of a query and a document to scores."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFolder:
    path: Path
    kind: Kind
    weights: Path
    """The folder of the transformer's config and weights."""
    described: bool
    """It has a modules.json: pooling and normalisation are the model's own."""
    matryoshka: tuple[int, ...] | bool
    """Lengths that its vectors may be cut to; True: any, False: none but their own."""


def read_folder(path: Path) -> ModelFolder:
    """Raises LoadError: MISSING_FILE, UNSAFE_FORMAT, or BAD_ARGUMENT for a model of another kind."""
    if not path.is_dir():
        raise LoadError(Cause.MISSING_FILE, "The model's folder is missing.")
    modules = _modules(path)
    weights = path / _place(modules[0]) if modules else path
    config = _object(weights / "config.json")
    for name in ("config.json", "tokenizer_config.json"):
        if (weights / name).is_file() and "auto_map" in _object(weights / name):
            raise _unsafe(f"The model needs code of its own to load, which is not run ({name}).")
    if (weights / "adapter_config.json").is_file():
        raise _bad("The folder holds an adapter, not a whole model; merge it into its model first.")
    if not any((weights / name).is_file() for name in TOKENIZER_FILES):
        # transformers would make up a tokenizer that knows no words.
        raise _missing("The model's folder has no tokenizer (tokenizer.json or another known file).")
    architecture = str((config.get("architectures") or [""])[0])
    names = [_class(module) for module in modules]
    if architecture.endswith("ForSequenceClassification") and "Pooling" not in names:
        labels = _labels(config)
        if labels != 1:
            raise _bad(f"The model sorts texts into {labels} classes; a reranker gives one score.")
        kind = Kind.CROSS_ENCODER
        _check_function((config.get("sentence_transformers") or {}).get("activation_fn"))
        _check_function(config.get("sbert_ce_default_activation_function"))
        if (path / "config_sentence_transformers.json").is_file():
            _check_function(_object(path / "config_sentence_transformers.json").get("activation_fn"))
    elif not modules and architecture.endswith(("ForCausalLM", "ForConditionalGeneration", "LMHeadModel")):
        raise _bad("The model generates text; deploy it with the transformers engine.")
    else:
        kind = Kind.ENCODER
    return ModelFolder(
        path=path,
        kind=kind,
        weights=weights,
        described=bool(modules),
        matryoshka=_matryoshka(config),
    )


def _modules(path: Path) -> list[dict[str, Any]]:
    if not (path / "modules.json").is_file():
        return []
    modules = _read(path / "modules.json")
    if not isinstance(modules, list) or not modules or not all(isinstance(each, dict) for each in modules):
        raise _missing("modules.json is damaged: it is not a list of modules.")
    for module in modules:
        name = str(module.get("type", ""))
        if not name.startswith("sentence_transformers."):
            raise _unsafe("The model needs code of its own to load, which is not run (modules.json).")
        if _class(module) not in MODULES:
            raise _bad(
                f"The model is made with {_class(module)!r}; the embedding engine knows: "
                f"{', '.join(sorted(MODULES))}."
            )
        folder = path / _place(module)
        if _class(module) in _WITH_WEIGHTS:
            if not (folder / "model.safetensors").is_file():
                if (folder / "pytorch_model.bin").is_file():
                    raise _unsafe(
                        f"The weights of {_class(module)} are a pickle file, which can carry code. "
                        "Convert them to safetensors."
                    )
                raise _missing(f"The weights of {_class(module)} are missing.")
            _check_function(_object(folder / "config.json").get("activation_function"))
    if _class(modules[0]) != "Transformer":
        raise _bad("The model does not start with a Transformer.")
    return modules


def _class(module: dict[str, Any]) -> str:
    return str(module["type"]).rsplit(".", 1)[-1]


def _place(module: dict[str, Any]) -> str:
    place = str(module.get("path", ""))
    if ".." in PurePosixPath(place).parts or PurePosixPath(place).is_absolute():
        raise _unsafe("modules.json names a folder outside of the model.")
    return place


def _check_function(name: object) -> None:
    """The loader imports and calls what is named: only layers of torch may be."""
    if name is not None and not str(name).startswith("torch.nn."):
        raise _unsafe("The model names an activation function of its own, which is not run.")


def _labels(config: dict[str, Any]) -> int:
    names = config.get("id2label")
    count = config.get("num_labels", len(names) if isinstance(names, dict) else 2)
    return count if isinstance(count, int) else 2


def _matryoshka(config: dict[str, Any]) -> tuple[int, ...] | bool:
    given = config.get("matryoshka_dimensions")
    if isinstance(given, list) and given and all(isinstance(each, int) and each > 0 for each in given):
        return tuple(sorted(given))
    return config.get("is_matryoshka") is True


def _object(path: Path) -> dict[str, Any]:
    value = _read(path)
    if not isinstance(value, dict):
        raise _missing(f"{path.name} is damaged: it is not a JSON object.")
    return value


def _read(path: Path) -> Any:
    try:
        if path.stat().st_size > _LARGEST_JSON:
            raise _missing(f"{path.name} is damaged: it is larger than any such file.")
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise _missing(f"The model's folder has no {path.name}.") from None
    except (ValueError, RecursionError):
        raise _missing(f"{path.name} is damaged: it is not JSON.") from None
    except OSError:
        raise _missing(f"{path.name} cannot be read.") from None


def _missing(detail: str) -> LoadError:
    return LoadError(Cause.MISSING_FILE, detail)


def _unsafe(detail: str) -> LoadError:
    return LoadError(Cause.UNSAFE_FORMAT, detail)


def _bad(detail: str) -> LoadError:
    return LoadError(Cause.BAD_ARGUMENT, detail)
