"""A model folder from elsewhere (a disk, a share) copied into the cache, so that the original may go."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from inference.protocol import Cause
from inference.sources.cache import cause_of, require_space
from inference.sources.check import check_folder
from inference.sources.package import is_wanted
from inference.sources.source import SourceError


def copy_folder(folder: Path, cache: Path, name: str, tell: Callable[[str], None]) -> Path:
    """Copy the model in `folder` to `<cache>/imported/<name>` and return that folder, whole or not at all.

    Weights, tokenizer, configuration and licence are copied, nothing else; links are not followed
    below the folder. Raises SourceError, also when something of that name is there already.
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
        require_space(target.parent, sum(file.stat().st_size for file in files))
        workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
        try:
            for file in files:
                tell(f"copying {file.relative_to(folder)}")
                place = workspace / file.relative_to(folder)
                place.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, place)
            if check_folder(workspace) is None:
                tell("checked")
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
