"""What a program does with openai-python, written for 2.x and 3.x alike; run by test_openai.py.

It waits on its standard input before it asks for a model that has no worker yet.
"""

from __future__ import annotations

import asyncio
import os
import sys

import openai

MODEL = os.environ["CHAT_MODEL"]


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def invoke(client: openai.OpenAI) -> str:
    answer = client.chat.completions.create(model=MODEL, messages=asked("!tokens 5"))
    assert answer.usage.completion_tokens == 5
    assert answer.choices[0].finish_reason == "stop"
    return answer.choices[0].message.content


def stream(client: openai.OpenAI) -> str:
    chunks = list(
        client.chat.completions.create(
            model=MODEL, messages=asked("!tokens 5"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[-1].usage.completion_tokens == 5
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


async def batch() -> None:
    async with openai.AsyncOpenAI() as client:
        answers = await asyncio.gather(
            *(
                client.chat.completions.create(model=MODEL, messages=asked(f"!tokens {count}"))
                for count in range(1, 21)
            )
        )
    assert [answer.usage.completion_tokens for answer in answers] == list(range(1, 21))


def embed(client: openai.OpenAI) -> None:
    found = client.embeddings.create(model=os.environ["EMBEDDING_MODEL"], input=["a train", "rails"])
    assert [len(one.embedding) for one in found.data] == [8, 8]


def refused(client: openai.OpenAI) -> None:
    code = None
    try:
        client.chat.completions.create(model="nowhere", messages=asked("Hello"))
    except openai.NotFoundError as error:
        code = error.code
    assert code == "model_not_found"


def retried() -> None:
    """503 at first; the client comes back by itself until a worker is there."""
    client = openai.OpenAI(max_retries=10)
    answer = client.chat.completions.create(model=os.environ["LATER_MODEL"], messages=asked("!tokens 3"))
    assert answer.usage.completion_tokens == 3


def main() -> None:
    client = openai.OpenAI(max_retries=0)
    assert invoke(client) == stream(client)
    asyncio.run(batch())
    embed(client)
    refused(client)
    assert MODEL in [model.id for model in client.models.list()]
    print(openai.__version__, flush=True)
    sys.stdin.readline()
    retried()


main()
