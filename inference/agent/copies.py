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
from inference.protocol import Cause, CopyPhase, CopyReport, DeletedCopy, ModelSpec, UnwantedCopy

log = logging.getLogger(__name__)

SOURCES_COMMAND = (sys.executable, "-m", "inference.sources")

Wanted = tuple[int, str]
"""A model at one source: model id and source."""


class _Path(msgspec.Struct):
    path: str = ""


@dataclass(slots=True, kw_only=True)
class Copy:
    """One attempt to have a model's files here."""

    report: CopyReport
    path: str = ""
    """Where the files are, once the report says that they are ready."""
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
        self._copies: dict[Wanted, Copy] = {}
        self._deleted: dict[UnwantedCopy, DeletedCopy] = {}
        self._deleting: dict[UnwantedCopy, asyncio.Task[None]] = {}
        self._undeletable: set[UnwantedCopy] = set()
        """Tried again with every order, and said once."""

    def want(self, model: ModelSpec, key: Key) -> Copy:
        """The copy that worker `key` needs, at whatever phase; starts an attempt when there is none.

        A failed copy stays failed for the workers that waited for it. Another worker, or the
        next epoch of the same one, is a new attempt.
        """
        copy = self._copies.get((model.id, model.source))
        if copy is None or _stale(copy, key):
            copy = Copy(report=CopyReport(model_id=model.id, phase=CopyPhase.FETCHING))
            copy.task = asyncio.create_task(self._make(model, copy), name=f"copy of {model.name}")
            self._copies[model.id, model.source] = copy
        copy.waiting.add(key)
        return copy

    def keep_only(self, wanted: Collection[Wanted]) -> None:
        """End the attempts that nobody waits for any more."""
        for key in [key for key, copy in self._copies.items() if copy.task and key not in wanted]:
            task = self._copies.pop(key).task
            if task is not None:
                task.cancel()

    def delete(self, unwanted: Collection[UnwantedCopy]) -> None:
        """Delete these from the cache. What is done is told by `deleted` for as long as it is asked for."""
        self._deleted = {copy: told for copy, told in self._deleted.items() if copy in unwanted}
        for copy in unwanted:
            if copy not in self._deleted and copy not in self._deleting:
                task = asyncio.create_task(self._delete(copy), name=f"deletion of {copy.name}")
                self._deleting[copy] = task

    def deleted(self) -> list[DeletedCopy]:
        return list(self._deleted.values())

    def reports(self) -> list[CopyReport]:
        # A model whose source was changed has two; the newer one counts.
        newest = {copy.report.model_id: copy.report for copy in self._copies.values()}
        return list(newest.values())

    async def close(self) -> None:
        """End every attempt; what is complete stays."""
        tasks = [copy.task for copy in self._copies.values() if copy.task]
        tasks += self._deleting.values()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _delete(self, copy: UnwantedCopy) -> None:
        try:
            freed = await asyncio.to_thread(_delete_files, copy, self._cache)
        except OSError as error:
            if copy not in self._undeletable:
                self._undeletable.add(copy)
                log.error("The files of %s cannot be deleted: %s.", copy.name, error.strerror)
            return
        finally:
            del self._deleting[copy]
        if freed is not None:
            self._deleted[copy] = DeletedCopy(name=copy.name, source=copy.source, freed_bytes=freed)
            log.info("The files of %s, which was removed, are deleted: %d bytes.", copy.name, freed)
            self._changed()

    async def _make(self, model: ModelSpec, copy: Copy) -> None:
        try:
            copy.report = await self._run(model, copy)
        except OSError as error:
            copy.report = _failed(model, Cause.FETCH, f"The fetching could not be started: {error.strerror}.")
        finally:
            copy.task = None
        if copy.report.phase is CopyPhase.READY:
            log.info("The files of %s are ready.", model.name)
        else:
            log.error("The files of %s are not ready: %s", model.name, copy.report.detail)
        self._changed()

    async def _run(self, model: ModelSpec, copy: Copy) -> CopyReport:
        """Follow the sources command; its last word is ready or failed, whatever else it said."""
        command = [
            *self._command,
            *("--model-id", str(model.id)),
            *("--model", model.name),
            *("--source", model.source),
            *("--cache", str(self._cache)),
        ]
        process = await start_helper(command)
        try:
            async for line in lines_of(process):
                try:
                    copy.report = msgspec.json.decode(line, type=CopyReport)
                    copy.path = msgspec.json.decode(line, type=_Path).path
                except msgspec.DecodeError:
                    log.warning("The sources command said: %s", line.decode(errors="replace").rstrip())
            exit_code = await process.wait()
        finally:
            await end_helper(process)
        ready = copy.report.phase is CopyPhase.READY and copy.path
        if ready or copy.report.phase is CopyPhase.FAILED:
            return copy.report
        cause = Cause.KILLED if exit_code < 0 else Cause.FETCH
        return _failed(model, cause, f"The fetching ended with exit code {exit_code}.")


def _delete_files(copy: UnwantedCopy, cache: Path) -> int | None:
    # Here, because it takes a second to import, and most agents never need it.
    from inference.sources import SourceError, parse_source
    from inference.sources.prepare import delete_copy

    try:
        return delete_copy(copy.name, parse_source(copy.source), cache)
    except SourceError:
        return 0  # of a form that is not taken any more: nothing here is known by it


def _stale(copy: Copy, key: Key) -> bool:
    """Whether `key` needs a new attempt."""
    if copy.task is not None:
        return False
    if copy.report.phase is CopyPhase.READY:
        return not Path(copy.path).is_dir()
    return key not in copy.waiting


def _failed(model: ModelSpec, cause: Cause, detail: str) -> CopyReport:
    return CopyReport(model_id=model.id, phase=CopyPhase.FAILED, cause=cause, detail=detail)
