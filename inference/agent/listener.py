"""Runs the process that hears nudges (`app.py`) beside the loop, for as long as the loop runs."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from inference.agent.processes import end_helper, lines_of, start_helper

log = logging.getLogger(__name__)

RESTART_SECONDS = (1.0, 2.0, 5.0, 15.0, 60.0)
"""Pauses before a listener that ended is started again; a nudge heard begins anew."""


async def listen(data: Path, heard: Callable[[int], None]) -> None:
    """Call `heard` with the generation of every nudge. Never returns; cancel it."""
    failures = 0

    def count_and_tell(generation: int) -> None:
        nonlocal failures
        failures = 0
        heard(generation)

    while True:
        try:
            ended = f"exit code {await _listen_once(data, count_and_tell)}"
        except OSError as error:
            ended = f"it could not be started: {error.strerror}"
        pause = RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)]
        failures += 1
        log.error(
            "The listener for nudges ended (%s) and is started again in %d s. "
            "The agent goes on asking by itself.",
            ended,
            pause,
        )
        await asyncio.sleep(pause)


async def _listen_once(data: Path, heard: Callable[[int], None]) -> int:
    command = [sys.executable, "-m", "inference.agent.app", str(data)]
    # Its standard input stays open while we live: when that closes, the listener ends too.
    process = await start_helper(command, stdin=subprocess.PIPE)
    try:
        async for line in lines_of(process):
            if line.strip().isdigit():
                heard(int(line))
        return await process.wait()
    finally:
        if process.stdin is not None:
            process.stdin.close()
        # It holds nothing that could be lost, and Celery's own goodbye takes seconds.
        await end_helper(process, patience=0)
