"""Every code block of the README and the docs, and how a test runs one as it stands there."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from tests.e2e.conftest import ROOT, Roundhouse

BLOCK = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Block:
    page: str
    """The file's name without `.md`."""
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {self.text.partition(chr(10))[0]}"


def blocks(page: str, *languages: str) -> list[Block]:
    """The blocks of a page in their order: of these languages, or all."""
    path = ROOT / "README.md" if page == "README" else ROOT / "docs" / f"{page}.md"
    found = [
        Block(page, language, textwrap.dedent(text)) for _, language, text in BLOCK.findall(path.read_text())
    ]
    return [block for block in found if not languages or block.language in languages]


def block(page: str, part: str) -> Block:
    """The one block of a page that has this text in it."""
    (found,) = (block for block in blocks(page) if part in block.text)
    return found


def every_block() -> list[Block]:
    pages = ["README", *(path.stem for path in sorted((ROOT / "docs").glob("*.md")))]
    return [block for page in pages for block in blocks(page)]


def clone(folder: Path, data: Path) -> Path:
    """Make `folder` look like a clone whose `var/` is this data folder."""
    for entry in ROOT.iterdir():
        if entry.name not in ("var", ".git", ".venv"):
            (folder / entry.name).symlink_to(entry)
    (folder / ".venv").symlink_to(sys.prefix)
    (folder / "var").symlink_to(data)
    return folder


def with_facts_of(roundhouse: Roundhouse, block: Block) -> str:
    """The block's text with this Roundhouse's port and key."""
    facts = roundhouse.credentials
    text = re.sub(r":8000\b", f":{urlsplit(facts['base_url']).port}", block.text)
    return text.replace("YOUR_KEY", facts["api_key"])


def outside_make(environment: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The environment without what a `make` around the tests tells a `make` within them."""
    return {name: value for name, value in environment.items() if not name.startswith(("MAKE", "MFLAGS"))}


def run(
    text: str, folder: Path, environment: Mapping[str, str], *, seconds: float = 120
) -> subprocess.CompletedProcess[str]:
    """Run it in bash, which ends at the first command that fails. It must succeed."""
    done = subprocess.run(
        ["bash", "-ec", text],
        cwd=folder,
        env=outside_make(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr, done.stderr
    return done
