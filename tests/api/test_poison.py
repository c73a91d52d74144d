"""F50: a request that ends whatever worker gets it costs two workers, not the fleet."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import openai
import pytest

from config.front import make_application
from registry.actions.events import publish_change
from registry.models import UsageEvent
from registry.threads import in_database
from tests.api.conftest import CAPABILITIES, ROUTE, Served, Worker, eventually, say, serving, worker_process
from tests.factories import make_api_key, make_deployment, make_worker

WORKERS = (501, 502, 503)


@pytest.fixture
def three(transactional_db: None) -> Iterator[tuple[Served, list[Worker]]]:
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker_process(one)) for one in WORKERS]
        deployment = make_deployment(route=ROUTE)
        for replica, (one, running) in enumerate(zip(WORKERS, workers, strict=True)):
            make_worker(
                deployment=deployment, id=one, replica=replica, url=running.url, capabilities=CAPABILITIES
            )
        publish_change("route", ROUTE)
        key = make_api_key(name="tests")[1]
        front = make_application()
        with serving(front) as port:
            yield Served(port, key, front), workers


def living(workers: list[Worker]) -> list[Worker]:
    return [worker for worker in workers if worker.process.poll() is None]


@pytest.mark.parametrize("stream", [False, True])
async def test_after_two_deaths_it_is_refused_and_others_are_served(three, stream: bool):
    served, workers = three

    async def ask(text: str) -> None:
        async with served.client() as client:
            answer = await client.chat.completions.create(**say(text), stream=stream)
            if stream:
                async for _ in answer:
                    pass

    with pytest.raises(openai.InternalServerError) as refused:
        await ask("!crash 0")
    assert refused.value.code == "poison"
    assert refused.value.response.headers["x-should-retry"] == "false"
    [alive] = eventually(lambda: len(left := living(workers)) == 1 and left, "two have ended")

    with pytest.raises(openai.InternalServerError) as again:
        await ask("!crash 0")
    assert again.value.code == "poison"
    await ask("!tokens 3")
    assert alive.process.poll() is None

    def ended() -> list[UsageEvent]:
        return list(UsageEvent.objects.order_by("started_at"))

    rows = await in_database(lambda: eventually(lambda: len(ended()) == 3 and ended(), "three rows"))
    assert [(row.outcome, row.completion_tokens) for row in rows] == [("failed", 0), ("failed", 0), ("ok", 3)]


async def test_a_death_in_mid_answer_counts_too(three):
    """The first worker dies, the second goes on with the answer and dies: nobody else is asked."""
    served, workers = three
    question = say("!tokens 20 !crash 5")
    async with served.client() as client:
        with pytest.raises(openai.APIError) as broken:
            async for _ in await client.chat.completions.create(**question, stream=True):
                pass
        assert broken.value.code == "poison"
        with pytest.raises(openai.InternalServerError) as refused:
            await client.chat.completions.create(**question, stream=True)
    assert refused.value.code == "poison"
    eventually(lambda: len(living(workers)) == 1, "two have ended")
