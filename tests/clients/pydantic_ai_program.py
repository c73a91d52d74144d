"""What a program does with Pydantic AI; run by test_others.py. It waits on its standard input before it asks
for a model that has no worker yet. With the argument `real` it only asks and prints the answers."""

from __future__ import annotations

import asyncio
import os
import sys

import pydantic_ai
from openai import AsyncOpenAI
from pydantic import BaseModel
from pydantic_ai import Agent, Embedder, ModelHTTPError, NativeOutput
from pydantic_ai.embeddings.openai import OpenAIEmbeddingModel
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

CHAT = os.environ["CHAT_MODEL"]
EMBEDDING = os.environ["EMBEDDING_MODEL"]


class Person(BaseModel):
    name: str
    age: int


def provider(*, retries: int = 0) -> OpenAIProvider:
    # Address and key come from OPENAI_BASE_URL and OPENAI_API_KEY.
    return OpenAIProvider(openai_client=AsyncOpenAI(max_retries=retries))


async def invoke(model: OpenAIChatModel | OpenAIResponsesModel) -> str:
    done = await Agent(model).run("!tokens 5")
    assert done.usage.output_tokens == 5
    return done.output


async def stream(model: OpenAIChatModel | OpenAIResponsesModel) -> str:
    async with Agent(model).run_stream("!tokens 5") as pieces:
        text = "".join([piece async for piece in pieces.stream_text(delta=True)])
        assert pieces.usage.output_tokens == 5
    return text


async def batch(model: OpenAIChatModel) -> None:
    agent = Agent(model)
    answers = await asyncio.gather(*(agent.run(f"!tokens {count}") for count in range(1, 21)))
    assert [answer.usage.output_tokens for answer in answers] == list(range(1, 21))


async def tools(model: OpenAIChatModel | OpenAIResponsesModel) -> None:
    agent = Agent(model)
    cities = []

    @agent.tool_plain
    def get_weather(city: str) -> str:
        """The weather of a city."""
        cities.append(city)
        return "It rains."

    done = await agent.run("What is the weather in 'Kyoto 京都'?")
    assert cities == ["Kyoto 京都"]
    assert done.output
    assert done.usage.requests == 2
    async with agent.run_stream("What is the weather in 'Oslo'?") as pieces:
        assert await pieces.get_output()
    assert cities[1:] == ["Oslo"]


async def structured(model: OpenAIChatModel | OpenAIResponsesModel) -> None:
    """As a call of a tool that must be called, and as a JSON schema."""
    for form in (Person, NativeOutput(Person)):
        done = await Agent(model, output_type=form).run("This is 'Ada'; she is 36 years old.")
        assert done.output == Person(name="Ada", age=36)


async def embed(model: OpenAIEmbeddingModel) -> None:
    embedder = Embedder(model)
    found = await embedder.embed_documents(["a train", "rails"])
    assert [len(one) for one in found.embeddings] == [8, 8]
    query = await embedder.embed_query("a train")
    assert query.embeddings[0] == found.embeddings[0]


async def refused() -> None:
    status = None
    try:
        await Agent(OpenAIChatModel("nowhere", provider=provider())).run("Hello")
    except ModelHTTPError as error:
        status = error.status_code
    assert status == 404


async def retried() -> None:
    """503 at first; the client comes back by itself until a worker is there."""
    later = OpenAIChatModel(os.environ["LATER_MODEL"], provider=provider(retries=10))
    assert (await Agent(later).run("!tokens 3")).usage.output_tokens == 3


async def real() -> None:
    model = OpenAIChatModel(CHAT, provider=provider(), settings={"temperature": 0, "max_tokens": 40})
    print((await Agent(model).run("What is the capital of Japan?")).output)
    async with Agent(model).run_stream("What is the capital of Japan?") as pieces:
        print(await pieces.get_output())
    found = await Embedder(OpenAIEmbeddingModel(EMBEDDING, provider=provider())).embed_query("king")
    print(len(found.embeddings[0]))


async def main() -> None:
    chat = OpenAIChatModel(CHAT, provider=provider())
    responses = OpenAIResponsesModel(CHAT, provider=provider())
    assert await invoke(chat) == await stream(chat)
    assert await invoke(responses) == await stream(responses)
    await batch(chat)
    for model in (chat, responses):
        await tools(model)
        await structured(model)
    await embed(OpenAIEmbeddingModel(EMBEDDING, provider=provider()))
    await refused()
    print(pydantic_ai.__version__, flush=True)
    sys.stdin.readline()
    await retried()


asyncio.run(real() if sys.argv[1:] == ["real"] else main())
