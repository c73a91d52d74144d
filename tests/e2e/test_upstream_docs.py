"""The commands of docs/upstreams.md, run as they stand there. They only write wishes: no server is asked."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from config.env import read_env
from inference.engines.upstream.presets import PRESETS
from tests.e2e.conftest import ROOT
from tests.e2e.documented import block, blocks, clone, run

pytestmark = [pytest.mark.e2e, pytest.mark.full]

COMMANDS = [one for one in blocks("upstreams", "bash") if "manage.py" in one.text]
SETTING = block("upstreams", "export ROUNDHOUSE_UPSTREAM_HOSTS")
RUN = [*COMMANDS, SETTING]

SHOW = """
import json
from registry.models import Deployment
print(json.dumps({one.name: [one.arguments, bool(one.upstream_key)] for one in Deployment.objects.all()}))
"""


def test_the_commands_do_what_the_page_says(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o700)
    folder = tmp_path / "clone"
    folder.mkdir()
    clone(folder, data)
    environment = {**os.environ, "ROUNDHOUSE_DATA": str(data), "DATABASE_URL": ""}

    def manage(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "manage.py"), *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout

    manage("migrate", "-v0")
    printed = "".join(run(one.text, folder, environment).stdout for one in COMMANDS)
    assert "sk-" not in printed
    made = json.loads(manage("shell", "-v0", "-c", SHOW))
    assert made["llama"] == [{"url": "http://127.0.0.1:8080/v1", "preset": "llama.cpp"}, False]
    assert made["gpt"][0]["timeout"] == 120
    assert made["gpt"][1]


def test_the_setting_is_one(tmp_path: Path) -> None:
    value = SETTING.text.strip().partition("=")[2]
    found = read_env({"ROUNDHOUSE_DATA": str(tmp_path), "ROUNDHOUSE_UPSTREAM_HOSTS": value})
    assert found.upstream_hosts == ("10.20.0.0/16", "api.openai.com")


def test_the_page_lists_every_preset() -> None:
    page = (ROOT / "docs" / "upstreams.md").read_text()
    for name, preset in PRESETS.items():
        assert f"| `{name}` | {preset.title} | {preset.note} |" in page
