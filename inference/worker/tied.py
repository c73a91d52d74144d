"""`python -m inference.worker.tied PARENT COMMAND…`: become COMMAND, and end when process PARENT does.

For children that are not ours and so cannot ask for it themselves. On Linux the kernel sees to it, and
goes on to after COMMAND has replaced this program; elsewhere only a supervisor that ends in order ends
them. Standard library only.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main() -> None:
    parent, *command = sys.argv[1:]
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != int(parent):  # it ended before we asked
            sys.exit(1)
    os.execv(command[0], command)  # noqa: S606 - the supervisor's own list, and no shell is wanted


if __name__ == "__main__":
    main()
