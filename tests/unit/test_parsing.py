"""How deep a body may be nested, however it is written; and what reading a long one costs."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openai_api import limits
from openai_api.endpoints import CHAT
from openai_api.errors import InvalidRequest
from openai_api.parsing import decode
from tests.cost import cpu_seconds

pytestmark = pytest.mark.usefixtures("steady")

MEGABYTE = 1_000_000
TRICKY = [
    "",
    "[",
    "]",
    "[[",
    '"',
    '["',
    '\\"[',
    "\\",
    "\\\\",
    '\\\\"',
    "\n",
    "{}",
    '"]}"',
    "\u00e9[",
    "n",
    "bfnrtu/",
]


def passes(value: Any, **options: Any) -> bool:
    try:
        decode(json.dumps(value, **options).encode(), json.loads)
    except InvalidRequest:
        return False
    return True


def depth_of(value: Any) -> int:
    if isinstance(value, dict):
        return 1 + max(map(depth_of, value.values()), default=0)
    return 1 + max(map(depth_of, value), default=0) if isinstance(value, list) else 0


def wrapped(value: Any, levels: int, choose: random.Random) -> Any:
    """Within so many more levels, beside this and that."""
    for _ in range(levels):
        match choose.randrange(4):
            case 0:
                value = [value]
            case 1:
                value = {choose.choice(TRICKY): value}
            case 2:
                value = [choose.choice(TRICKY), [], value, {}, choose.choice(TRICKY)]
            case _:
                value = {"a": choose.choice(TRICKY), choose.choice(TRICKY) + "b": value, "c": [[]]}
    return value


_texts = st.sampled_from(TRICKY) | st.text(alphabet='[]{}"\\\\\n\tbu/a\u00e9', max_size=8)
_values = st.recursive(
    _texts | st.integers(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(_texts, inner, max_size=4),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(value=_values, seed=st.integers(0, 2**32), ascii_only=st.booleans(), indent=st.sampled_from([None, 1]))
def test_exactly_what_is_too_deep_is_refused(
    value: Any, seed: int, ascii_only: bool, indent: int | None
) -> None:
    more = limits.JSON_DEPTH - depth_of(value)
    choose = random.Random(seed)
    within = wrapped(value, more, choose)
    # Beside the chain something may be deeper than it, near its end.
    levels = depth_of(within)
    assert passes(within, ensure_ascii=ascii_only, indent=indent) is (levels <= limits.JSON_DEPTH)
    beyond = wrapped(within, limits.JSON_DEPTH + 1 - min(levels, limits.JSON_DEPTH), choose)
    assert not passes(beyond, ensure_ascii=ascii_only, indent=indent)


@pytest.mark.parametrize("inside", ["[", '"[', "\\[", '\\"{[', "]", "\n{"])
def test_brackets_in_texts_are_no_nesting(inside: str) -> None:
    assert passes({"a": inside * 1000, inside * 1000: [inside] * 1000})
    deep: Any = inside
    for _ in range(limits.JSON_DEPTH - 1):
        deep = [inside, deep]
    assert passes([deep])
    assert not passes([[deep]])


# -- what it costs


def _chat(text: str) -> bytes:
    return json.dumps({"model": "m", "messages": [{"role": "user", "content": text}]}).encode()


def _beside(value: bytes) -> bytes:
    return _chat("x")[:-1] + b',"other":' + value + b"}"


def _long_list(item: bytes) -> bytes:
    return _beside(b"[" + b",".join([item] * (MEGABYTE // (len(item) + 1))) + b"]")


CODE = json.dumps([{"name": "a", "tags": ["x", "y"], "n": 1}]) + "\n"
LONG = {
    "prose": (_chat("lorem ipsum " * (MEGABYTE // 12)), 4, 8),
    "lines": (_chat("lorem ipsum\n" * (MEGABYTE // 13)), 4, 9),
    "brackets": (_chat("[]{}[[[{{{" * (MEGABYTE // 10)), 6, 13),
    "code": (_chat(CODE * (MEGABYTE // len(json.dumps(CODE)))), 8, 21),
    "lists": (_long_list(b"[]"), 10, 25),
    "objects": (_long_list(b'{"a":[]}'), 25, 25),
    "texts": (_long_list(b'["["]'), 60, 80),
    "nested": (_long_list(b"[" * 60 + b"]" * 60), 100, 100),
}


@pytest.mark.parametrize("kind", LONG)
def test_a_megabyte_is_read_in_milliseconds(kind: str) -> None:
    """The first is what clients send; the last are what somebody might who means harm. Bounds are about
    twice what was seen with a quiet processor; on a slower one, in passes of C over the same bytes."""
    body, milliseconds, passes = LONG[kind]
    one_pass = cpu_seconds(lambda: body.translate(None, b'[]{}"'), tries=10)
    assert cpu_seconds(lambda: CHAT.parse(body), tries=10) < max(milliseconds * 1e-3, passes * one_pass)
