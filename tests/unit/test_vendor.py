"""The libraries in `webchat/static/vendor` are exactly those that `vendor.lock` names."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from webchat.vendor import FOLDER, LIBRARIES, LOCK

ROOT = Path(__file__).resolve().parents[2]


def locked() -> list[dict[str, Any]]:
    return json.loads(LOCK.read_text())["libraries"]  # type: ignore[no-any-return]


def test_the_lock_names_the_libraries_that_the_script_copies() -> None:
    assert [(entry["name"], entry["package"], entry["version"]) for entry in locked()] == [
        (library.name, library.package, library.version) for library in LIBRARIES
    ]
    for entry, library in zip(locked(), LIBRARIES, strict=True):
        assert set(entry["files"]) == set(library.files.values()) | {"LICENSE"}
        assert entry["licence"]


def test_every_vendored_file_has_the_sha256_of_the_lock_and_no_other_file_is_there() -> None:
    found = {
        str(path.relative_to(FOLDER)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in FOLDER.rglob("*")
        if path.is_file() and path != LOCK
    }
    expected = {
        f"{entry['name']}-{entry['version']}/{file}": digest
        for entry in locked()
        for file, digest in entry["files"].items()
    }
    assert found == expected


def test_no_vendored_file_is_too_large_for_git() -> None:
    assert all(path.stat().st_size < 900_000 for path in FOLDER.rglob("*"))


def test_the_pages_name_only_vendored_versions_that_are_there() -> None:
    """A page that names an old version would stay without its library."""
    folders = {path.name for path in FOLDER.iterdir() if path.is_dir()}
    pages = [
        page
        for kind in ("*.html", "*.js")
        for app in ("webchat", "platform", "registry", "inference")
        for page in (ROOT / app).rglob(kind)
        if FOLDER not in page.parents
    ]
    assert pages
    for page in pages:
        for part in page.read_text().split("vendor/")[1:]:
            assert part.split("/")[0] in folders, f"{page.relative_to(ROOT)} names vendor/{part[:40]}"
