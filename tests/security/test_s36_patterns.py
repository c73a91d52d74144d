"""S36: no pattern of ours can be made to take long, whatever it is given."""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest

from tests.cost import cpu_seconds

pytestmark = pytest.mark.usefixtures("steady")

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("platform/config", "openai_api", "inference", "webchat", "registry")
USES = frozenset({"match", "fullmatch", "search", "sub", "subn", "split", "findall", "finditer"})
WITHIN = USES - {"match", "fullmatch"}
"""These try every place of a text."""
WORST = [
    *("a", " ", "0", "/", "\\", '"', "{", "`", "<", ".", "-", "\n", ",", "ab ", "$.", "key:", '\\"', "a/b"),
    *(
        "a.",
        "a-",
        ".a",
        "-a",
        "a+",
        "0.",
        "a:",
        "://",
        "a@",
        "/a/",
        "_a",
        "a_",
        "[0]",
        "\t",
        "\x00",
        "é",
        "<a:",
    ),
    *(
        "(0",
        "()",
        "{}",
        "{}{",
        '"a",',
        "Using cached (1",
        "LICENSE-",
        "tools[0",
        "sk-",
        "A",
        "0-",
        "a\n",
        "%",
    ),
]
OUR_OWN_TEXT = {
    # Built around the name of an exception class, and searched for in the engine's last words.
    ("inference/engines/vllm/endings.py", "search"): r"\b_*OutOfMemoryError\b",
    # Of a model's own control tokens, looked for in what clients write.
    ("inference/engines/transformers/lark.py", "compile"): r"(<\|im_start\|>|<tool_call>)",
    ("inference/engines/transformers/prompt.py", "compile"): r"<\|im_start\|>|<tool_call>",
}
"""Patterns that are made while they run: an example of each."""


@dataclass(frozen=True)
class Found:
    where: str
    pattern: str | bytes
    flags: int
    ways: tuple[str, ...]


@cache
def sources() -> dict[str, str]:
    files = [file for folder in SOURCES for file in sorted((ROOT / folder).rglob("*.py"))]
    return {str(file.relative_to(ROOT)): file.read_text() for file in files}


@cache
def found() -> list[Found]:
    """Every pattern in our sources, with the ways in which it is used."""
    return list(_found())


def _found() -> Iterator[Found]:
    everything = "\n".join(sources().values())
    for path, text in sources().items():
        if "import re" not in text:
            continue
        tree = ast.parse(text)
        named = {
            id(node.value): target.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Assign)
            for target in node.targets
            if isinstance(target, ast.Name)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "re"):
                continue
            use = node.func.attr
            where = f"{path}:{node.lineno}"
            flags = sum(value(path, word.value) for word in node.keywords if word.arg == "flags")
            if use == "compile":
                flags |= value(path, node.args[1]) if len(node.args) > 1 else 0
                name = named.get(id(node))
                within = name is None or re.search(rf"\b{name}\.({'|'.join(WITHIN)})\b", everything)
                # What is never searched for need not be quick to search for.
                ways = ("fullmatch", "search") if within else ("fullmatch",)
            elif use in USES:
                ways = ("search",) if use in WITHIN else ("fullmatch",)
            else:
                continue
            example = OUR_OWN_TEXT.get((path, use))
            pattern = example if example is not None else value(path, node.args[0])
            yield Found(where, pattern, flags, ways)


def value(path: str, expression: ast.expr) -> Any:
    """What an expression of a module's means there."""
    try:
        return ast.literal_eval(expression)
    except ValueError:
        name = path.removeprefix("platform/").removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        module = importlib.import_module(name)
        return eval(compile(ast.Expression(expression), path, "eval"), dict(vars(module)))


def test_every_package_of_ours_is_looked_at() -> None:
    places = {one.where.partition(":")[0] for one in found()}
    assert len(places) > 20
    for part in ("inference/engines", "inference/sources", "inference/agent", "registry", "webchat"):
        assert any(place.startswith(part) for place in places), part
    assert {"openai_api/parsing.py", "inference/fleet.py", "registry/keys.py"} <= places


def test_no_pattern_takes_long_over_100_kb() -> None:
    for one in found():
        pattern = re.compile(one.pattern, one.flags)
        for unit in WORST:
            text: Any = (unit * 100_000)[:100_000] + "!"
            if isinstance(one.pattern, bytes):
                text = text.encode()
            for way in one.ways:
                took = cpu_seconds(partial(getattr(pattern, way), text), enough=0.1)
                assert took < 0.1, (one.where, one.pattern, unit, way)


def test_no_pattern_comes_from_outside() -> None:
    """Whoever may write a pattern may write one that takes for ever: none is compiled from a request."""
    for path, text in sources().items():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and node.module == "re":
                raise AssertionError(f"{path}: import re as a whole, so that its uses are found")
        assert "import regex" not in text, path
