"""A model folder from elsewhere (a disk, a share) copied into the cache, so that the original may go."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from inference.protocol import Cause, CopyPhase, Progress
from inference.sources.cache import cause_of, require_space, write_manifest
from inference.sources.check import check_folder
from inference.sources.package import is_wanted
from inference.sources.progress import Reporter
from inference.sources.source import SourceError

_CHUNK = 4 * 1024 * 1024


def copy_folder(folder: Path, cache: Path, name: str, tell: Callable[[Progress], None]) -> Path:
    """Copy the model in `folder` to `<cache>/imported/<name>` and return that folder, whole or not at all.

    Weights, tokenizer, configuration and licence are copied, nothing else; links are not followed
    below the folder. Their digests are kept beside them, for `cache.verify`. Tells at most five times a
    second how far it is. Raises SourceError, also when something of that name is there already.
    """
    check_folder(folder)
    target = cache / "imported" / re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".")
    if target.exists():
        raise SourceError(
            Cause.BAD_ARGUMENT, f"{target} exists already; remove it, or add that folder without --copy."
        )
    files = [
        file
        for file in sorted(folder.rglob("*"))
        if file.is_file()
        and not _is_linked(file, folder)
        and is_wanted(PurePosixPath(file.relative_to(folder)).as_posix())
    ]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        total = sum(file.stat().st_size for file in files)
        require_space(target.parent, total)
        reporter = Reporter(lambda report: tell(report.progress) if report.progress else None, 0)
        workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            done = 0
            for number, file in enumerate(files):
                place = workspace / file.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                with file.open("rb") as original, place.open("wb") as copy:
                    while chunk := original.read(_CHUNK):
                        copy.write(chunk)
                        done += len(chunk)
                        reporter.progress(
                            CopyPhase.FETCHING, "copy", done, total, files_done=number, files_total=len(files)
                        )
            reporter.progress(CopyPhase.FETCHING, "checksum")
            write_manifest(workspace, key="", source=str(folder), sha256="")
            check_folder(workspace)
            workspace.chmod(0o755)
            os.replace(workspace, target)
        finally:
            shutil.rmtree(workspace, ignore_errors=True)
    except OSError as error:
        raise cause_of(error) from error
    return target


def _is_linked(file: Path, folder: Path) -> bool:
    """A link to a file is how the hub's own cache keeps files; a link to a folder leads elsewhere."""
    parents = file.relative_to(folder).parents
    return any((folder / parent).is_symlink() for parent in parents if parent != Path())
