"""Another server as a worker, from one command to an answer. The other server is Roundhouse itself."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import Roundhouse, eventually

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.full, pytest.mark.timeout(600)]

BEHIND = "behind"


def test_a_server_is_added_answers_and_loses_its_key_with_its_url(
    roundhouse: Roundhouse, tmp_path: Path
) -> None:
    roundhouse.deploy_simulated(BEHIND, tokens_per_second=500)
    key = tmp_path / "key"
    key.write_text(roundhouse.credentials["api_key"])
    url = roundhouse.credentials["base_url"]
    added = roundhouse.manage(
        *("upstream", "add", "loop", "--url", url, "--model", BEHIND, "--key-file", str(key)),
        *("--context-length", "2048", "--wait"),
    )
    assert "route loop" in added.stdout
    eventually(lambda: roundhouse.answers("loop"), seconds=10, what="it answers")

    stream = roundhouse.client().chat.completions.create(
        model="loop",
        messages=[{"role": "user", "content": "Hello"}],
        max_tokens=9,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    usage = chunks[-1].usage
    assert usage is not None
    assert {chunk.model for chunk in chunks} == {"loop"}
    request_id = chunks[0].id.removeprefix("chatcmpl-")

    def spent(route: str) -> list[tuple[int, int]]:
        return roundhouse.rows(
            "SELECT prompt_tokens, completion_tokens FROM registry_usageevent "
            "WHERE route = %s ORDER BY started_at DESC LIMIT 1",
            route,
        )

    eventually(
        lambda: roundhouse.rows("SELECT 1 FROM registry_usageevent WHERE request_id = %s", request_id),
        seconds=10,
        what="the ledger has it",
    )
    # What the one side was told is what the other has counted.
    assert spent("loop") == [(usage.prompt_tokens, usage.completion_tokens)] == spent(BEHIND)

    assert key.read_text() not in roundhouse.logs()
    [(sealed,)] = roundhouse.rows("SELECT upstream_key FROM registry_deployment WHERE name = 'loop'")
    assert sealed
    assert key.read_text() not in sealed
    held = [file for file in roundhouse.data.rglob("*") if file.is_file() and _has(file, key.read_text())]
    # The worker's own file, and where `up` keeps the first key.
    assert {file.name for file in held} == {"spec.json", "credentials.json"}
    assert all(file.stat().st_mode & 0o077 == 0 for file in held)

    roundhouse.manage("deploy", "loop", "--argument", f"url={url}/")
    assert roundhouse.rows("SELECT upstream_key FROM registry_deployment WHERE name = 'loop'") == [("",)]

    def failed() -> bool:
        told = json.loads(roundhouse.manage("status", "--json", check=False).stdout)
        [loop] = [one for one in told["deployments"] if one["name"] == "loop"]
        return "wants a key" in json.dumps(loop)

    eventually(failed, seconds=40, what="its status says why", every=1)
    roundhouse.manage("scale", "loop", "0")
    roundhouse.manage("scale", BEHIND, "0")


def _has(file: Path, text: str) -> bool:
    try:
        return text.encode() in file.read_bytes()
    except OSError:
        return False
