"""Why an engine child ended, from what it said, how it ended, and what it printed last."""

from __future__ import annotations

import signal
from pathlib import Path

from inference.protocol import Cause
from inference.worker.spec import EngineFailed

_CGROUPS = Path("/sys/fs/cgroup")

_TELLTALES = (
    ("out of memory", Cause.OUT_OF_MEMORY, "The device or the machine ran out of memory."),
    ("outofmemoryerror", Cause.OUT_OF_MEMORY, "The device or the machine ran out of memory."),
    ("cannot allocate memory", Cause.OUT_OF_MEMORY, "The machine ran out of memory."),
    ("memoryerror", Cause.OUT_OF_MEMORY, "The machine ran out of memory."),
    ("address already in use", Cause.PORT, "The address to listen on is taken."),
)

_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})


def classify_end(
    *, told: EngineFailed | None, exit_code: int, log_tail: list[str], killed_for_memory: bool
) -> tuple[Cause, str]:
    """The cause and one sentence for people. `exit_code` is negative for a signal, as in `Popen`."""
    if told is not None and told.cause is not Cause.CRASHED:
        return told.cause, told.detail
    number = -exit_code if exit_code < 0 else exit_code - 128 if exit_code > 128 else 0
    if number == signal.SIGKILL and killed_for_memory:
        return Cause.OUT_OF_MEMORY, "The system ended the engine because memory ran out."
    if number in _FROM_OUTSIDE:
        return Cause.KILLED, f"The engine was ended from outside by {_signal_name(number)}."
    printed = "\n".join(log_tail).lower()
    for telltale, cause, detail in _TELLTALES:
        if telltale in printed:
            return cause, detail
    if told is not None:
        return told.cause, told.detail
    if exit_code < 0:
        return Cause.CRASHED, f"The engine ended by {_signal_name(number)}."
    return Cause.CRASHED, f"The engine ended by itself with exit code {exit_code}."


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def memory_kills() -> int:
    """How many processes the kernel has ended for lack of memory in our control group; 0 if unknown.

    The kernel does not say whom it killed: a number that grew while our child died by SIGKILL is
    the evidence there is.
    """
    for path, key in _counters():
        try:
            lines = path.read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == key and value.isdigit():
                return int(value)
    return 0


def _counters() -> list[tuple[Path, str]]:
    """Where the count may be, nearest first: version 2, then version 1, then inside a container."""
    found: list[tuple[Path, str]] = []
    try:
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return found
    for group in groups:
        _, _, rest = group.partition(":")
        controllers, _, inside = rest.partition(":")
        inside = inside.lstrip("/")
        if not controllers:
            found.append((_CGROUPS / inside / "memory.events", "oom_kill"))
        elif "memory" in controllers.split(","):
            found.append((_CGROUPS / "memory" / inside / "memory.oom_control", "oom_kill"))
    found.append((_CGROUPS / "memory.events", "oom_kill"))
    found.append((_CGROUPS / "memory" / "memory.oom_control", "oom_kill"))
    return found
