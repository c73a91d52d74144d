"""vLLM's answers as clients read them; the bytes were recorded from vLLM 0.32."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from inference.errors import WorkerRefused
from openai_api.counting import prompt_tokens_in
from openai_api.dialects import Dialect, dialect_of, field_meant, for_model

CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"


def dialect(asked: str = CHAT, model: str | None = "org/route", samples: int = 1) -> Dialect:
    found = dialect_of("vllm", asked, model, samples)
    assert found is not None
    return found


def whole(answer: dict[str, Any], asked: str = CHAT) -> dict[str, Any]:
    told: dict[str, Any] = json.loads(dialect(asked).whole(json.dumps(answer).encode()))
    return told


def event(chunk: dict[str, Any], speaking: Dialect) -> tuple[dict[str, Any], bytes]:
    told = speaking.event(b"data: " + json.dumps(chunk, separators=(",", ":")).encode())
    assert told.startswith(b"data: {")
    return json.loads(told[6:]), told


def message(**said: Any) -> dict[str, Any]:
    return {
        **{"role": "assistant", "content": "Paris.", "refusal": None, "annotations": None, "audio": None},
        **{"function_call": None, "reasoning": None},
        **said,
    }


def answer(**said: Any) -> dict[str, Any]:
    choice = {
        **{"index": 0, "message": message(**said), "logprobs": None, "finish_reason": "stop"},
        **{"stop_reason": None, "token_ids": None, "routed_experts": None},
    }
    return {
        **{"id": "chatcmpl-req_1", "object": "chat.completion", "created": 1, "model": "served"},
        "choices": [choice],
        **{"service_tier": None, "system_fingerprint": "vllm-0.32.0"},
        "usage": {
            **{"prompt_tokens": 37, "total_tokens": 45, "completion_tokens": 8},
            "prompt_tokens_details": {
                "cached_tokens": 16,
                "created_cache_tokens": 0,
                "multimodal_tokens": None,
            },
            "completion_tokens_details": None,
        },
        **{"prompt_logprobs": None, "prompt_token_ids": None, "kv_transfer_params": None, "metrics": None},
    }


def chunk(index: int, delta: dict[str, Any], prompt: int, completion: int, **more: Any) -> dict[str, Any]:
    choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": None, "token_ids": None}
    return {
        **{"id": "chatcmpl-req_1", "object": "chat.completion.chunk", "created": 1, "model": "served"},
        "choices": [choice | more],
        "usage": {
            **{"prompt_tokens": prompt, "total_tokens": prompt + completion},
            **{"completion_tokens": completion, "completion_tokens_details": None},
        },
    }


def test_other_engines_and_paths_speak_as_clients_expect() -> None:
    assert dialect_of("transformers", CHAT) is None
    assert dialect_of("vllm", "/tokenize") is None


def test_a_whole_answer_has_exactly_the_keys_of_ours() -> None:
    told = whole(answer())
    assert list(told) == [
        *("id", "object", "created", "model", "system_fingerprint", "choices", "usage"),
    ]
    assert told["model"] == "org/route"
    assert told["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "Paris.", "refusal": None, "annotations": []},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert told["usage"] == {
        **{"prompt_tokens": 37, "completion_tokens": 8, "total_tokens": 45},
        "prompt_tokens_details": {"cached_tokens": 16, "audio_tokens": 0},
        "completion_tokens_details": {
            **{"reasoning_tokens": 0, "audio_tokens": 0},
            **{"accepted_prediction_tokens": 0, "rejected_prediction_tokens": 0},
        },
    }


def test_without_a_name_the_engines_own_stays() -> None:
    told = json.loads(dialect(model=None).whole(json.dumps(answer()).encode()))
    assert told["model"] == "served"


def test_tool_calls_have_our_ids_and_leave_the_content_null() -> None:
    call = {
        "id": "chatcmpl-tool-8af9",
        "type": "function",
        "function": {"name": "f", "arguments": "{}"},
    }
    told = whole(answer(content="", tool_calls=[call]))["choices"][0]["message"]
    assert told["content"] is None
    assert told["tool_calls"] == [call | {"id": "call_8af9"}]
    assert "tool_calls" not in whole(answer(tool_calls=[]))["choices"][0]["message"]


def test_reasoning_is_told_under_both_names() -> None:
    told = whole(answer(reasoning="Hm."))["choices"][0]["message"]
    assert told["reasoning"] == told["reasoning_content"] == "Hm."
    told, _ = event(chunk(0, {"reasoning": "Hm."}, 3, 1), dialect())
    assert told["choices"][0]["delta"] == {"reasoning": "Hm.", "reasoning_content": "Hm."}


def test_a_chunk_ends_with_the_usage_as_the_gateway_cuts_it_off() -> None:
    told, sent = event(chunk(0, {"content": "Par"}, 37, 1), dialect())
    assert prompt_tokens_in(sent) == 37
    assert told["choices"] == [
        {"index": 0, "delta": {"content": "Par"}, "logprobs": None, "finish_reason": None}
    ]
    last = chunk(0, {}, 37, 8) | {"choices": [], "system_fingerprint": "vllm"}
    assert b'"choices":[],"usage":{' in event(last, dialect())[1]


def test_the_first_chunk_names_the_role_and_refuses_nothing() -> None:
    begun = {"role": "assistant", "content": "", "reasoning": None, "tool_calls": None}
    told, _ = event(chunk(0, begun, 37, 0), dialect())
    delta = told["choices"][0]["delta"]
    assert list(delta.items()) == [("role", "assistant"), ("content", ""), ("refusal", None)]


def test_a_streamed_call_begins_with_empty_arguments_and_goes_on_as_it_is() -> None:
    speaking = dialect()
    begun = {"id": "chatcmpl-tool-1", "type": "function", "index": 0, "function": {"name": "f"}}
    told, _ = event(chunk(0, {"content": None, "tool_calls": [begun]}, 3, 1), speaking)
    assert told["choices"][0]["delta"] == {
        "tool_calls": [begun | {"id": "call_1", "function": {"name": "f", "arguments": ""}}]
    }
    more = {"index": 0, "function": {"arguments": "{}"}}
    told, _ = event(chunk(0, {"content": None, "tool_calls": [more]}, 3, 2), speaking)
    assert told["choices"][0]["delta"] == {"tool_calls": [more]}


def test_what_the_choices_of_a_stream_have_cost_is_summed() -> None:
    speaking = dialect(samples=2)
    event(chunk(0, {"content": "a"}, 37, 5), speaking)
    told, _ = event(chunk(1, {"content": "b"}, 37, 2), speaking)
    assert (told["usage"]["prompt_tokens"], told["usage"]["completion_tokens"]) == (37, 7)


def test_every_prompt_of_a_stream_counts_once_from_its_first_token_on() -> None:
    speaking = dialect(TEXT, samples=2)
    seen = []
    for index, prompt in ((0, 37), (1, 37), (0, 37), (4, 5), (2, 11), (3, 11)):
        told, _ = event(chunk(index, {}, prompt, 1), speaking)
        seen.append(told["usage"]["prompt_tokens"])
    assert seen == [37, 37, 37, 42, 53, 53]


def test_an_error_is_known_by_its_first_key() -> None:
    _, sent = event({"object": "error", "error": {"message": "x", "code": 500}}, dialect())
    assert sent.startswith(b'data: {"error"')


def test_completions_keep_their_text_and_what_was_asked_for() -> None:
    choice = {
        **{"index": 0, "text": " Paris", "logprobs": None, "finish_reason": "length"},
        **{"stop_reason": None, "token_ids": [7042], "prompt_token_ids": [504], "prompt_logprobs": None},
    }
    told = whole({"id": "cmpl-1", "model": "served", "choices": [choice], "usage": None}, TEXT)
    assert told["choices"] == [
        {
            **{"index": 0, "text": " Paris", "logprobs": None, "finish_reason": "length"},
            **{"token_ids": [7042], "prompt_token_ids": [504]},
        }
    ]


@pytest.mark.parametrize("sent", [b"", b"[]", b"{", b"null"])
def test_what_is_no_object_is_told(sent: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        dialect().whole(sent)
    with pytest.raises(msgspec.DecodeError):
        dialect().event(b"data: " + sent)


def refusal(message: str, param: str | None) -> WorkerRefused:
    return WorkerRefused(
        400, msgspec.json.encode({"error": {"message": message, "param": param, "code": 400}})
    )


@pytest.mark.parametrize(
    ("message", "param", "chat", "text"),
    [
        ("This model's maximum context length is 8 tokens.", "input_tokens", "messages", "prompt"),
        ("This model's maximum context length is 8 tokens.", "input_text", "messages", "prompt"),
        ("Token id 99 is out of vocabulary", None, "messages", "prompt"),
        ("temperature must be non-negative", "temperature", "temperature", "temperature"),
        ("something else", None, None, None),
    ],
)
def test_a_refusal_names_the_clients_field(
    message: str, param: str | None, chat: str | None, text: str | None
) -> None:
    assert field_meant(refusal(message, param), "/v1/chat/completions") == chat
    assert field_meant(refusal(message, param), "/v1/completions") == text


def test_a_request_for_another_model_is_otherwise_the_same() -> None:
    said = b'{"role":"user","content":"a \\"model\\""}'
    body = b'{"model":"org/base:sql","messages":[' + said + b'],"seed":12345678901234567}'
    told = for_model(body, "lora:sql")
    assert msgspec.json.decode(told) == msgspec.json.decode(body) | {"model": "lora:sql"}
    assert told.startswith(b'{"model":"lora:sql",')
