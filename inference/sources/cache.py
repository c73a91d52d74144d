"""The cache of prepared models: one folder per model and key, whole or not there.

    <cache>/models/<name>@<first 16 of key>/          the model, with .roundhouse.json written last
    <cache>/models/.<name>@<...>.lock                 held by the one process that prepares it
    <cache>/models/.<name>@<...>.part/                a download from a hub that was interrupted
    <cache>/models/.<name>@<...>.tmp-<random>/        its work; left over only by a killed process

A folder appears by one rename, so a killed preparation leaves nothing half. A replaced folder is
moved aside first, and processes that mapped its files keep them. Other versions are left alone.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from inference.protocol import Cause
from inference.sources.check import check_folder, missing
from inference.sources.source import SourceError

MANIFEST = ".roundhouse.json"
FORMAT = 1
"""Raised when prepared copies of before must be made again."""


class FileFact(msgspec.Struct, frozen=True, kw_only=True):
    size: int
    modified_ns: int
    sha256: str


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What a prepared copy was made of, and what it should be."""

    format: int
    key: str
    source: str
    sha256: str
    """Of the fetched or given original."""
    files: dict[str, FileFact]
    """By path relative to the folder."""

    @property
    def size_bytes(self) -> int:
        return sum(fact.size for fact in self.files.values())


class Slot:
    """The place of one model under one key."""

    def __init__(self, cache: Path, name: str, key: str) -> None:
        plain = re.sub(r"[^A-Za-z0-9._-]", "-", name).lstrip(".") or "model"
        self.key = key
        self.root = cache / "models"
        self.path = self.root / f"{plain[:100]}@{key[:16]}"
        self.partial = self.root / f".{self.path.name}.part"
        """A download, taken up again when its process was killed. Only the lock's holder touches it."""

    def ready(self, *, full_check: bool = False) -> Manifest | None:
        """The manifest when a whole copy is there, else None. Cheap unless `full_check`.

        A file whose size differs makes the copy unusable; one that was merely touched since is
        hashed. Headers are read in any case.
        """
        manifest = read_manifest(self.path)
        if manifest is None or manifest.format != FORMAT or manifest.key != self.key:
            return None
        if damaged_files(self.path, manifest, full_check=full_check):
            return None
        try:
            return manifest if check_folder(self.path) is None else None
        except SourceError:
            return None

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this slot alone; waits for another process that does."""
        self.root.mkdir(parents=True, exist_ok=True)
        with _lock_file(self.path).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def is_locked(self) -> bool:
        """Somebody prepares this model right now."""
        try:
            with _lock_file(self.path).open("a") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        except FileNotFoundError:
            return False
        return False

    @contextmanager
    def workspace(self) -> Iterator[Path]:
        """A folder beside the slot for work in progress; gone afterwards. Call with the lock held."""
        self._sweep()
        folder = Path(tempfile.mkdtemp(prefix=f".{self.path.name}.tmp-", dir=self.root))
        try:
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def publish(self, made: Path, workspace: Path, *, source: str, sha256: str) -> Manifest:
        """Write the manifest into `made` and make it the slot's copy. Call with the lock held."""
        manifest = write_manifest(made, key=self.key, source=source, sha256=sha256)
        made.chmod(0o755)
        if self.path.exists():
            os.replace(self.path, workspace / "replaced")
        os.replace(made, self.path)
        return manifest

    def delete(self) -> int:
        """Remove the copy, and a download that was interrupted; the bytes of the copy. Call with the lock
        held. Processes that mapped its files keep them."""
        manifest = read_manifest(self.path)
        with self.workspace() as workspace:
            for place, name in ((self.path, "copy"), (self.partial, "download")):
                if place.exists():
                    os.replace(place, workspace / name)
        return manifest.size_bytes if manifest is not None else 0

    def _sweep(self) -> None:
        """Remove what killed preparations left: work of ours, and of others whose lock is free."""
        for folder in self.root.glob(".*.tmp-*"):
            owner = folder.name[1:].rsplit(".tmp-", 1)[0]
            if owner == self.path.name:
                shutil.rmtree(folder, ignore_errors=True)
                continue
            with _lock_file(self.root / owner).open("a") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    continue
                shutil.rmtree(folder, ignore_errors=True)


def write_manifest(folder: Path, *, key: str, source: str, sha256: str) -> Manifest:
    """Hash every file of the folder and keep the digests in it."""
    manifest = Manifest(format=FORMAT, key=key, source=source, sha256=sha256, files=_facts(folder))
    (folder / MANIFEST).write_bytes(msgspec.json.format(msgspec.json.encode(manifest)))
    return manifest


def verify(path: Path) -> list[str]:
    """Hash every file of a prepared copy; the names of those that are missing or differ.

    Raises SourceError(MISSING_FILE) when `path` is no prepared copy.
    """
    manifest = read_manifest(path)
    if manifest is None:
        raise missing("This folder is not a copy prepared by Roundhouse: it has no manifest.")
    return damaged_files(path, manifest, full_check=True)


def read_manifest(path: Path) -> Manifest | None:
    try:
        return msgspec.json.decode((path / MANIFEST).read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return None


def damaged_files(path: Path, manifest: Manifest, *, full_check: bool) -> list[str]:
    """Files that are not as the manifest says; without `full_check` untouched ones are trusted."""
    damaged = []
    for name, fact in manifest.files.items():
        try:
            now = (path / name).stat()
            whole = now.st_size == fact.size
            if whole and (full_check or now.st_mtime_ns != fact.modified_ns):
                whole = sha256_of(path / name) == fact.sha256
        except OSError:
            whole = False
        if not whole:
            damaged.append(name)
    return damaged


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256_of(path: Path, cache: Path) -> str:
    """`sha256_of`, remembered in the cache for as long as the file is not touched."""
    now = path.stat()
    identity = f"{now.st_dev}:{now.st_ino}:{now.st_size}:{now.st_mtime_ns}:{now.st_ctime_ns}"
    place = hashlib.sha256(os.fsencode(path)).hexdigest()[:32]
    note = cache / "digests" / place
    try:
        known, _, digest = note.read_text().partition(" ")
        if known == identity and re.fullmatch(r"[0-9a-f]{64}", digest):
            return digest
    except (OSError, UnicodeDecodeError):
        known = ""
    digest = sha256_of(path)
    note.parent.mkdir(parents=True, exist_ok=True)
    fresh = note.with_name(f"{place}.{os.getpid()}")
    fresh.write_text(f"{identity} {digest}")
    os.replace(fresh, note)
    return digest


def require_space(folder: Path, needed: int) -> None:
    """Raise SourceError(DISK) unless `needed` bytes are free where `folder` is."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            Cause.DISK,
            "Too little disk space for the model: "
            f"{needed / 1e6:.0f} MB are needed in the cache and {free / 1e6:.0f} MB are free.",
        )


def cause_of(error: OSError) -> SourceError:
    """What a failed file operation on the cache means to the operator."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return SourceError(Cause.DISK, "The disk of the model cache became full.")
    reason = os.strerror(error.errno) if error.errno else type(error).__name__
    return SourceError(Cause.DISK, f"The model cache cannot be used: {reason}.")


def _lock_file(path: Path) -> Path:
    return path.with_name(f".{path.name}.lock")


def _facts(folder: Path) -> dict[str, FileFact]:
    facts = {}
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            now = file.stat()
            facts[file.relative_to(folder).as_posix()] = FileFact(
                size=now.st_size, modified_ns=now.st_mtime_ns, sha256=sha256_of(file)
            )
    return facts
