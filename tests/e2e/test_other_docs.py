"""The blocks of the accounting, security and development pages, run as they stand there; and that every
block of every page is run by some test."""

from __future__ import annotations

import csv
import io
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import pytest
import yaml

from tests.e2e import test_commands, test_docs, test_operating, test_readme, test_upstream_docs
from tests.e2e.conftest import ROOT, Roundhouse, eventually, free_port
from tests.e2e.documented import block, blocks, clone, every_block, outside_make, run, with_facts_of
from tests.e2e.test_agreement import operator as operator
from tests.run import STAGES

pytestmark = [pytest.mark.e2e, pytest.mark.model, pytest.mark.timeout(600)]

PICTURE = block("README", "SDKs ── /v1 ──┐")
COMMANDS = [*blocks("accounting", "bash"), *blocks("security", "bash")]
REPORT = block("accounting", "/admin/usage/?from")
PUBLIC = block("security", "export ROUNDHOUSE_HTTPS")
SCRAPE = block("security", "scrape_configs")
DEVELOPMENT = block("development", "make lint")
RUN = [*COMMANDS, REPORT, SCRAPE, DEVELOPMENT]


def test_each_block_of_the_docs_is_run_by_a_test():
    guide = {one for one in blocks("operating", "bash") if one.text in test_commands.blocks()}
    others = {*test_docs.RUN, *test_operating.RUN, *test_readme.RUN, *test_upstream_docs.RUN}
    tested = {PICTURE, *guide, *RUN, *others}
    assert [str(one) for one in every_block() if one not in tested] == []


@pytest.mark.parametrize("example", COMMANDS, ids=str)
def test_each_command_runs(roundhouse: Roundhouse, tmp_path: Path, example) -> None:
    folder = clone(tmp_path, roundhouse.data)
    done = run(with_facts_of(roundhouse, example), folder, roundhouse.environment)
    assert '"error"' not in done.stdout


def test_the_address_of_the_report_gives_its_rows(roundhouse: Roundhouse, operator) -> None:
    address = roundhouse.credentials["admin_url"].removesuffix("/admin/") + REPORT.text.strip()
    rows = csv.reader(io.StringIO(operator.open(address).read().decode()))
    assert "requests" in next(rows)


def test_the_public_settings_start_a_gateway_whose_metrics_a_scraper_reads(tmp_path: Path) -> None:
    (job,) = yaml.safe_load(SCRAPE.text)["scrape_configs"]
    (target,) = job["static_configs"][0]["targets"]
    port = free_port()
    start = "\n".join(
        [
            PUBLIC.text,
            f'printf %s "$ROUNDHOUSE_METRICS_TOKEN" > {Path(job["authorization"]["credentials_file"]).name}',
            f"{sys.executable} {ROOT / 'manage.py'} migrate -v0",
            f"exec {sys.executable} {ROOT / 'manage.py'} gateway --port {port}",
        ]
    )
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("ROUNDHOUSE_", "DATABASE_", "REDIS_", "DJANGO_"))
    }
    with (tmp_path / "log").open("wb") as log:
        gateway = subprocess.Popen(
            ["bash", "-ec", start],
            cwd=tmp_path,
            env=environment | {"ROUNDHOUSE_DATA": str(tmp_path / "data")},
            stdout=log,
            stderr=subprocess.STDOUT,
        )

    def scrape(**headers: str) -> int:
        # As the proxy hands on what a scraper elsewhere asks.
        host = target.partition(":")[0]
        behind = {"Host": host, "X-Forwarded-For": "192.0.2.1", "X-Forwarded-Proto": "https"} | headers
        try:
            request = urllib.request.Request(f"http://127.0.0.1:{port}/metrics", headers=behind)
            with urllib.request.urlopen(request, timeout=5) as answer:
                assert b"# TYPE roundhouse_" in answer.read()
                return int(answer.status)
        except urllib.error.HTTPError as refused:
            return refused.code
        except OSError:
            return 0

    try:
        eventually(
            lambda: scrape() or gateway.poll() is not None,
            seconds=60,
            what=f"the gateway listens: {(tmp_path / 'log').read_text()}",
            every=0.2,
        )
        token = (tmp_path / "roundhouse.token").read_text()
        assert scrape(Authorization=f"Bearer {token}") == 200, (tmp_path / "log").read_text()
        assert scrape() in (401, 403, 404)
    finally:
        gateway.terminate()
        gateway.wait(30)


def test_the_targets_for_developers_are_there_and_the_stages_are_those_it_names(tmp_path: Path) -> None:
    folder = clone(tmp_path, tmp_path)
    planned = run(DEVELOPMENT.text.replace("make ", "make -n "), folder, os.environ).stdout
    for part in ("ruff check", "mypy", "lint-imports", "-m tests.run", "-m bench"):
        assert part in planned
    page = (ROOT / "docs" / "development.md").read_text()
    told = page.partition("`make test` runs")[2].partition("One stage alone")[0]
    assert re.findall(r"`([\w-]+)`", told) == list(STAGES)


def test_one_stage_is_chosen_by_name_and_an_unknown_one_is_refused(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "development.md").read_text()
    (example,) = re.findall(r'`(make test ARGS="--only sqlite")`', page)
    folder = clone(tmp_path, tmp_path)
    planned = run(example.replace("make", "make -n"), folder, os.environ).stdout
    assert "-m tests.run --only sqlite\n" in planned
    refused = subprocess.run(
        ["bash", "-ec", example.replace("sqlite", "squlite")],
        cwd=folder,
        env=outside_make(),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode != 0
    assert "squlite" in refused.stderr
