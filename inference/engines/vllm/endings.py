"""Why vLLM ended, from what it printed: its last lines are a long traceback that names no cause."""

from __future__ import annotations

import re
from collections.abc import Iterable

from inference.protocol import Cause
from inference.worker.spec import EngineFailed

_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|No available memory for the cache blocks"
    r"|Free memory on device|larger than the available KV cache memory|is needed, which is larger than",
    re.IGNORECASE,
)
_REFUSED = re.compile(
    r"error: (?:argument |unrecognized arguments|invalid)|ValidationError|validation error for"
    r"|greater than the derived max_model_len|invalid tool call parser|invalid reasoning parser"
)
_NO_VLLM = re.compile(r"No module named '?vllm")


class Telltales:
    """Hears what vLLM prints, from its start to its end."""

    def __init__(self, arguments: Iterable[str]) -> None:
        self._arguments = tuple(arguments)
        self._part = ""
        self.found: EngineFailed | None = None
        """The first cause that it named; later lines are consequences."""
        self._unnamed = False

    def hear(self, text: str) -> None:
        *lines, self._part = (self._part + text).split("\n")
        self._part = self._part[-4000:]
        for line in lines:
            self._hear_line(line)

    def _hear_line(self, line: str) -> None:
        if self.found is None:
            if _MEMORY.search(line):
                self._tell(Cause.OUT_OF_MEMORY, "The device or the machine ran out of memory.")
            elif _NO_VLLM.search(line):
                self._tell(Cause.BAD_ARGUMENT, "The Python that this node uses for vLLM has no vLLM.")
            elif _REFUSED.search(line):
                self._unnamed = self._refused(line) is None
                self._tell(Cause.BAD_ARGUMENT, self._refused(line) or "vLLM refuses an argument.")
        elif self._unnamed and (named := self._refused(line)) is not None:
            # A validation error names its argument in the lines below its headline.
            self._unnamed = False
            self._tell(Cause.BAD_ARGUMENT, named)

    def _refused(self, line: str) -> str | None:
        spelled = line.replace("-", "_")
        for name in self._arguments:
            if re.search(rf"\b_*{name}\b", spelled):
                return f"vLLM refuses the argument {name!r} or its value."
        return None

    def _tell(self, cause: Cause, detail: str) -> None:
        self.found = EngineFailed(cause=cause, detail=detail)
