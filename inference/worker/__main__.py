"""`python -m inference.worker SPEC_FILE`: one worker, until it ends.

Exit code 0: it ended because it was told to. 1: it failed, and `end.json` says why. 2: no worker was
started, because the spec file cannot be used.
"""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from inference.bounds import leave_no_core
from inference.worker.spec import WorkerSpec


def main() -> int:
    if len(sys.argv) != 2:
        sys.stderr.write("usage: python -m inference.worker SPEC_FILE\n")
        return 2
    try:
        spec = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=WorkerSpec)
    except (OSError, msgspec.DecodeError) as error:
        sys.stderr.write(f"The worker's spec file cannot be used: {error}\n")
        return 2
    leave_no_core()
    return asyncio.run(_run(spec))


async def _run(spec: WorkerSpec) -> int:
    from inference.worker.supervisor import Supervisor

    return await Supervisor(spec).run()


if __name__ == "__main__":
    sys.exit(main())
