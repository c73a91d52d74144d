"""The upstream of the peers: our simulated engine, answering at once, without the guard of its port.

    python -m bench.peers.upstream PORT

It speaks OpenAI's API, and to FastChat's controller and API server as one of FastChat's workers does.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Mount, Route

from inference.engines import create_engine
from inference.engines.app import EngineApp
from inference.engines.base import EngineSpec
from inference.engines.simulated_words import lorem

MODEL = "instant"
TOKENS = 64
SLOTS = 1024


@dataclass(frozen=True)
class Template:
    """A conversation's, as FastChat's workers tell it."""

    name: str = "one_shot"
    system_template: str = "{system_message}"
    system_message: str = ""
    roles: tuple[str, str] = ("user", "assistant")
    messages: tuple[()] = ()
    offset: int = 0
    sep_style: int = 2
    """Of FastChat's enum: ADD_SPACE_COLON_SINGLE."""
    sep: str = "\n"
    sep2: None = None
    stop_str: None = None
    stop_token_ids: None = None


def _texts() -> list[str]:
    """What has been said after each token: FastChat's workers send all of it each time."""
    words = lorem(b"peers")
    texts, text = [], ""
    for _ in range(TOKENS):
        text += next(words)
        texts.append(text)
    return texts


def _event(at: int, text: str) -> dict[str, Any]:
    count = at + 1
    usage = {"prompt_tokens": 2, "completion_tokens": count, "total_tokens": count + 2}
    return {
        "text": text,
        "error_code": 0,
        "usage": usage,
        "finish_reason": "stop" if count == TOKENS else None,
    }


EVENTS = [json.dumps(_event(at, text)).encode() + b"\0" for at, text in enumerate(_texts())]
WHOLE = EVENTS[-1][:-1]


async def _stream(request: Request) -> Response:
    await request.body()

    async def events() -> AsyncIterator[bytes]:
        for event in EVENTS:
            yield event
            await asyncio.sleep(0)  # as our engine does it between tokens

    return StreamingResponse(events())


async def _whole(request: Request) -> Response:
    await request.body()
    return Response(WHOLE, media_type="application/json")


def _told(answer: dict[str, Any]) -> Any:
    async def tell(request: Request) -> Response:
        return JSONResponse(answer)

    return tell


STATUS = {"model_names": [MODEL], "speed": 1, "queue_length": 0}
FASTCHAT = [
    Route("/worker_generate_stream", _stream, methods=["POST"]),
    Route("/worker_generate", _whole, methods=["POST"]),
    Route("/worker_get_status", _told(STATUS), methods=["POST"]),
    Route("/worker_get_conv_template", _told({"conv": vars(Template())}), methods=["POST"]),
    Route("/model_details", _told({"context_length": 8192}), methods=["POST"]),
    Route("/count_token", _told({"count": 2, "error_code": 0}), methods=["POST"]),
]


async def main() -> None:
    spec = EngineSpec(model_path=None, slots=SLOTS, chat_template=None, arguments={"token_seconds": 0.0})
    engine: Any = create_engine("simulated", spec)
    await engine.load(lambda progress: None)
    app = EngineApp(engine, slots=SLOTS, served_name=MODEL)
    app.ready = True
    config = uvicorn.Config(
        Starlette(routes=[*FASTCHAT, Mount("/", app.asgi)]),
        host="127.0.0.1",
        port=int(sys.argv[1]),
        lifespan="off",
        ws="none",
        access_log=False,
        log_config=None,
        timeout_keep_alive=75,
    )
    await uvicorn.Server(config).serve()


if __name__ == "__main__":
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(main())
