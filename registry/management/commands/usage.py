"""`manage.py usage`: reports on a terminal, and the checks behind them."""

from __future__ import annotations

from argparse import ArgumentParser
from collections.abc import Iterator
from datetime import date, timedelta, tzinfo
from typing import Any, TypeVar

from django.conf import settings
from django.core.management.base import BaseCommand, CommandError

from registry.actions.prices import rerate
from registry.actions.rollups import HOUR, reconcile_usage, roll_up
from registry.costs import money_text
from registry.exports import FIGURES, Export
from registry.models import Project
from registry.querysets import database_now
from registry.reports import STATUS_WORDS, Dimension, UsageQuery, Width, midnight
from registry.usage_filters import dimension_of, zone_of

Value = TypeVar("Value", int, str)

DEFAULT_DAYS = 30
WIDTHS = {width.value: width for width in (Width.DAY, Width.HOUR)}
DIMENSIONS = {dimension.value: dimension for dimension in Dimension}


class Command(BaseCommand):
    help = "Report who used what, and hold the hourly sums against the ledger."

    def add_arguments(self, parser: ArgumentParser) -> None:
        verbs = parser.add_subparsers(dest="verb", required=True)
        report = verbs.add_parser("report", help="requests, errors and tokens")
        report.add_argument("--from", dest="first", type=_day, help="first day, such as 2026-11-01")
        report.add_argument("--to", dest="last", type=_day, help="last day, inclusive (default: today)")
        report.add_argument(
            "--by",
            default="day",
            help=f"comma-separated: {', '.join([*WIDTHS, *DIMENSIONS])} (default: day; '' for totals only)",
        )
        report.add_argument(
            "--zone", type=zone_of, help="time zone of the days (default: that of --project, else UTC)"
        )
        report.add_argument("--key", help="only the key of this public id")
        report.add_argument("--project", type=int, help="only the project of this number")
        report.add_argument("--model", "--route", help="only this model")
        report.add_argument("--endpoint", help="only this endpoint, such as /v1/embeddings")
        report.add_argument("--status", type=_status, help="only 429, 4xx, 5xx, errors, ...")
        report.add_argument("--format", choices=["table", "csv", "json", "ndjson"], default="table")
        again = verbs.add_parser("rerate", help="charge requests again, by the prices in force for them now")
        again.add_argument("--route", "--model", help="only this model")
        again.add_argument("--from", dest="first", type=_day, required=True, help="first day, of UTC")
        again.add_argument("--to", dest="last", type=_day, help="last day, inclusive (default: today)")
        again.add_argument("--apply", action="store_true", help="do it; without this it is only told")
        verbs.add_parser("roll-up", help="add up the hours that have ended; control does it each minute")
        check = verbs.add_parser("check", help="hold the hourly sums against the ledger's events")
        check.add_argument("--days", type=int, default=DEFAULT_DAYS, help="how far back (default: 30)")

    def handle(self, *, verb: str, **options: Any) -> None:
        match verb:
            case "report":
                self._report(**options)
            case "rerate":
                self._rerate(**options)
            case "roll-up":
                done = 0
                while rolled := roll_up():
                    done += rolled
                self.stdout.write(f"{done} hour(s) added up.")
            case "check":
                self._check(options["days"])

    def _report(self, **options: Any) -> None:
        words = [word for word in options["by"].split(",") if word]
        for word in words:
            if word not in WIDTHS and word not in DIMENSIONS and word != "route":
                raise CommandError(f"--by: {word!r} is none of {', '.join([*WIDTHS, *DIMENSIONS])}.")
        widths = [WIDTHS[word] for word in words if word in WIDTHS]
        if len(widths) > 1:
            raise CommandError("--by: choose day or hour, not both.")
        zone, now = options["zone"] or _zone_of_project(options["project"]), database_now()
        last = options["last"] or now.astimezone(zone).date()
        first = options["first"] or last - timedelta(days=DEFAULT_DAYS - 1)
        if last < first:
            raise CommandError("--to: the last day is before the first.")
        query = UsageQuery(
            start=midnight(first, zone),
            end=midnight(last + timedelta(days=1), zone),
            width=widths[0] if widths else None,
            by=frozenset(dimension_of(word) for word in words if word not in WIDTHS),
            zone=zone,
            keys=_only(options["key"]),
            projects=_only(options["project"]),
            models=_only(options["model"]),
            endpoints=_only(options["endpoint"]),
            statuses=_only(options["status"]),
        )
        export = Export(query=query, complete_to=now)
        match options["format"]:
            case "csv":
                pieces = export.csv()
            case "json":
                pieces = export.json()
            case "ndjson":
                pieces = export.ndjson()
            case _:
                pieces = _table(export)
        for piece in pieces:
            self.stdout.write(piece, ending="")

    def _rerate(self, *, route: str | None, first: date, last: date | None, apply: bool, **_: Any) -> None:
        utc = zone_of("UTC")
        last = last or database_now().astimezone(utc).date()
        since, until = midnight(first, utc), midnight(last + timedelta(days=1), utc)
        done = rerate(since=since, until=until, route=route, dry_run=not apply)
        difference = money_text(done.difference_micros, settings.ROUNDHOUSE_CURRENCY)
        verb = "were charged again" if apply else "would be charged again (--apply does it)"
        self.stdout.write(
            f"{done.corrected} of {done.events} request(s) {verb}; the difference is {difference}."
        )

    def _check(self, days: int) -> None:
        differences = reconcile_usage(since=database_now() - timedelta(days=days))
        for found in differences:
            self.stdout.write(
                f"{found.hour:%Y-%m-%d %H}:00 UTC{' and 24 hours' if found.length > HOUR else ''}: "
                f"the ledger has {found.events['requests']} request(s), "
                f"the sums said {found.rollups['requests']}; they will be added up again."
            )
        if differences:
            raise CommandError(f"{len(differences)} hour(s) differed. Reports read their events until then.")
        self.stdout.write(f"The hourly sums of {days} day(s) agree with the ledger.")


def _table(export: Export) -> Iterator[str]:
    columns = export.columns()
    lines = [[_printable(value) for value in record.values()] for record in export.records()]
    if not lines:
        yield "Nothing was used in this time.\n"
        return
    if export.query.width or export.query.by:
        total = export.query.total()
        numbers = [getattr(total, name, None) for name in columns]
        lines.append([f"{number:,}" if number is not None else "" for number in numbers])
        lines[-1][0] = "total"
    widths = [max(map(len, column)) for column in zip(columns, *lines, strict=True)]
    numeric = [name in FIGURES for name in columns]
    for line in [columns, *lines]:
        cells = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(line, widths, numeric, strict=True)
        )
        yield "  ".join(cells).rstrip() + "\n"
    yield f"Complete to {export.complete_to:%Y-%m-%d %H:%M:%S} UTC.\n"


def _printable(value: object) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "".join(char if char.isprintable() else "\ufffd" for char in str(value))


def _day(text: str) -> date:
    day = date.fromisoformat(text)
    if not 1970 <= day.year < 9999:
        raise ValueError("out of range")
    return day


def _status(text: str) -> str:
    if text not in STATUS_WORDS and not (len(text) == 3 and text.isascii() and text.isdigit()):
        raise ValueError(f"{text!r} is no status")
    return text


def _only(wanted: Value | None) -> frozenset[Value] | None:
    return frozenset({wanted}) if wanted else None


def _zone_of_project(number: int | None) -> tzinfo:
    if number is None:
        return zone_of("UTC")
    name = Project.objects.filter(pk=number).values_list("time_zone", flat=True).first()
    return zone_of(name or "UTC")
