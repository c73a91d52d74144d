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
    while True:
        process = await start_helper(
            [sys.executable, "-m", "inference.agent.app", str(data.resolve())], stdin=subprocess.PIPE
        )
        try:
            async for line in lines_of(process):
                if line.strip().isdigit():
                    failures = 0
                    heard(int(line))
            exit_code = await process.wait()
        finally:
            if process.stdin is not None:
                process.stdin.close()
            await end_helper(process)
        pause = RESTART_SECONDS[min(failures, len(RESTART_SECONDS) - 1)]
        failures += 1
        log.error(
            "The listener for nudges ended with exit code %d; it is started again in %d s. "
            "The agent goes on asking by itself.",
            exit_code,
            pause,
        )
        await asyncio.sleep(pause)
