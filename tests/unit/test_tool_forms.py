"""Calls of functions in the text of an answer, in each form that models were trained on; and thoughts."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference.engines.base import Tools
from inference.engines.reasoning import Thoughts, begins_in, stops_in, thinks
from inference.engines.tool_forms import HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS, Form, form_of
from inference.engines.tools import CallParser

NAMES = ("get", "get_more")
TOOLS = [{"type": "function", "function": {"name": name}} for name in NAMES]
_GET = '{"name": "get", "arguments": '


def parsed(
    form: Form, text: str, size: int, *, parallel: bool = True
) -> tuple[str, list[tuple[str, str]], list[str]]:
    """Text, calls and ids, fed in parts of this size."""
    parser = CallParser(Tools(functions=TOOLS, parallel=parallel), form)
    fed = [parser.feed(text[at : at + size]) for at in range(0, len(text), size)]
    fed.append(parser.flush())
    pieces = [piece for _, some in fed for piece in some]
    calls: list[tuple[str, str]] = []
    for piece in pieces:
        if piece.name:
            assert (piece.index, bool(piece.id)) == (len(calls), True)
            calls.append((piece.name, ""))
        name, arguments = calls[piece.index]
        assert piece.index == len(calls) - 1
        calls[piece.index] = name, arguments + piece.arguments
    assert parser.calls == len(calls)
    return "".join(shown for shown, _ in fed), calls, [piece.id for piece in pieces if piece.id]


CASES: list[tuple[Form, str, str, list[tuple[str, str]]]] = [
    (HERMES, "Only text, <b>bold</b>.", "Only text, <b>bold</b>.", []),
    (HERMES, "  spaces  kept \n", "  spaces  kept \n", []),
    (HERMES, f"<tool_call>\n{_GET}{{}}}}\n</tool_call>", "", [("get", "{}")]),
    (
        HERMES,
        f'So: <tool_call>{_GET}{{"a": "}}</tool_call>\\"", "b": [1, {{}}]}}}}</tool_call>\n'
        '<tool_call>{ "name" : "get_more" , "arguments" : {"c":{}} }</tool_call>\n',
        "So: ",
        [("get", '{"a": "}</tool_call>\\"", "b": [1, {}]}'), ("get_more", '{"c":{}}')],
    ),
    (HERMES, f"\n\n<tool_call>{_GET}{{}}}}</tool_call> and on", " and on", [("get", "{}")]),
    (HERMES, '<tool_call>{"arguments": {"x": 1}, "name": "get"}</tool_call>', "", [("get", '{"x":1}')]),
    (HERMES, '<tool_call>{"name": "get"}</tool_call>', "", [("get", "{}")]),
    # A last call may lack its mark, or be cut.
    (HERMES, f'<tool_call>{_GET}{{"x": 1}}', "", [("get", '{"x": 1}')]),
    (HERMES, f'<tool_call>{_GET}{{"x": [1', "", [("get", '{"x": [1')]),
    # What is no call stays text.
    (HERMES, "<tool_call>nothing</tool_call> x", "<tool_call>nothing</tool_call> x", []),
    (HERMES, '<tool_call>{"a": 1}</tool_call>', '<tool_call>{"a": 1}</tool_call>', []),
    (
        HERMES,
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        '<tool_call>{"name": "other", "arguments": {}}</tool_call>',
        [],
    ),
    (HERMES, "a <tool_ca", "a <tool_ca", []),
    (HERMES, '<tool_call>\n{"na', '<tool_call>\n{"na', []),
    (LLAMA3, '{"name": "get", "parameters": {"a": 1}}', "", [("get", '{"a": 1}')]),
    (LLAMA3, '<|python_tag|>{"name": "get", "parameters": {}}', "", [("get", "{}")]),
    (
        LLAMA3,
        '{"name": "get", "parameters": {}}; {"name": "get_more", "parameters": {"b": 2}}',
        "",
        [("get", "{}"), ("get_more", '{"b": 2}')],
    ),
    (LLAMA3, '{"json": [1, 2]} {"name": "get"}', '{"json": [1, 2]} {"name": "get"}', []),
    (LLAMA3, 'No. {"name": "get", "parameters": {}}', 'No. {"name": "get", "parameters": {}}', []),
    (LLAMA3, "<|python_tag|>print(1)", "<|python_tag|>print(1)", []),
    (LLAMA3, "<|pyth", "<|pyth", []),
    (
        MISTRAL,
        f'[TOOL_CALLS] [{_GET}{{"a": [1, 2]}}, "id": "x]"}}, {{"name": "get_more", "arguments": {{}}}}]',
        "",
        [("get", '{"a": [1, 2]}'), ("get_more", "{}")],
    ),
    (MISTRAL, f"Well[TOOL_CALLS][{_GET}{{}}}}] then", "Well then", [("get", "{}")]),
    (MISTRAL, "[TOOL_CALLS] none [x]", "[TOOL_CALLS] none [x]", []),
    (
        MISTRAL_ARGS,
        'So [TOOL_CALLS]get[ARGS]{"a": 1}[TOOL_CALLS]get_more[CALL_ID]abc[ARGS]{}',
        "So ",
        [("get", '{"a": 1}'), ("get_more", "{}")],
    ),
    (MISTRAL_ARGS, "[TOOL_CALLS]other[ARGS]{} x", "[TOOL_CALLS]other[ARGS]{} x", []),
    (MISTRAL_ARGS, "[TOOL_CALLS]get", "[TOOL_CALLS]get", []),
]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize(("form", "text", "shown", "calls"), CASES)
def test_calls_are_read_wherever_the_text_is_cut(
    form: Form, text: str, shown: str, calls: list[tuple[str, str]], size: int
) -> None:
    assert parsed(form, text, size)[:2] == (shown, calls)


def test_arguments_come_as_they_are_written_not_at_the_end() -> None:
    parser = CallParser(Tools(functions=TOOLS))
    _, [first] = parser.feed('<tool_call>{"name": "get", "arguments": {"text": "lo')
    assert (first.name, first.arguments) == ("get", '{"text": "lo')
    _, [second] = parser.feed("ng")
    assert (second.name, second.id, second.arguments) == ("", "", "ng")


def test_only_one_call_is_told_where_several_are_not_wanted() -> None:
    text = "".join(f'<tool_call>{_GET}{{"n": {n}}}}}</tool_call>' for n in range(3))
    assert parsed(HERMES, text, 5, parallel=False)[:2] == ("", [("get", '{"n": 0}')])


def test_ids_are_such_as_the_models_template_takes() -> None:
    text = f"[TOOL_CALLS] [{_GET}{{}}}}, {_GET}{{}}}}]"
    ids = parsed(MISTRAL, text, 9)[2]
    assert len(set(ids)) == 2
    assert all(len(one) == 9 and one.isalnum() for one in ids)
    assert parsed(HERMES, f"<tool_call>{_GET}{{}}}}", 9)[2][0].startswith("call_")


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS])
@given(text=st.text(alphabet='<>/[]{}"\\:,;_ abcdeglmnortu\nTOLCARGS|', max_size=80), size=st.integers(1, 9))
def test_any_text_without_calls_comes_back_whole(form: Form, text: str, size: int) -> None:
    shown, calls, _ = parsed(form, text, size)
    assert not calls
    assert shown == text


@pytest.mark.parametrize("form", [HERMES, LLAMA3, MISTRAL, MISTRAL_ARGS])
@given(
    arguments=st.lists(
        st.dictionaries(
            st.text(max_size=5), st.text() | st.integers() | st.lists(st.text(max_size=9)), max_size=3
        ),
        min_size=1,
        max_size=3,
    ),
    size=st.integers(1, 30),
)
def test_what_is_written_in_a_form_is_read_back(
    form: Form, arguments: list[dict[str, Any]], size: int
) -> None:
    if form.between is None:
        arguments = arguments[:1]
    written = [json.dumps(one, ensure_ascii=False) for one in arguments]
    calls = [form.head("get") + one + form.after for one in written]
    text = form.first + (form.between or "").join(calls) + form.last
    assert parsed(form, text, size)[:2] == ("", [("get", one) for one in written])


@pytest.mark.parametrize(
    ("template", "form"),
    [
        ("{{ messages }}", HERMES),
        ("… <tool_call> …", HERMES),
        ("… [TOOL_CALLS] [ …", MISTRAL),
        ("… [TOOL_CALLS] {{ name }}[ARGS] …", MISTRAL_ARGS),
        ("… <|python_tag|> …", LLAMA3),
        ('… {"name": function name, "parameters": dictionary of …', LLAMA3),
    ],
)
def test_a_form_shows_in_the_template(template: str, form: Form) -> None:
    assert form_of(template) is form


def test_a_template_without_a_space_before_the_list_shows_that_too() -> None:
    assert form_of("… [TOOL_CALLS][ …").first == "[TOOL_CALLS]["


# -- thoughts


def thought(text: str, size: int, *, opened: bool) -> tuple[str, str]:
    thoughts = Thoughts(opened=opened)
    fed = [thoughts.feed(text[at : at + size]) for at in range(0, len(text), size)]
    fed.append(thoughts.flush())
    return "".join(one for one, _ in fed), "".join(other for _, other in fed)


@pytest.mark.parametrize("size", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    ("text", "opened", "split"),
    [
        ("\nLet me see.\n</think>\n\nYes. <think>", True, ("Let me see.", "Yes. <think>")),
        ("<think>\nHm < 3 </thin> \n\n x\n</think>\n\n ok ", False, ("Hm < 3 </thin> \n\n x", "ok ")),
        ("<think>\n\n</think>\n\nYes.", False, ("", "Yes.")),
        ("No <think>thoughts</think>", False, ("", "No <think>thoughts</think>")),
        ("  <thick>", False, ("", "  <thick>")),
        ("<thi", False, ("", "<thi")),
        ("never ends </thi", True, ("never ends </thi", "")),
        ("", True, ("", "")),
    ],
)
def test_thoughts_are_told_from_the_answer_wherever_the_text_is_cut(
    text: str, opened: bool, split: tuple[str, str], size: int
) -> None:
    assert thought(text, size, opened=opened) == split


def test_a_template_shows_whether_its_model_thinks_and_a_prompt_whether_it_has_begun() -> None:
    assert thinks("{% if '</think>' in content %}")
    assert not thinks("{{ content }}")
    assert begins_in("<|im_start|>assistant\n<think>\n")
    assert not begins_in("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert stops_in("<think> so far")
    assert not stops_in("<think> so far </think> and")
