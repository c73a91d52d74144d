"""Environments for clients other than our own tests': one virtual environment per list of packages.

Clients pin one another's versions, and none of them belongs into `.venv`.
"""

from __future__ import annotations

import fcntl
import subprocess
import sys
from pathlib import Path

from tests.run import ROOT

ENVIRONMENTS = ROOT / ".venv-clients"

PACKAGES = {
    "openai-2": ["openai>=2,<3"],
    "langchain": ["langchain-openai>=1.7,<2", "langchain-tests>=1.1,<2"],
    "llama-index": ["llama-index-llms-openai-like>=0.8", "llama-index-embeddings-openai-like>=0.4"],
}


def python_with(name: str) -> Path:
    """The Python that has these packages; made on first use and whenever the list is changed."""
    folder = ENVIRONMENTS / name
    python, stamp = folder / "bin" / "python", folder / "installed"
    wanted = "\n".join(PACKAGES[name])
    ENVIRONMENTS.mkdir(exist_ok=True)
    # Two stages of the tests may want the same one at the same time.
    with (ENVIRONMENTS / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not stamp.exists() or stamp.read_text() != wanted:
            subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
            subprocess.run(
                [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install", *PACKAGES[name]],
                check=True,
            )
            stamp.write_text(wanted)
    return python
