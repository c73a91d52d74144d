"""P6: do the tests of the accounting bite? Each guard, each rule of it is taken away once, in a copy of the
sources; the tests named beside it must then fail."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.run import ROOT

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]

BUDGETS = "tests/integration/test_budgets.py"
MACHINE = "tests/integration/test_budget_machine.py"
PRICES = "tests/integration/test_prices.py"
GUARD = "tests/integration/test_ledger_guard.py"
ROLLUPS = "tests/integration/test_rollups.py"
SPOOL = "tests/integration/test_spool.py"
ADMISSION = "tests/unit/test_admission.py"
PACE = "tests/unit/test_pace.py"
SOURCES = (
    "platform",
    "registry",
    "inference",
    "openai_api",
    "webchat",
    "tests",
    "pyproject.toml",
    "manage.py",
)
SECONDS = 300
"""A mutant under which the tests never end counts as killed."""


@dataclass(frozen=True)
class Mutant:
    """What is taken away, where, and who must notice."""

    name: str
    file: str
    text: str
    instead: str
    tests: str
    only: str = ""
    """Of these tests, those whose name has one of these words."""


MUTANTS = [
    Mutant(
        "a budget is reserved without its guard",
        "registry/actions/budgets.py",
        "WHERE id = %s AND spent <= %s - held",
        "WHERE id = %s AND 0 < 1 + %s * 0",
        BUDGETS,
    ),
    Mutant(
        "what is held does not count against the limit",
        "registry/actions/budgets.py",
        "AND spent <= %s - held",
        "AND spent <= %s",
        BUDGETS,
    ),
    Mutant(
        "what was reserved stays when a later budget refuses",
        "registry/actions/budgets.py",
        "@transaction.atomic\ndef reserve(",
        "def reserve(",
        BUDGETS,
        "all_budgets or none",
    ),
    Mutant(
        "a hold is not given back",
        "registry/actions/budgets.py",
        "SET spent = spent + %s, held = held - %s WHERE",
        "SET spent = spent + %s, held = held - 0 * %s WHERE",
        MACHINE,
    ),
    Mutant(
        "holds outlive their event",
        "registry/actions/budgets.py",
        '        change("DELETE FROM registry_hold WHERE id IN %s", tuple(hold.pk for hold in ended))\n',
        "        pass\n",
        MACHINE,
    ),
    Mutant(
        "an event with a hold is counted by its budget once more",
        "registry/actions/budgets.py",
        "if amount and budget.pk not in done and",
        "if amount and",
        MACHINE,
    ),
    Mutant(
        "an event brought twice is new twice",
        "registry/actions/usage.py",
        "if event.request_id not in known]",
        "]",
        BUDGETS,
        "twice or several",
    ),
    Mutant(
        "request ids of events may repeat",
        "registry/migrations/0007_budgets_and_prices.py",
        "models.CharField(max_length=80, unique=True)",
        "models.CharField(max_length=80)",
        "tests/integration/test_registry.py",
    ),
    Mutant(
        "a request may hold twice in one period",
        "registry/migrations/0007_budgets_and_prices.py",
        "constraint=models.UniqueConstraint(fields=('request_id', 'budget_period'), name='hold_is_one')",
        "constraint=models.UniqueConstraint(fields=('id', 'request_id'), name='hold_is_one')",
        BUDGETS,
        "hold_is_one",
    ),
    Mutant(
        "an hour that gets an event is not marked",
        "registry/actions/usage.py",
        "    mark_stale(hour_of(event.started_at) for event in events)\n",
        "",
        ROLLUPS,
    ),
    Mutant(
        "a correction counts as a request",
        "registry/actions/rollups.py",
        'A_REQUEST = Q(corrects="")',
        "A_REQUEST = Q(corrects__isnull=False)",
        PRICES,
        "correction",
    ),
    Mutant(
        "charging again appends its correction each time",
        "registry/actions/prices.py",
        "charged = event.cost_micros + sum(differences)",
        "charged = event.cost_micros",
        PRICES,
        "charging",
    ),
    Mutant(
        "what ended before a token was counted is charged",
        "registry/actions/usage.py",
        " and bool(event.prompt_tokens or event.completion_tokens)",
        "",
        PRICES,
        "before_a_token",
    ),
    Mutant(
        "costs are cut off, not rounded",
        "registry/costs.py",
        "(exact + PER_MILLION // 2) // PER_MILLION",
        "exact // PER_MILLION",
        PRICES,
    ),
    Mutant(
        "cached tokens are paid twice",
        "registry/costs.py",
        "(prompt_tokens - cached_tokens) * price.input_micros",
        "prompt_tokens * price.input_micros",
        PRICES,
    ),
    Mutant(
        "what was not answered is charged",
        "registry/actions/usage.py",
        "if price is None or not _answered(event):",
        "if price is None:",
        PRICES,
    ),
    Mutant(
        "a price holds before it begins",
        "registry/costs.py",
        "if price.starts_at <= at:",
        "if True:",
        PRICES,
    ),
    Mutant(
        "events can be changed",
        "registry/ledger_guard.py",
        'f"CREATE TRIGGER {update} BEFORE UPDATE ON {EVENTS} WHEN {changed} "',
        'f"CREATE TRIGGER {update} BEFORE UPDATE ON {EVENTS} WHEN 0 "',
        GUARD,
        "column",
    ),
    Mutant(
        "events can be deleted",
        "registry/ledger_guard.py",
        'f"CREATE TRIGGER {delete} BEFORE DELETE ON {EVENTS} WHEN {closed} "',
        'f"CREATE TRIGGER {delete} BEFORE DELETE ON {EVENTS} WHEN 0 "',
        GUARD,
        "deleted_by_hand",
    ),
    Mutant(
        "limits are debited before all are checked",
        "openai_api/admission/scripts.py",
        "if answer[3] == 0 then return answer end\n",
        "",
        ADMISSION,
        "refuses or 200",
    ),
    Mutant(
        "the script lets one more through",
        "openai_api/admission/scripts.py",
        "room = cost == 0 or level + cost * parts <= burst * parts",
        "room = cost == 0 or level < burst * parts",
        ADMISSION,
        "model_does or 200 or burst",
    ),
    Mutant(
        "a slot of a parallel request is not counted",
        "openai_api/admission/scripts.py",
        "room = level < amount",
        "room = level <= amount",
        ADMISSION,
        "slots or model_does",
    ),
    Mutant(
        "a bucket leaks twice as fast",
        "openai_api/admission/pace.py",
        "return max(0, level - max(0, ticks) * self.amount)",
        "return max(0, level - 2 * max(0, ticks) * self.amount)",
        PACE,
    ),
    Mutant(
        "tokens counted so far are not in the spool",
        "registry/spool.py",
        "            counters[base + 3] = completion_tokens\n",
        "",
        SPOOL,
        "crash or dead_gateway",
    ),
]


@pytest.fixture(scope="module")
def copied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mutants")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder)
    return folder


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed(mutant: Mutant, copied: Path) -> None:
    file = copied / mutant.file
    original = file.read_text()
    assert original.count(mutant.text) >= 1, "the source has changed: find its place anew"
    file.write_text(original.replace(mutant.text, mutant.instead))
    options = ["-q", "-x", "-p", "no:cacheprovider", "-m", "not full", mutant.tests]
    if mutant.only:
        options += ["-k", mutant.only]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    # The installed package is our own tree: the copy comes before it.
    environment["PYTHONPATH"] = f"{copied}:{copied / 'platform'}"
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pytest", *options],
            cwd=copied,
            env=environment,
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return
    finally:
        file.write_text(original)
    # 1: tests failed. Anything else says that they were not run.
    assert done.returncode == 1, done.stdout[-3000:]
    assert " failed" in done.stdout or " error" in done.stdout
