"""`make test`: the whole suite, on SQLite with the private Redis and on PostgreSQL with a shared one.

    python -m tests.run [--full] [--only STAGE,…]

Stages: `node` (agent and worker, in an environment without Django), `api` (what clients see, on SQLite),
`engines` (torch, and the contract of all engines), `sqlite` and `postgres` (what is kept in the database),
`chaos` (faults of workers, clients and networks), `e2e-sqlite` and `e2e-postgres` (real processes, a real
model). A missing service skips its stage and says so; with CI=true it fails.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests import services

ROOT = Path(__file__).resolve().parents[1]
NODE_ENVIRONMENT = ROOT / ".venv-node"
NODE_TEST_PACKAGES = ["pytest>=9.2", "pytest-asyncio>=1.5", "pytest-timeout>=2.4", "openai>=3.52"]
STAGES = ("node", "api", "engines", "sqlite", "postgres", "chaos", "e2e-sqlite", "e2e-postgres")
LANES = 3
"""Stages at once: half of their time they wait for processes of their own."""
API = ["tests/api", "tests/clients"]
REST = ["tests/integration", "tests/security", "tests/unit"]
ON_POSTGRES = (
    [
        "tests/integration",
        *(
            f"--ignore=tests/integration/test_{name}.py"
            for name in (
                *("add_model_page", "budget_commands", "chat_socket", "client", "console", "first_run"),
                "model_command",
            )
        ),
    ],
    [
        *(
            f"tests/api/test_{name}.py"
            for name in (
                *("admission", "budgets", "chat_completions", "keys"),
                *("responses", "usage_api"),
            )
        ),
        *(
            f"tests/security/test_s{name}.py"
            for name in (
                *("23_mass_assignment", "24_privileges", "25_forbidden_models"),
                *("28_kept_secrets", "42_budgets_under_attack", "46_csv_formulas"),
            )
        ),
    ],
)
"""In two parts, what meets the database. The rest, formats, bounds and pages above all, runs on SQLite alone,
but in `make test-full` on both."""
RUN_ONCE = [
    *("tests/e2e/test_docs.py", "tests/e2e/test_readme.py", "tests/e2e/test_other_docs.py"),
    *("tests/e2e/test_embeddings.py", "tests/e2e/test_streaming.py", "tests/e2e/test_other_clients.py"),
    *("tests/e2e/test_admin_pages.py", "tests/e2e/test_chat_page.py", "tests/e2e/test_first_answer.py"),
    *("tests/e2e/test_commands.py", "tests/e2e/test_faults.py", "tests/e2e/test_stop.py"),
    "tests/e2e/test_nodes.py",
]
"""What clients and operators see, and what becomes of processes: with PostgreSQL and a shared Redis these run
in `make test-full` only."""


def main() -> int:
    parser = argparse.ArgumentParser(description="Run the tests.")
    parser.add_argument("--full", action="store_true", help="add what is long")
    parser.add_argument("--only", default="", help="run only these stages, comma-separated")
    arguments, rest = parser.parse_known_args()
    only = set(filter(None, arguments.only.split(",")))
    if unknown := only.difference(STAGES):
        parser.error(f"no such stage: {', '.join(sorted(unknown))}; there are {', '.join(STAGES)}")
    runs = Runs(only=only, extra=["-m", "not gpu" if arguments.full else "not full and not gpu"], rest=rest)

    with contextlib.ExitStack() as stack:
        postgres = stack.enter_context(services.postgres())
        redis = stack.enter_context(services.shared_redis())

        def engines() -> None:
            # A tiny model's steps are over before a second thread has heard of them, and waits for it spin.
            runs.pytest("engines", ["tests/engines", "tests/contract"], OMP_NUM_THREADS="1")

        def on_postgres(part: int) -> None:
            if postgres is None:
                if not part:
                    runs.skip("postgres", "no PostgreSQL answers, and none is installed")
                return
            runs.pytest(
                "postgres",
                [REST, API][part] if arguments.full else ON_POSTGRES[part],
                DATABASE_URL=postgres,
                ROUNDHOUSE_TEST_DB=f"roundhouse_test_{os.getpid()}_{part}",
            )

        def node() -> None:
            if runs.wanted("node"):
                runs.pytest("node", ["tests/node"], python=node_environment())

        with ThreadPoolExecutor(LANES) as lanes:
            started = [
                lanes.submit(runs.pytest, "sqlite", [*REST, "tests/mutants"]),
                lanes.submit(runs.pytest, "api", API),
                lanes.submit(engines),
                lanes.submit(on_postgres, 0),
                lanes.submit(on_postgres, 1),
                lanes.submit(node),
            ]
            for lane in started:
                lane.result()

        def e2e_on_postgres() -> None:
            if postgres is None or redis is None:
                runs.skip("e2e-postgres", "it needs PostgreSQL and Redis, and one of them is missing")
            elif runs.wanted("e2e-postgres"):
                with services.own_database(postgres) as url:
                    tests = ["tests/e2e", *([] if arguments.full else without(RUN_ONCE))]
                    runs.pytest("e2e-postgres", tests, DATABASE_URL=url, REDIS_URL=redis)

        # These judge times and kill processes: nothing runs beside them.
        runs.pytest("chaos", ["tests/chaos"])
        runs.pytest("e2e-sqlite", ["tests/e2e"])
        e2e_on_postgres()
    return runs.summary()


def without(paths: list[str]) -> list[str]:
    """Arguments that leave these files out."""
    return [f"--ignore={path}" for path in paths]


class Runs:
    """The stages run so far and how each went."""

    def __init__(self, *, only: set[str], extra: list[str], rest: list[str]) -> None:
        self.only = only
        self.extra = [*extra, *rest]
        self.narrowed = bool(rest)
        self.results: list[tuple[str, str]] = []
        self.failed = False

    def wanted(self, stage: str) -> bool:
        return not self.only or stage in self.only

    def pytest(
        self, stage: str, arguments: list[str], *, python: Path | None = None, **environment: str
    ) -> None:
        if not self.wanted(stage):
            return
        print(f"... {stage}", flush=True)
        started = time.monotonic()
        done = subprocess.run(
            [str(python or sys.executable), "-m", "pytest", "-q", *arguments, *self.extra],
            cwd=ROOT,
            env=_without_services() | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        code = done.returncode
        if code == pytest.ExitCode.NO_TESTS_COLLECTED and self.narrowed:
            code = 0  # what was asked for is in another part
        # In one piece: stages that run side by side must not mix their lines.
        print(f"\n=== {stage}\n{done.stdout}", flush=True)
        self.failed |= code != 0
        took = f"{time.monotonic() - started:.0f} s"
        self.results.append(
            (stage, f"passed in {took}" if code == 0 else f"FAILED (pytest {code}) in {took}")
        )

    def skip(self, stage: str, why: str) -> None:
        if not self.wanted(stage):
            return
        # On CI a suite that silently shrank would look green.
        self.failed |= os.environ.get("CI") == "true"
        self.results.append((stage, f"SKIPPED: {why}"))

    def summary(self) -> int:
        print("\n=== summary")
        for stage, result in self.results:
            print(f"{stage:14} {result}")
        return 1 if self.failed else 0


def _without_services() -> dict[str, str]:
    """This environment, less what would point the tests at somebody's real Roundhouse."""
    mine = ("DATABASE_URL", "REDIS_URL", "ROUNDHOUSE_DATA", "ROUNDHOUSE_PORT", "DJANGO_SETTINGS_MODULE")
    return {name: value for name, value in os.environ.items() if name not in mine}


def node_environment() -> Path:
    """The Python of an environment without Django, made on first use."""
    python = NODE_ENVIRONMENT / "bin" / "python"
    stamp = NODE_ENVIRONMENT / "installed"
    wanted = (ROOT / "requirements-node.txt").read_text() + "\n".join(NODE_TEST_PACKAGES)
    if not stamp.exists() or stamp.read_text() != wanted:
        subprocess.run([sys.executable, "-m", "venv", str(NODE_ENVIRONMENT)], check=True)
        subprocess.run(
            [
                *(str(python), "-m", "pip", "--disable-pip-version-check", "-q", "install"),
                *("-r", str(ROOT / "requirements-node.txt"), *NODE_TEST_PACKAGES),
            ],
            check=True,
        )
        stamp.write_text(wanted)
    absent = subprocess.run([str(python), "-c", "import django"], capture_output=True, check=False)
    if absent.returncode == 0:
        raise SystemExit(f"{NODE_ENVIRONMENT} has Django in it; remove that folder and run again.")
    return python


if __name__ == "__main__":
    sys.exit(main())
