"""A model's files on this node: made ready before a launch, by a process of their own.

`python -m inference.sources` does the work and prints how far it is, one JSON object a line
(a `CopyReport`); the last line of a ready copy also has `path`, the folder to load from.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from inference.agent.processes import Key, end_helper, lines_of, start_helper
from inference.protocol import Cause, CopyPhase, CopyReport, ModelSpec

log = logging.getLogger(__name__)

SOURCES_COMMAND = (sys.executable, "-m", "inference.sources")

Wanted = tuple[int, str]
"""A model at one source: model id and source."""


class SourceLine(CopyReport, frozen=True, kw_only=True, omit_defaults=True):
    """One line of `python -m inference.sources`."""

    path: str = ""


@dataclass(slots=True, kw_only=True)
class _Copy:
    line: SourceLine
    waiting: set[Key] = field(default_factory=set)
    """The workers that this attempt is for."""
    task: asyncio.Task[None] | None = None


class Copies:
    """The copies of one node. `changed` is called when one got ready or failed."""

    def __init__(
        self, cache: Path, changed: Callable[[], None], *, command: Sequence[str] = SOURCES_COMMAND
    ) -> None:
        self._cache = cache
        self._changed = changed
        self._command = command
        self._copies: dict[Wanted, _Copy] = {}

    def want(self, model: ModelSpec, key: Key) -> SourceLine:
        """How far the copy is that worker `key` needs; starts one when there is none.

        A failed copy stays failed for the workers that waited for it. Another worker, or the
        next epoch of the same one, is a new attempt.
        """
        copy = self._copies.get((model.id, model.source))
        if copy is not None and not self._stale(copy, key):
            copy.waiting.add(key)
            return copy.line
        line = SourceLine(model_id=model.id, phase=CopyPhase.FETCHING)
        copy = _Copy(line=line, waiting={key})
        self._copies[model.id, model.source] = copy
        copy.task = asyncio.create_task(self._make(model, copy), name=f"copy of {model.name}")
        return line

    def keep_only(self, wanted: Collection[Wanted]) -> None:
        """End the attempts that nobody waits for any more."""
        for key in [key for key, copy in self._copies.items() if copy.task and key not in wanted]:
            task = self._copies.pop(key).task
            if task is not None:
                task.cancel()

    def reports(self) -> list[CopyReport]:
        # A model whose source was changed has two; the newer one counts.
        newest = {copy.line.model_id: copy.line for copy in self._copies.values()}
        return [_report(line) for line in newest.values()]

    async def close(self) -> None:
        """End every attempt; what is complete stays."""
        tasks = [copy.task for copy in self._copies.values() if copy.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _stale(self, copy: _Copy, key: Key) -> bool:
        if copy.line.phase is CopyPhase.READY:
            return not Path(copy.line.path).is_dir()
        return copy.line.phase is CopyPhase.FAILED and key not in copy.waiting

    async def _make(self, model: ModelSpec, copy: _Copy) -> None:
        try:
            copy.line = await self._run(model, copy)
        except OSError as error:
            copy.line = _failed(model, Cause.FETCH, f"The fetching could not be started: {error.strerror}.")
        finally:
            copy.task = None
        if copy.line.phase is CopyPhase.READY:
            log.info("The files of %s are ready.", model.name)
        else:
            log.error("The files of %s are not ready: %s", model.name, copy.line.detail)
        self._changed()

    async def _run(self, model: ModelSpec, copy: _Copy) -> SourceLine:
        """The last line of the sources command: ready or failed, whatever else it said."""
        command = [
            *self._command,
            *("--model-id", str(model.id)),
            *("--model", model.name),
            *("--source", model.source),
            *("--cache", str(self._cache)),
        ]
        process = await start_helper(command)
        try:
            async for text in lines_of(process):
                try:
                    copy.line = msgspec.json.decode(text, type=SourceLine)
                except msgspec.DecodeError:
                    log.warning("The sources command said: %s", text.decode(errors="replace").rstrip())
            exit_code = await process.wait()
        finally:
            await end_helper(process)
        failed = copy.line.phase is CopyPhase.FAILED
        if failed or (copy.line.phase is CopyPhase.READY and copy.line.path):
            return copy.line
        cause = Cause.KILLED if exit_code < 0 else Cause.FETCH
        return _failed(model, cause, f"The fetching ended with exit code {exit_code}.")


def _failed(model: ModelSpec, cause: Cause, detail: str) -> SourceLine:
    return SourceLine(model_id=model.id, phase=CopyPhase.FAILED, cause=cause, detail=detail)


def _report(line: SourceLine) -> CopyReport:
    """The line without its path, which is this machine's own affair."""
    return CopyReport(**{name: getattr(line, name) for name in CopyReport.__struct_fields__})
