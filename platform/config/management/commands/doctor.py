"""`manage.py doctor`: ✓ and ✗ for everything that must hold, each ✗ with what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser

from config.doctor import Finding, examine
from config.first_run import read_credentials
from config.links import trace


class Command(BaseCommand):
    help = (
        "Check this Roundhouse: Python, disks, permissions, database, clock, Redis, gateway, control, nodes, "
        "model files, deployments. Exit status 1 when something is wrong."
    )
    # Whatever is wrong is for the checks below to say.
    requires_system_checks: list[str] = []

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--model", help="Send one message to this model and say which link is broken.")
        parser.add_argument("--url", help="With --model: the API (default: this machine's gateway).")
        parser.add_argument("--key", help="With --model: the key (default: the first one).")
        parser.add_argument("--hash", action="store_true", help="Read the model files whole.")

    def handle(self, *args: Any, **options: Any) -> None:
        if options["model"] is None:
            self._tell(examine(hash_files=options["hash"]))
            return
        credentials = read_credentials()
        url = options["url"] or (credentials.base_url if credentials else None)
        key = options["key"] or (credentials.api_key if credentials else None)
        if url is None or key is None:
            raise CommandError("Roundhouse was not started here yet: run `make up`, or give --url and --key.")
        self._tell(trace(options["model"], url=url, key=key))

    def _tell(self, findings: Iterable[Finding]) -> None:
        """Print each as it is found. Raises CommandError, exit status 1, when any is wrong."""
        well, wrong = self._marks()
        count = bad = 0
        for finding in findings:
            count += 1
            bad += not finding.well
            self.stdout.write(f"{well if finding.well else wrong} {finding.what}: {finding.said}")
            if finding.todo:
                self.stdout.write(f"    → {finding.todo}" if well == "✓" else f"    {finding.todo}")
            self.stdout.flush()
        if bad:
            raise CommandError(f"{bad} of {count} checks failed.")
        self.stdout.write("All is well.")

    def _marks(self) -> tuple[str, str]:
        encoding = getattr(self.stdout, "encoding", None) or "utf-8"
        try:
            "✓✗→…".encode(encoding)
        except (UnicodeEncodeError, LookupError):
            return "ok ", "BAD"
        return "✓", "✗"
