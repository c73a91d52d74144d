"""How vLLM's API server is started: interpreter, command line, environment."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import msgspec

from inference.engines.base import LoadError
from inference.engines.vllm.arguments import Arguments
from inference.protocol import Cause

PYTHON_VARIABLE = "ROUNDHOUSE_VLLM_PYTHON"
"""Names the interpreter that has vLLM. Set by whoever runs the node, never by a deployment: else the
admin could have any program of the node started."""

CODE = Path(__file__).resolve().parents[3]
"""The folder that holds our packages: vLLM's interpreter finds the guard through it."""


def interpreter(environment: Mapping[str, str]) -> str:
    """Raises LoadError when there is none."""
    python = Path(environment.get(PYTHON_VARIABLE) or CODE / ".venv-vllm" / "bin" / "python")
    if not os.access(python, os.X_OK):
        raise LoadError(
            Cause.BAD_ARGUMENT,
            f"This node has no vLLM: run `make vllm` or `make vllm-cpu` on it, or set {PYTHON_VARIABLE} "
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
) -> list[str]:
    """The child's command line. Nothing secret is in it: every user of the machine can read it."""
    given = {name: value for name, value in msgspec.structs.asdict(arguments).items() if value is not None}
    line = [
        *(python, "-m", "vllm.entrypoints.openai.api_server"),
        *("--host", host, "--port", str(port)),
        *("--middleware", "inference.worker.guard.Guard"),
        *("--model", model_path, "--served-model-name", served_name),
        # No pickle, and no defaults for sampling that only this engine would have.
        *("--load-format", "safetensors", "--generation-config", "vllm"),
        *("--max-num-seqs", str(slots)),
        "--enable-prompt-tokens-details",
        "--disable-uvicorn-access-log",
    ]
    if chat_template is not None:
        line += ["--chat-template", str(chat_template)]
    if arguments.tool_call_parser is not None:
        line.append("--enable-auto-tool-choice")
    for name, value in given.items():
        flag = name.replace("_", "-")
        if isinstance(value, bool):
            line.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            line += [f"--{flag}", str(value)]
    return line


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
