"""Processes that a preparation starts, none of which outlives it.

`python -m inference.sources.child MODULE ARGUMENTS…` runs a module as `python -m` does, and ends
the moment its stdin is closed, which the kernel does for us even when we are killed.
"""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import inference


@contextmanager
def running(
    module: str,
    *arguments: str,
    environment: Mapping[str, str],
    merge_errors: bool = False,
) -> Iterator[subprocess.Popen[str]]:
    """Run `python -m module arguments` with our environment and `environment`; stdout is a pipe.

    It is over when the block is left, however that happens.
    """
    root = str(Path(inference.__file__).parents[1])
    paths = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))
    with subprocess.Popen(
        [sys.executable, "-P", "-m", "inference.sources.child", module, *arguments],
        env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", **environment},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if merge_errors else None,
        text=True,
        errors="replace",
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=2)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _end_with_parent() -> None:
    # Not sys.stdin: its lock, held by this thread, would abort the interpreter's normal end.
    while os.read(0, 1024):
        pass
    os._exit(3)


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
