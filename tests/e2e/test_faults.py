"""Processes are killed; judged by process lists and `Event` rows, not by our own status page."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import signal
import time
from urllib.parse import urlsplit

import openai
import openai.types.chat
import psutil
import pytest

from tests.e2e.conftest import Roundhouse, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]


def test_a_killed_agent_comes_back_and_adopts_its_worker(roundhouse: Roundhouse):
    model = roundhouse.credentials["chat_model"]
    before = roundhouse.worker(model)
    agent = roundhouse.part_pid("agent")
    os.kill(agent, signal.SIGKILL)
    eventually(
        lambda: roundhouse.part_pid("agent") != agent,
        seconds=10,
        what="the agent runs again",
    )
    new_pid = roundhouse.part_pid("agent")
    eventually(
        lambda: roundhouse.rows("SELECT agent_pid FROM registry_node WHERE agent_pid = %s", new_pid),
        seconds=15,
        what="the new agent reports",
    )
    # Two beats later the worker is still the same process: it was adopted, not started anew.
    time.sleep(5)
    after = roundhouse.worker(model)
    assert (after.id, after.epoch, after.pid, after.engine_pid) == (
        before.id,
        before.epoch,
        before.pid,
        before.engine_pid,
    )
    assert after.state == "ready"
    assert psutil.pid_exists(before.pid)
    assert psutil.pid_exists(before.engine_pid)
    assert roundhouse.answers(model)


@pytest.mark.parametrize("victim", ["pid", "engine_pid"], ids=["its supervisor", "its engine"])
def test_a_killed_worker_is_replaced_and_answers_within_15_seconds(roundhouse: Roundhouse, victim: str):
    model = roundhouse.credentials["chat_model"]
    # Each case is a first failure: a second one in a row waits 10 s before its restart, as designed.
    roundhouse.manage(
        "shell",
        "-v0",
        "-c",
        "from registry.actions.deployments import retry_deployment\n"
        "from registry.models import Deployment\n"
        f"retry_deployment(deployment=Deployment.objects.get(name={model!r}), by='test')",
    )
    before = roundhouse.worker(model)
    os.kill(getattr(before, victim), signal.SIGKILL)
    killed = time.monotonic()
    eventually(
        lambda: roundhouse.worker(model).epoch == before.epoch + 1 and roundhouse.answers(model),
        seconds=15,
        what=f"a new worker answers {roundhouse.logs()}",
    )
    took = time.monotonic() - killed
    after = roundhouse.worker(model)
    print(f"killed {victim}: answered again after {took:.1f} s")
    assert after.epoch == before.epoch + 1
    assert after.pid != before.pid
    assert not psutil.pid_exists(before.engine_pid)
    assert roundhouse.worker_events(before.id)[-1] == "failed"
    assert roundhouse.worker_events(after.id)[-1] == "ready"


def test_a_killed_gateway_comes_back_with_everything_as_it_was(roundhouse: Roundhouse):
    model = roundhouse.credentials["chat_model"]
    before = roundhouse.worker(model)
    os.kill(roundhouse.part_pid("gateway"), signal.SIGKILL)
    address = urlsplit(roundhouse.credentials["base_url"])

    def first_models():
        # The first request that gets through at all is the one that is judged.
        connection = http.client.HTTPConnection(address.hostname, address.port, timeout=5)
        try:
            connection.request(
                "GET",
                "/v1/models",
                headers={"Authorization": f"Bearer {roundhouse.credentials['api_key']}"},
            )
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        except OSError:
            return None
        finally:
            connection.close()

    status, models = eventually(first_models, seconds=20, what="the gateway answers again")
    assert status == 200
    assert model in [entry["id"] for entry in models["data"]]
    assert roundhouse.answers(model)
    after = roundhouse.worker(model)
    assert (after.id, after.epoch, after.pid) == (before.id, before.epoch, before.pid)
    assert after.state == "ready"


def test_with_celery_stopped_serving_goes_on_and_nothing_is_launched(roundhouse: Roundhouse):
    roundhouse.deploy_simulated("without-celery")
    control = roundhouse.part("control")
    family = [control, *control.children(recursive=True)]
    for process in family:
        process.suspend()
    try:
        before = roundhouse.worker("without-celery")
        launches = roundhouse.rows("SELECT count(*) FROM registry_worker")[0][0]
        assert roundhouse.answers("without-celery")
        os.kill(before.pid, signal.SIGKILL)
        time.sleep(8)
        assert roundhouse.rows("SELECT count(*) FROM registry_worker")[0][0] == launches
        assert roundhouse.answers(roundhouse.credentials["chat_model"])
    finally:
        for process in family:
            process.resume()
    eventually(
        lambda: (
            roundhouse.worker("without-celery").epoch == before.epoch + 1
            and roundhouse.answers("without-celery")
        ),
        seconds=20,
        what="with Celery back the worker is replaced",
    )


def test_a_missing_model_folder_fails_its_deployment_alone(roundhouse: Roundhouse):
    roundhouse.manage(
        "shell",
        "-v0",
        "-c",
        "from registry.actions.language_models import add_language_model\n"
        "from registry.actions.deployments import deploy\n"
        "model = add_language_model(name='missing', source='/no/such/folder', by='test')\n"
        "deploy(name='missing', language_model=model, route='missing', by='test')",
    )
    eventually(
        lambda: (worker := roundhouse.worker("missing")) and worker.state == "failed",
        seconds=30,
        what="the worker failed",
    )
    time.sleep(3)
    (reason,) = roundhouse.rows(
        "SELECT cause, state_reason FROM registry_worker WHERE name LIKE 'missing-%%'"
        if roundhouse.environment.get("DATABASE_URL")
        else "SELECT cause, state_reason FROM registry_worker WHERE name LIKE 'missing-%'"
    )
    assert reason[0] == "missing_file"
    assert "does not exist on this node" in reason[1]
    assert roundhouse.answers(roundhouse.credentials["chat_model"])


@pytest.mark.full
@pytest.mark.parametrize("frozen", ["its engine", "engine and supervisor"])
def test_a_frozen_worker_loses_its_streams_to_another(roundhouse: Roundhouse, frozen: str):
    """Its health, or its silence, is noticed in 10 to 15 s. Thawed after all is over, it adds nothing."""
    name = "frozen-engine" if frozen == "its engine" else "frozen-worker"
    roundhouse.deploy_simulated(name, replicas=2, token_seconds=0.05, tokens=100)
    workers = roundhouse.rows(
        "SELECT w.pid, w.engine_pid FROM registry_worker w "
        "JOIN registry_deployment d ON d.id = w.deployment_id WHERE d.name = %s AND w.state = 'ready'",
        name,
    )
    pid, engine_pid = workers[0]
    victims = [psutil.Process(engine_pid)] if frozen == "its engine" else [psutil.Process(pid)]
    if frozen != "its engine":
        victims.append(psutil.Process(engine_pid))

    def question(number: int) -> dict[str, object]:
        return {
            "model": name,
            "messages": [{"role": "user", "content": f"question {number}"}],
            "stream": True,
        }

    def text_of(chunk: openai.types.chat.ChatCompletionChunk) -> str:
        return (chunk.choices[0].delta.content or "") if chunk.choices else ""

    async def ask(client: openai.AsyncOpenAI, number: int, begun: set[int]) -> str:
        said = ""
        async for chunk in await client.chat.completions.create(**question(number)):
            said += text_of(chunk)
            if said:
                begun.add(number)
        return said

    async def all_of_it() -> tuple[list[str], list[str], float]:
        numbers = range(8)
        async with roundhouse.async_client(max_retries=0, timeout=60) as client:
            unbroken = await asyncio.gather(*(ask(client, number, set()) for number in numbers))
            begun: set[int] = set()
            asking = [asyncio.create_task(ask(client, number, begun)) for number in numbers]
            while len(begun) < len(asking):  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            for victim in victims:
                victim.suspend()
            began = time.monotonic()
            try:
                broken = await asyncio.gather(*asking)
            finally:
                took = time.monotonic() - began
                for victim in victims:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.resume()
        return unbroken, broken, took

    try:
        unbroken, broken, took = asyncio.run(all_of_it())
        print(f"{frozen}: the last stream ended {took:.1f} s later")
        assert broken == unbroken
        # 15 s until it counts as hung, some for the word to spread, 5 s for what is left of the answer.
        assert took < 30
        rows = eventually(
            lambda: len(found := streams_of(roundhouse, name)) == 16 and found,
            seconds=10,
            what="each stream has one row",
        )
        assert {(outcome, tokens) for _, outcome, tokens in rows} == {("ok", 100)}
        assert sum(attempts > 1 for attempts, _, _ in rows) >= 2
        eventually(lambda: roundhouse.answers(name), seconds=30, what="it answers")
    finally:
        roundhouse.manage("scale", name, "0")


def streams_of(roundhouse: Roundhouse, route: str) -> list[tuple[int, str, int]]:
    return roundhouse.rows(  # type: ignore[return-value]
        "SELECT attempts, outcome, completion_tokens FROM registry_usageevent WHERE route = %s AND stream",
        route,
    )
