"""Engines: code that turns prompts into tokens or vectors, chosen by name, and their HTTP server.

`base.py` is the contract. An engine's module is imported only when that engine is created, so that
a simulated worker never pays for torch. No engine knows HTTP; `app.py` and `server.py` are that part.
"""

from __future__ import annotations

from importlib import import_module
from typing import cast

from inference.engines.base import EngineSpec, LoadError, Model
from inference.protocol import Cause

_CLASSES = {
    "embedding": ("inference.engines.embedding.engine", "EmbeddingEngine"),
    "simulated": ("inference.engines.simulated", "SimulatedEngine"),
    "transformers": ("inference.engines.transformers.engine", "TransformersEngine"),
    "upstream": ("inference.engines.upstream.engine", "UpstreamEngine"),
}

ENGINES = frozenset({*_CLASSES, "vllm"})
"""The names a deployment may ask for. `vllm` is none of ours to create: the supervisor starts its server."""


def create_engine(name: str, spec: EngineSpec) -> Model:
    """Make the engine called `name`, not yet loaded. Raises LoadError for a name or argument it refuses."""
    if name not in _CLASSES:
        known = ", ".join(sorted(ENGINES))
        raise LoadError(Cause.BAD_ARGUMENT, f"There is no engine called {name!r}; choose one of: {known}.")
    module, attribute = _CLASSES[name]
    return cast(Model, getattr(import_module(module), attribute)(spec))
