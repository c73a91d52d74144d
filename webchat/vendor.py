"""Copies the pages' JavaScript libraries from npm's tarballs into `static/vendor/<lib>-<version>/`.

    python webchat/vendor.py

Needs `npm` and a registry; running Roundhouse needs neither, for the copies are in git. To change a
version or a file, edit `LIBRARIES` and run it. It also writes `vendor.lock`: name, version, licence and
each file's sha256, which a test compares with the folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).resolve().parent / "static" / "vendor"
LOCK = FOLDER / "vendor.lock"

# A model's answer is highlighted only in a language its fence names; the rest stays plain.
_LANGUAGE_NAMES = (
    "bash c cpp csharp css diff dockerfile go graphql ini java javascript json kotlin lua makefile markdown "
    "nginx perl php plaintext powershell python r ruby rust scala shell sql swift typescript xml yaml"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Library:
    """A library: the package it is published as, and which of its files we serve under which path."""

    name: str
    package: str
    version: str
    files: dict[str, str]

    @property
    def folder(self) -> str:
        return f"{self.name}-{self.version}"


LIBRARIES = (
    Library(
        name="markdown-it",
        package="markdown-it",
        version="15.0.3",
        files={"dist/browser/markdown-it.esm.min.mjs": "markdown-it.esm.min.mjs"},
    ),
    Library(
        name="dompurify",
        package="dompurify",
        version="3.4.18",
        files={"dist/purify.es.mjs": "purify.es.mjs"},
    ),
    Library(
        name="highlight.js",
        # The same release, built for browsers: the main package's modules import CommonJS.
        package="@highlightjs/cdn-assets",
        version="11.12.0",
        files={"es/core.min.js": "core.min.js"}
        | {f"es/languages/{name}.min.js": f"languages/{name}.min.js" for name in _LANGUAGE_NAMES.split()},
    ),
    Library(
        name="uplot",
        package="uplot",
        version="1.6.32",
        files={"dist/uPlot.esm.js": "uPlot.esm.js", "dist/uPlot.min.css": "uPlot.min.css"},
    ),
    Library(
        name="htmx",
        package="htmx.org",
        version="2.0.11",
        files={"dist/htmx.min.js": "htmx.min.js"},
    ),
)


def copy(library: Library, into: Path) -> dict[str, object]:
    """Copy one library's files and return its entry of the lock."""
    with tempfile.TemporaryDirectory(prefix="rh-vendor-") as scratch:
        subprocess.run(
            ["npm", "pack", "--silent", f"{library.package}@{library.version}"],  # noqa: S607
            cwd=scratch,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        (tarball,) = Path(scratch).glob("*.tgz")
        with tarfile.open(tarball) as archive:

            def read(path: str) -> bytes:
                member = archive.extractfile(f"package/{path}")
                if member is None:
                    raise FileNotFoundError(path)
                return member.read()

            licence = str(json.loads(read("package.json"))["license"])
            digests = {}
            for source, target in ({"LICENSE": "LICENSE"} | library.files).items():
                content = read(source)
                path = into / library.folder / target
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
                digests[target] = hashlib.sha256(content).hexdigest()
    return {
        "name": library.name,
        "package": library.package,
        "version": library.version,
        "licence": licence,
        "files": dict(sorted(digests.items())),
    }


def main() -> None:
    if shutil.which("npm") is None:
        sys.exit("npm is not installed: it fetches the libraries' tarballs.")
    with tempfile.TemporaryDirectory(prefix="rh-vendor-") as folder:
        fresh = Path(folder) / "vendor"
        fresh.mkdir()
        entries = [copy(library, fresh) for library in LIBRARIES]
        (fresh / LOCK.name).write_text(json.dumps({"libraries": entries}, indent=2) + "\n")
        shutil.rmtree(FOLDER, ignore_errors=True)
        shutil.copytree(fresh, FOLDER)
    for library in LIBRARIES:
        print(f"{library.folder}: {len(library.files)} files")


if __name__ == "__main__":
    main()
