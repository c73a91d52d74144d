"""What a program does with Anthropic's client; run by test_others.py. It waits on its standard input before
it asks for a model that has no worker yet. With the argument `real` it only asks a question and prints
the answers."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import anthropic

MODEL = os.environ["CHAT_MODEL"]
WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather of a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}


def asked(text: str) -> list[Any]:
    return [{"role": "user", "content": text}]


def text_of(message: anthropic.types.Message) -> str:
    return "".join(block.text for block in message.content if block.type == "text")


def invoke(client: anthropic.Anthropic) -> str:
    answer = client.messages.create(model=MODEL, max_tokens=100, messages=asked("!tokens 5"))
    assert answer.usage.output_tokens == 5
    assert answer.stop_reason == "end_turn"
    cut = client.messages.create(model=MODEL, max_tokens=3, messages=asked("!tokens 5"), system="Be brief.")
    assert (cut.stop_reason, cut.usage.output_tokens) == ("max_tokens", 3)
    return text_of(answer)


def stream(client: anthropic.Anthropic) -> str:
    with client.messages.stream(model=MODEL, max_tokens=100, messages=asked("!tokens 5")) as pieces:
        text = "".join(pieces.text_stream)
        final = pieces.get_final_message()
    assert final.usage.output_tokens == 5
    assert text_of(final) == text
    return text


async def batch() -> None:
    async with anthropic.AsyncAnthropic() as client:
        answers = await asyncio.gather(
            *(
                client.messages.create(model=MODEL, max_tokens=100, messages=asked(f"!tokens {count}"))
                for count in range(1, 21)
            )
        )
    assert [answer.usage.output_tokens for answer in answers] == list(range(1, 21))


def tools(client: anthropic.Anthropic) -> None:
    question = asked("What is the weather in 'Kyoto 京都'?")
    offered: Any = {"model": MODEL, "max_tokens": 100, "tools": [WEATHER]}
    answer = client.messages.create(messages=question, **offered)
    with client.messages.stream(messages=question, **offered) as pieces:
        streamed = pieces.get_final_message()
    for one in (answer, streamed):
        assert one.stop_reason == "tool_use"
        [call] = [block for block in one.content if block.type == "tool_use"]
        assert (call.name, call.input) == ("get_weather", {"city": "Kyoto 京都"})
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "It rains."}
    history = [
        *question,
        {"role": "assistant", "content": streamed.content},
        {"role": "user", "content": [result]},
    ]
    after = client.messages.create(messages=history, **offered)
    assert after.stop_reason == "end_turn"
    assert text_of(after)
    forced = client.messages.create(messages=asked("Hello"), tool_choice={"type": "any"}, **offered)
    assert forced.stop_reason == "tool_use"


def count_tokens(client: anthropic.Anthropic) -> None:
    question = asked("How many words are these?")
    counted = client.messages.count_tokens(model=MODEL, messages=question)
    answer = client.messages.create(model=MODEL, max_tokens=1, messages=question)
    assert counted.input_tokens == answer.usage.input_tokens == 5


def refused(client: anthropic.Anthropic) -> None:
    kind = None
    try:
        client.messages.create(model="nowhere", max_tokens=1, messages=asked("Hello"))
    except anthropic.NotFoundError as error:
        kind = error.body["error"]["type"]
    assert kind == "not_found_error"


def retried() -> None:
    """503 at first; the client comes back by itself until a worker is there."""
    client = anthropic.Anthropic(max_retries=10)
    answer = client.messages.create(
        model=os.environ["LATER_MODEL"], max_tokens=100, messages=asked("!tokens 3")
    )
    assert answer.usage.output_tokens == 3


def real() -> None:
    client = anthropic.Anthropic(max_retries=0)
    question = asked("What is the capital of Japan?")
    # The newest client has no argument of that name; the API does.
    greedy: Any = {"model": MODEL, "max_tokens": 40, "extra_body": {"temperature": 0}}
    print(text_of(client.messages.create(messages=question, **greedy)))
    with client.messages.stream(messages=question, **greedy) as pieces:
        print("".join(pieces.text_stream))


def main() -> None:
    client = anthropic.Anthropic(max_retries=0)
    assert invoke(client) == stream(client)
    asyncio.run(batch())
    tools(client)
    count_tokens(client)
    refused(client)
    print(anthropic.__version__, flush=True)
    sys.stdin.readline()
    retried()


real() if sys.argv[1:] == ["real"] else main()
