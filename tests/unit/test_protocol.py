"""Every field of a request is honoured, or refused by its name; each bound is tested at it and one past."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openai_api import limits
from openai_api.endpoints import CHAT, COMPLETIONS, EMBEDDINGS, RERANK, Endpoint
from openai_api.errors import InvalidRequest
from openai_api.parsing import check_headers
from openai_api.protocol.sampled import IGNORED, NEUTRAL, OWNED
from tests.cost import cpu_seconds

pytestmark = pytest.mark.usefixtures("steady")

USER = {"role": "user", "content": "hi"}
VALID: dict[str, dict[str, Any]] = {
    CHAT.path: {"model": "m", "messages": [USER]},
    COMPLETIONS.path: {"model": "m", "prompt": "hi"},
    EMBEDDINGS.path: {"model": "m", "input": "hi"},
    RERANK.path: {"model": "m", "query": "q", "documents": ["d"]},
}


def forwarded(endpoint: Endpoint, **fields: Any) -> dict[str, Any]:
    """The body for the engine, where it honours whatever is asked for."""
    call = endpoint.parse(json.dumps(VALID[endpoint.path] | fields).encode())
    body: dict[str, Any] = json.loads(call.forwarded(call.needs()))
    return body


def asked(endpoint: Endpoint, **fields: Any) -> frozenset[str]:
    return endpoint.parse(json.dumps(VALID[endpoint.path] | fields).encode()).needs()


def refused(endpoint: Endpoint, fields: dict[str, Any]) -> tuple[str | None, str | None]:
    with pytest.raises(InvalidRequest) as caught:
        endpoint.parse(json.dumps(VALID[endpoint.path] | fields).encode())
    return caught.value.code, caught.value.param


def function(name: str = "f", **more: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, **more}}


def chosen(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def user(*parts: dict[str, Any], role: str = "user") -> dict[str, Any]:
    return {"messages": [{"role": role, "content": list(parts)}]}


def formatted(schema: Any, name: str = "x") -> dict[str, Any]:
    return {
        "response_format": {"type": "json_schema", "json_schema": {"name": name, "schema": schema}},
    }


def nested(levels: int) -> dict[str, Any]:
    schema: dict[str, Any] = {}
    for _ in range(levels - 1):
        schema = {"items": schema}
    return schema


FULL_SCHEMA = limits.SCHEMA_BYTES - len('{"description":""}')
ABOVE, BELOW = "integer_above_max_value", "integer_below_min_value"
HIGH, LOW = "decimal_above_max_value", "decimal_below_min_value"
LONG, MANY = "string_above_max_length", "array_above_max_length"


@pytest.mark.parametrize(
    ("field", "at", "past", "code"),
    [
        ("messages", [USER] * 4096, [USER] * 4097, MANY),
        ("temperature", 2, 2.01, HIGH),
        ("temperature", -0.0, -0.01, LOW),
        ("top_p", 1, 1.01, HIGH),
        ("top_p", 1e-9, 0, LOW),
        ("n", 128, 129, ABOVE),
        ("n", 1, 0, BELOW),
        ("stop", ["x"] * 16, ["x"] * 17, MANY),
        ("stop", "x" * 256, "x" * 257, LONG),
        ("stop", "é" * 128, "é" * 129, LONG),
        ("max_tokens", 2**63 - 1, 2**63, ABOVE),
        ("max_tokens", 1, 0, BELOW),
        ("max_completion_tokens", 1, 0, BELOW),
        ("seed", 2**63 - 1, 2**63, ABOVE),
        ("seed", -(2**63), -(2**63) - 1, BELOW),
        ("frequency_penalty", 2, 2.1, HIGH),
        ("presence_penalty", -2, -2.1, LOW),
        ("logit_bias", {str(i): 1 for i in range(1024)}, {str(i): 1 for i in range(1025)}, None),
        ("logit_bias", {"5": 100}, {"5": 101}, HIGH),
        ("logit_bias", {str(2**31 - 1): 1}, {str(2**31): 1}, "invalid_value"),
        ("top_k", 1_000_000, 1_000_001, ABOVE),
        ("top_k", -1, -2, BELOW),
        ("min_p", 1, 1.1, HIGH),
        ("repetition_penalty", 10, 10.1, HIGH),
        ("repetition_penalty", 0.1, 0, LOW),
        ("length_penalty", 10, 1e308, HIGH),
        ("stop_token_ids", [1] * 1024, [1] * 1025, MANY),
        ("allowed_token_ids", [1], [], "empty_array"),
        ("logprob_token_ids", [1] * 1024, [1] * 1025, MANY),
        ("bad_words", ["x"] * 128, ["x"] * 129, MANY),
        ("bad_words", ["x" * 256], ["x" * 257], LONG),
        ("truncate_prompt_tokens", -1, -2, BELOW),
        ("prompt_logprobs", -1, -2, BELOW),
        ("prompt_logprobs", 20, 21, ABOVE),
        ("documents", [{}] * 1024, [{}] * 1025, MANY),
        ("guided_regex", "x" * 4096, "x" * 4097, LONG),
        ("guided_regex", "(a{128}){128}", "(a{128}){129}", "invalid_value"),
        ("guided_grammar", "x" * 65536, "x" * 65537, LONG),
        ("guided_choice", ["x" * 65536], ["x" * 65536, "y"], LONG),
        ("guided_choice", ["x"], [], "empty_array"),
        ("guided_json", {"description": "x" * FULL_SCHEMA}, {"description": "x" * (FULL_SCHEMA + 1)}, LONG),
        ("guided_json", nested(16), nested(17), "invalid_value"),
        ("guided_json", json.dumps(nested(16)), json.dumps(nested(17)), "invalid_value"),
        ("tools", [function(f"f{i}") for i in range(128)], [function(f"f{i}") for i in range(129)], MANY),
        ("model", "m" * 256, "m" * 257, LONG),
    ],
)
def test_at_each_bound_of_chat_and_one_past_it(field: str, at: Any, past: Any, code: str | None) -> None:
    forwarded(CHAT, **{field: at})
    found = refused(CHAT, {field: past})
    assert found[1] is not None
    assert found[1].split("[")[0] == field
    assert code is None or found[0] == code


def test_at_each_bound_of_the_other_endpoints_and_one_past_it() -> None:
    assert len(forwarded(COMPLETIONS, prompt=["x"] * 128)["prompt"]) == 128
    assert refused(COMPLETIONS, {"prompt": ["x"] * 129}) == (MANY, "prompt")
    assert forwarded(COMPLETIONS, prompt=[2**31 - 1])["prompt"] == [2**31 - 1]
    assert refused(COMPLETIONS, {"prompt": [2**31]}) == (ABOVE, "prompt[0]")
    assert forwarded(COMPLETIONS, logprobs=20)["logprobs"] == 20
    assert refused(COMPLETIONS, {"logprobs": 21}) == (ABOVE, "logprobs")
    assert len(forwarded(EMBEDDINGS, input=["x"] * 2048)["input"]) == 2048
    assert refused(EMBEDDINGS, {"input": ["x"] * 2049}) == (MANY, "input")
    assert len(forwarded(RERANK, documents=["x"] * 2048)["documents"]) == 2048
    assert refused(RERANK, {"documents": ["x"] * 2049}) == (MANY, "documents")


# -- messages

CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        (user({"type": "text"}), "missing_required_parameter", "messages[0].content[0].text"),
        (user({"text": "x"}), "missing_required_parameter", "messages[0].content[0].type"),
        (user({"type": "refusal", "refusal": "no"}), "unsupported_value", "messages[0].content[0].type"),
        (
            user({"type": "refusal"}, role="assistant"),
            "missing_required_parameter",
            "messages[0].content[0].refusal",
        ),
        (
            user({"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}),
            "unsupported_value",
            "messages[0].content[0].type",
        ),
        (
            user({"type": "input_audio", "input_audio": {"data": "AAAA", "format": "wav"}}),
            "unsupported_value",
            "messages[0].content[0].type",
        ),
        (
            user({"type": "text", "text": "x", "image_url": {"url": "data:,x"}}),
            "unsupported_value",
            "messages[0].content[0].type",
        ),
        (user(), "empty_array", "messages[0].content"),
        (
            {"messages": [{"role": "assistant", "content": None}]},
            "missing_required_parameter",
            "messages[0].content",
        ),
        (
            {"messages": [{"role": "user", "content": None, "tool_calls": [CALL]}]},
            "missing_required_parameter",
            "messages[0].content",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [CALL, CALL | {"function": {}}]}]},
            "missing_required_parameter",
            "messages[1].tool_calls[1].function.name",
        ),
        (
            {"messages": [{"role": "tool", "content": "x"}]},
            "missing_required_parameter",
            "messages[0].tool_call_id",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "function_call": {"name": "f"}}]},
            "unsupported_value",
            "messages[0].function_call",
        ),
    ],
)
def test_a_message_that_cannot_be_used_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    assert refused(CHAT, fields) == (code, param)


def test_messages_reach_the_engine_as_it_knows_them() -> None:
    messages: list[dict[str, Any]] = [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": None, "refusal": "I will not."},
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "no"}, {"type": "text", "text": "x"}],
        },
        {"role": "assistant", "content": None, "refusal": None, "annotations": [], "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "42", "odd": 1}]},
        {"role": "assistant", "content": "x", "tool_calls": []},
    ]
    assert forwarded(CHAT, messages=messages)["messages"] == [
        {"role": "developer", "content": "be brief"},
        {"role": "assistant", "content": "I will not."},
        {"role": "assistant", "content": [{"type": "text", "text": "no"}, {"type": "text", "text": "x"}]},
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "42"}]},
        {"role": "assistant", "content": "x", "tool_calls": []},
    ]


# -- tools

TOOLS = [function("f", parameters={"type": "object"}), function("g")]


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"tools": [{"type": "web"}]}, "invalid_value", "tools[0].type"),
        ({"tools": [{}]}, "missing_required_parameter", "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "missing_required_parameter", "tools[0].function"),
        (
            {"tools": [{"type": "function", "function": {}}]},
            "missing_required_parameter",
            "tools[0].function.name",
        ),
        ({"tools": [function("a b")]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [function("a\n")]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [function("a" * 65)]}, "invalid_value", "tools[0].function.name"),
        ({"tools": [function(), function()]}, "invalid_value", "tools[1].function.name"),
        ({"tools": [function(parameters=[])]}, "invalid_type", "tools[0].function.parameters"),
        ({"tools": [function(parameters=nested(17))]}, "invalid_value", "tools[0].function.parameters"),
        ({"tools": [{"type": "custom", "custom": {"name": "c"}}]}, "unsupported_value", "tools[0].type"),
        ({"tool_choice": "required"}, "invalid_value", "tool_choice"),
        ({"tool_choice": "required", "tools": []}, "invalid_value", "tool_choice"),
        ({"tool_choice": chosen("f")}, "invalid_value", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": "any"}, "invalid_value", "tool_choice"),
        ({"tools": TOOLS, "tool_choice": chosen("h")}, "invalid_value", "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {}}},
            "missing_required_parameter",
            "tool_choice.function.name",
        ),
        (
            {"tools": TOOLS, "tool_choice": {"type": "custom", "custom": {"name": "f"}}},
            "invalid_value",
            "tool_choice",
        ),
        (
            {"tools": TOOLS, "tool_choice": chosen("f"), "structured_outputs": {"json": {}}},
            "invalid_value",
            "structured_outputs",
        ),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": [chosen("h")]},
                },
            },
            "invalid_value",
            "tool_choice",
        ),
    ],
)
def test_a_tool_that_cannot_be_used_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    assert refused(CHAT, fields) == (code, param)


def test_tools_that_ask_for_nothing_are_left_out() -> None:
    body = forwarded(CHAT, tools=[], tool_choice=None, parallel_tool_calls=False)
    assert body == VALID[CHAT.path]
    assert forwarded(CHAT, tool_choice="none") == VALID[CHAT.path]


def test_a_choice_among_tools_is_passed_on() -> None:
    assert forwarded(CHAT, tools=TOOLS, tool_choice="none")["tool_choice"] == "none"
    assert forwarded(CHAT, tools=TOOLS, tool_choice=chosen("f"))["tool_choice"] == chosen("f")
    assert forwarded(CHAT, tools=TOOLS, parallel_tool_calls=False)["parallel_tool_calls"] is False
    allowed = {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [chosen("g")]}}
    body = forwarded(CHAT, tools=TOOLS, tool_choice=allowed)
    assert (body["tools"], body["tool_choice"]) == ([function("g")], "required")


# -- the form of the answer


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"response_format": {}}, "missing_required_parameter", "response_format.type"),
        ({"response_format": {"type": "xml"}}, "invalid_value", "response_format.type"),
        (
            {"response_format": {"type": "json_schema"}},
            "missing_required_parameter",
            "response_format.json_schema",
        ),
        (formatted({}, name="a b"), "invalid_value", "response_format.json_schema.name"),
        (formatted(5), "invalid_type", "response_format.json_schema.schema"),
        (formatted({"$ref": "http://x/y"}), "invalid_value", "response_format.json_schema.schema"),
        (formatted({"pattern": "(a{999}){999}"}), "invalid_value", "response_format.json_schema.schema"),
        (formatted({"minItems": 10**9}), "invalid_value", "response_format.json_schema.schema"),
        ({"structured_outputs": {}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"json": {}, "regex": "a"}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"what": 1}}, "invalid_value", "structured_outputs"),
        ({"structured_outputs": {"regex": 5}}, "invalid_type", "structured_outputs.regex"),
        ({"structured_outputs": {"json": "{no"}}, "invalid_value", "structured_outputs.json"),
        ({"structured_outputs": {"regex": "a" * 4097}}, LONG, "structured_outputs.regex"),
        ({"guided_json": {}, "guided_regex": "a"}, "invalid_value", "guided_regex"),
        (formatted({}) | {"guided_json": {}}, "invalid_value", "guided_json"),
    ],
)
def test_a_form_that_cannot_be_used_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    assert refused(CHAT, fields) == (code, param)


@pytest.mark.parametrize(
    ("field", "kind", "value"),
    [
        ("guided_json", "json", {"type": "object"}),
        ("guided_regex", "regex", r"\d{3}"),
        ("guided_choice", "choice", ["a", "b"]),
        ("guided_grammar", "grammar", "root ::= 'a'"),
    ],
)
def test_vllms_older_names_are_put_into_the_newer_one(field: str, kind: str, value: Any) -> None:
    for endpoint in (CHAT, COMPLETIONS):
        also = {f"structured_outputs.{kind}"} if kind in ("regex", "grammar") else set()
        assert asked(endpoint, **{field: value}) == {"structured_outputs", *also}
        assert asked(endpoint, structured_outputs={kind: value}) == {"structured_outputs", *also}
        body = forwarded(endpoint, **{field: value})
        assert body["structured_outputs"] == {kind: value}
        assert field not in body


def test_a_schema_of_a_usual_client_passes() -> None:
    schema = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "type": "object",
        "properties": {
            "minLength": {"type": "string", "maxLength": 20, "pattern": "^[a-z]{2,9}$"},
            "pattern": {"$ref": "#/$defs/p"},
        },
        "$defs": {"p": {"type": "array", "items": {"type": "integer"}, "maxItems": 5}},
    }
    assert forwarded(CHAT, **formatted(schema))["response_format"] == formatted(schema)["response_format"]


# -- fields that only together make no sense, and those that go nowhere


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"best_of": 2}, "unsupported_value", "best_of"),
        ({"n": 2, "best_of": 3}, "unsupported_value", "best_of"),
        ({"min_tokens": 5, "max_tokens": 4}, "invalid_value", "min_tokens"),
        ({"min_tokens": 5, "max_tokens": 9, "max_completion_tokens": 4}, "invalid_value", "min_tokens"),
        ({"prompt_logprobs": 1, "stream": True}, "invalid_value", "prompt_logprobs"),
        (
            {"continue_final_message": True, "add_generation_prompt": True},
            "invalid_value",
            "continue_final_message",
        ),
        ({"chat_template": "{{ x }}"}, "unsupported_value", "chat_template"),
        ({"chat_template_kwargs": {"a": [1]}}, "invalid_type", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "invalid_value", "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": False}}, "invalid_value", "chat_template_kwargs"),
        ({"logit_bias": {"word": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "invalid_value", "logit_bias"),
        ({"logit_bias": {"٣": 1}}, "invalid_value", "logit_bias"),
        ({"echo": True}, "unsupported_value", "echo"),
        ({"reasoning_effort": "huge"}, "invalid_value", "reasoning_effort"),
        ({"truncation_side": "up"}, "invalid_value", "truncation_side"),
    ],
)
def test_a_field_that_makes_no_sense_is_named(fields: dict[str, Any], code: str, param: str) -> None:
    assert refused(CHAT, fields) == (code, param)


def test_a_completion_of_sixteen_tokens_cannot_have_at_least_seventeen() -> None:
    assert forwarded(COMPLETIONS, min_tokens=16)["min_tokens"] == 16
    assert refused(COMPLETIONS, {"min_tokens": 17}) == ("invalid_value", "min_tokens")


def test_best_of_no_more_than_n_asks_for_nothing() -> None:
    body = forwarded(COMPLETIONS, n=3, best_of=3)
    assert body["n"] == 3
    assert "best_of" not in body


def test_several_answers_at_temperature_zero_are_greedy_ones() -> None:
    for endpoint in (CHAT, COMPLETIONS):
        body = forwarded(endpoint, n=2, temperature=0, top_k=50)
        assert (body["n"], body["temperature"], body["top_k"]) == (2, 1.0, 1)
        one = forwarded(endpoint, n=1, temperature=0)
        assert one["temperature"] == 0
        assert "top_k" not in one
        assert forwarded(endpoint, n=2, temperature=0, use_beam_search=True)["temperature"] == 0


def test_no_field_of_the_gateways_own_and_none_without_meaning_reaches_an_engine() -> None:
    fields: dict[str, Any] = {
        name: {"a": 1} for name in OWNED | IGNORED | {"no_such_field"} if "." not in name
    }
    options = {name.partition(".")[2]: True for name in IGNORED if "." in name}
    body = forwarded(CHAT, stream=True, stream_options=options, **fields)
    assert body["stream_options"] == {"include_usage": True, "continuous_usage_stats": True}
    assert set(body) == {"model", "messages", "stream", "stream_options"}
    assert not set(NEUTRAL) & (OWNED | IGNORED)


@pytest.mark.parametrize("endpoint", [CHAT, COMPLETIONS, EMBEDDINGS, RERANK], ids=lambda one: one.path)
def test_null_is_not_given_for_every_field(endpoint: Endpoint) -> None:
    fields = {name: None for name in endpoint.request.__struct_fields__ if name not in VALID[endpoint.path]}
    assert asked(endpoint, **fields) == frozenset()
    assert forwarded(endpoint, **fields) == forwarded(endpoint)


def test_what_would_change_an_embedding_or_a_ranking_is_asked_for_by_name() -> None:
    neutral = {"embed_dtype": "float32", "endianness": "little", "add_special_tokens": True, "messages": []}
    assert asked(EMBEDDINGS, **neutral) == frozenset()
    changed = {"embed_dtype": "float16", "endianness": "big", "add_special_tokens": False, "dimensions": 5}
    assert asked(EMBEDDINGS, **changed) == set(changed)
    assert asked(RERANK, max_chunks_per_doc=5, rank_fields=["title"]) == {"max_chunks_per_doc", "rank_fields"}
    assert asked(RERANK, max_tokens_per_doc=5) == {"max_tokens_per_doc"}
    assert forwarded(RERANK, max_tokens_per_doc=5)["max_tokens_per_doc"] == 5


# -- headers


@pytest.mark.parametrize("told", [b"application/json", b"Application/JSON; charset=utf-8", b""])
def test_json_by_any_of_its_names_is_read(told: bytes) -> None:
    check_headers({b"content-type": told, b"content-encoding": b"identity"})
    check_headers({})


@pytest.mark.parametrize(
    ("name", "value", "code"),
    [
        (b"content-type", b"text/plain", "unsupported_content_type"),
        (b"content-type", b"application/x-www-form-urlencoded", "unsupported_content_type"),
        (b"content-type", b"application/jsonp", "unsupported_content_type"),
        (b"content-encoding", b"gzip", "unsupported_content_encoding"),
        (b"content-encoding", b"identity, gzip", "unsupported_content_encoding"),
        (b"content-encoding", b"zstd", "unsupported_content_encoding"),
    ],
)
def test_a_body_of_another_kind_is_refused(name: bytes, value: bytes, code: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_headers({name: value})
    assert caught.value.code == code


# -- whatever is sent

_DEEP: Any = 1
for _ in range(40):
    _DEEP = [_DEEP]
ODD = ["NaN", "Infinity", "1e308", "-1e308", "1e999", "-0", "-0.0", str(2**63), str(-(2**63) - 1), "1" * 400]
ODD += [
    '"\\ud800"',
    '"\\u0000"',
    '"\\ud83d\\ude80"',
    "[" * 1000 + "]" * 1000,
    '{"a":' * 1000 + "1" + "}" * 1000,
]
ODD += [
    "null",
    "true",
    "[]",
    "{}",
    '""',
    "[null]",
    "[[]]",
    '{"":null}',
    '{"type":"function"}',
    '[{"type":1}]',
]
ODD += [json.dumps(_DEEP), '"' + "a{9}" * 2000 + '"', '["","\\u202e"]', '{"$ref":"file:///etc/passwd"}']
EVERY_FIELD = [
    (endpoint, name)
    for endpoint in (CHAT, COMPLETIONS, EMBEDDINGS, RERANK)
    for name in endpoint.request.__struct_fields__
]


def judged(endpoint: Endpoint, body: bytes) -> None:
    """Accepted or refused as a client is told it, in less than 50 ms of our time."""
    problem: list[InvalidRequest] = []

    def once() -> None:
        try:
            call = endpoint.parse(body)
            call.forwarded(call.needs())
        except InvalidRequest as error:
            problem.append(error)

    assert cpu_seconds(once, enough=0.05) < 0.05
    assert all(len(f"{one}{one.param}") < 1200 for one in problem)


@pytest.mark.parametrize(("endpoint", "field"), EVERY_FIELD, ids=lambda one: getattr(one, "path", one))
def test_odd_values_of_a_field_are_accepted_or_refused(endpoint: Endpoint, field: str) -> None:
    others = {name: value for name, value in VALID[endpoint.path].items() if name != field}
    head = json.dumps(others)[:-1].encode()
    for odd in ODD:
        for value in (odd, f"[{odd}]", f'{{"type":{odd}}}', f'{{"type":"function","function":{odd}}}'):
            judged(endpoint, head + (b"," if others else b"") + f'"{field}":{value}}}'.encode())


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.text(max_size=5)
            | st.sampled_from(["type", "function", "name", "json", "content", "role", "$ref"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(which=st.sampled_from(EVERY_FIELD), value=_json, also=_json, second=st.sampled_from(EVERY_FIELD))
def test_any_json_in_any_field_is_accepted_or_refused(
    which: tuple[Endpoint, str], value: Any, also: Any, second: tuple[Endpoint, str]
) -> None:
    endpoint, field = which
    body = VALID[endpoint.path] | {second[1]: also, field: value}
    judged(endpoint, json.dumps(body).encode())


def test_a_plain_request_is_read_in_60_microseconds() -> None:
    messages = [{"role": "system", "content": "be kind"}, USER]
    body = msgspec.json.encode({"model": "m", "messages": messages, "stream": True, "temperature": 0.7})

    def once() -> None:
        call = CHAT.parse(body)
        call.forwarded(call.needs())

    assert cpu_seconds(once, tries=20, times=200) < 60e-6
