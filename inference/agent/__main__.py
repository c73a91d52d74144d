"""`python -m inference.agent --data DIR --cache DIR`: the agent of a node that has joined.

SIGTERM ends the agent; its workers run on and are adopted by the next one.
"""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import signal
import sys
from pathlib import Path
from typing import TextIO

from inference.agent.identity import Identity, default_cache, default_data, node_folder, read_identity
from inference.agent.loop import Agent
from inference.bounds import leave_no_core

log = logging.getLogger("inference.agent")


class AgentError(Exception):
    """Why the agent does not start, in one sentence."""


def main(argv: list[str]) -> int:
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=logging.INFO, stream=sys.stderr, format="%(asctime)s %(levelname)s agent: %(message)s"
    )
    leave_no_core()
    data, cache = arguments.data.resolve(), arguments.cache.resolve()
    try:
        identity = _identity(data)
        with _only_agent(data):
            log.info("Node %s, gateway %s, process %d.", identity.name, identity.url, os.getpid())
            asyncio.run(_until_told(Agent(identity, data=data, cache=cache)))
    except AgentError as error:
        print(error, file=sys.stderr)
        return 1
    log.info("The agent ends; its workers run on.")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m inference.agent", description=__doc__)
    parser.add_argument("--data", type=Path, default=default_data(), help="data folder")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of model files")
    return parser


def _identity(data: Path) -> Identity:
    try:
        identity = read_identity(data)
    except ValueError as error:
        raise AgentError(str(error)) from None
    if identity is None:
        raise AgentError(
            f"No node has joined from {data}; run `manage.py node --join TOKEN --url URL` first."
        )
    return identity


def _only_agent(data: Path) -> TextIO:
    """Hold the data folder for as long as the returned file is open, that is, this process lives."""
    path = node_folder(data) / "agent.lock"
    try:
        file = open(path, "w")  # noqa: SIM115 - the caller closes it
    except OSError as error:
        raise AgentError(f"The data folder {data} cannot be written: {error.strerror}.") from None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise AgentError(f"Another agent already runs on the data folder {data}.") from None
    return file


async def _until_told(agent: Agent) -> None:
    running = asyncio.ensure_future(agent.run())
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, running.cancel)
    try:
        await running
    except asyncio.CancelledError:
        return


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
