"""What a program does with LlamaIndex; run by test_others.py. It waits on its standard input before it asks
for a model that has no worker yet. With the argument `real` it only asks and prints the answers."""

from __future__ import annotations

import asyncio
import os
import sys
from typing import Any

import llama_index.core
import openai
from llama_index.core.llms import ChatMessage
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel

CHAT = os.environ["CHAT_MODEL"]
SERVER = {"api_base": os.environ["OPENAI_BASE_URL"], "api_key": os.environ["OPENAI_API_KEY"]}


class Person(BaseModel):
    """A person."""

    name: str
    age: int


def get_weather(city: str) -> str:
    """The weather of a city."""
    return f"It rains in {city}."


def model(name: str = CHAT, **options: Any) -> OpenAILike:
    given: dict[str, Any] = {"is_chat_model": True, "is_function_calling_model": True, "max_retries": 0}
    return OpenAILike(model=name, **SERVER, **given | options)


def asked(text: str) -> list[ChatMessage]:
    return [ChatMessage(role="user", content=text)]


def invoke(llm: OpenAILike) -> str:
    answer = llm.chat(asked("!tokens 5"))
    assert answer.raw.usage.completion_tokens == 5
    return str(answer.message.content)


def stream(llm: OpenAILike) -> str:
    return "".join(piece.delta or "" for piece in llm.stream_chat(asked("!tokens 5")))


def completions() -> None:
    """A model that is told to be none for conversations goes on from a text."""
    llm = model(is_chat_model=False, max_tokens=7)
    whole = llm.complete("Steam").text
    assert len(whole.split()) == 7
    assert "".join(piece.delta or "" for piece in llm.stream_complete("Steam")) == whole


async def batch(llm: OpenAILike) -> None:
    answers = await asyncio.gather(*(llm.achat(asked(f"!tokens {count}")) for count in range(1, 21)))
    assert [answer.raw.usage.completion_tokens for answer in answers] == list(range(1, 21))


def tools(llm: OpenAILike) -> None:
    weather = FunctionTool.from_defaults(get_weather)
    question = "What is the weather in 'Kyoto 京都'?"
    [call] = llm.get_tool_calls_from_response(llm.chat_with_tools([weather], user_msg=question))
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", {"city": "Kyoto 京都"})
    for piece in llm.stream_chat_with_tools([weather], user_msg=question):
        last = piece
    [streamed] = llm.get_tool_calls_from_response(last)
    assert (streamed.tool_name, streamed.tool_kwargs) == (call.tool_name, call.tool_kwargs)
    called = llm.predict_and_call([weather], user_msg=question)
    assert called.response == "It rains in Kyoto 京都."


def structured(llm: OpenAILike) -> None:
    """As a call of a tool that must be called, and as a JSON schema."""
    for one in (llm, model(should_use_structured_outputs=True)):
        made = one.as_structured_llm(Person).complete("This is 'Ada'; she is 36 years old.")
        assert made.raw == Person(name="Ada", age=36)


def embed() -> None:
    vectors = embeddings(max_retries=0).get_text_embedding_batch(["a train", "rails"])
    assert [len(one) for one in vectors] == [8, 8]
    assert embeddings(max_retries=0).get_query_embedding("a train") == vectors[0]


def embeddings(**options: Any) -> OpenAILikeEmbedding:
    return OpenAILikeEmbedding(model_name=os.environ["EMBEDDING_MODEL"], **SERVER, **options)


def refused() -> None:
    code = None
    try:
        model("nowhere").chat(asked("Hello"))
    except openai.NotFoundError as error:
        code = error.code
    assert code == "model_not_found"


def retried() -> None:
    """503 at first; the client comes back by itself until a worker is there."""
    answer = model(os.environ["LATER_MODEL"], max_retries=10).chat(asked("!tokens 3"))
    assert answer.raw.usage.completion_tokens == 3


def real() -> None:
    llm = model(temperature=0, max_tokens=40)
    print(llm.chat(asked("What is the capital of Japan?")).message.content)
    print("".join(piece.delta or "" for piece in llm.stream_chat(asked("What is the capital of Japan?"))))
    print(len(embeddings().get_query_embedding("king")))


def main() -> None:
    llm = model()
    assert invoke(llm) == stream(llm)
    completions()
    asyncio.run(batch(llm))
    tools(model())
    structured(model())
    embed()
    refused()
    print(llama_index.core.__version__, flush=True)
    sys.stdin.readline()
    retried()


real() if sys.argv[1:] == ["real"] else main()
