"""S7: no check of ours is an `assert`, which `python -O` leaves out."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
OURS = ("platform", "registry", "inference", "openai_api", "webchat")


def asserted(source: str) -> list[int]:
    """The lines of what vanishes under `-O`: assertions, and blocks that ask whether it is on."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Assert) or (isinstance(node, ast.Name) and node.id == "__debug__")
    ]


def test_the_lint_finds_them() -> None:
    assert asserted("x = 1\nassert x\nif __debug__:\n    pass") == [2, 3]
    assert asserted("def f(x):\n    if not x:\n        raise ValueError('assert')") == []


def test_nothing_of_ours_asserts() -> None:
    files = [ROOT / "manage.py", *(file for name in OURS for file in (ROOT / name).rglob("*.py"))]
    assert len(files) > 300
    found = {str(file.relative_to(ROOT)): asserted(file.read_text()) for file in files}
    assert {name: lines for name, lines in found.items() if lines} == {}
