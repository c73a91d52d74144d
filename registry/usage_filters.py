"""What the usage page's URL asks, checked."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, tzinfo
from typing import Any
from urllib.parse import urlencode
from zoneinfo import ZoneInfo

from django import forms
from django.contrib.auth import get_user_model

from registry.models import Project
from registry.reports import STATUS_WORDS, Dimension, UsageQuery, Width, midnight

DEFAULT_DAYS = 30
MAX_DAYS = {Width.DAY: 400, Width.HOUR: 31}
CONTENT_TYPES = {
    "csv": "text/csv; charset=utf-8",
    "json": "application/json",
    "ndjson": "application/x-ndjson",
}
NARROWING = ("project", "model", "endpoint")
"""Filters that the page offers as menus, from what there is without them."""


def dimension_of(word: str) -> Dimension:
    """Raises ValueError. A route is what clients call a model."""
    return Dimension("model" if word == "route" else word)


def zone_of(name: str) -> tzinfo:
    """Raises ValueError."""
    if name == "UTC":
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, OSError) as error:
        raise ValueError(f"{name!r} is no time zone") from error


class Filters(forms.Form):
    """What the URL asks. Everything has a default."""

    project = forms.IntegerField(required=False, min_value=1, max_value=2**63 - 1)
    user = forms.CharField(required=False, max_length=150)
    key = forms.CharField(required=False, max_length=16)
    model = forms.CharField(required=False, max_length=120)
    endpoint = forms.CharField(required=False, max_length=64)
    status = forms.RegexField(
        rf"\A({'|'.join(STATUS_WORDS)}|[1-5][0-9][0-9])\Z",
        required=False,
        error_messages={"invalid": "Name a status such as 429, or 4xx, 5xx or errors."},
    )
    zone = forms.CharField(required=False, max_length=64)
    width = forms.ChoiceField(required=False, choices=[(width.value, "") for width in MAX_DAYS])
    split = forms.CharField(required=False, max_length=64)
    format = forms.ChoiceField(required=False, choices=[(name, "") for name in CONTENT_TYPES])
    view = forms.ChoiceField(required=False, choices=[("requests", "")])
    after = forms.RegexField(
        r"\A[0-9]{1,17}_[0-9]{1,18}\Z",
        required=False,
        error_messages={"invalid": "Take it from the link to older requests."},
    )

    def __init__(self, data: Any, now: datetime, *, everybody: bool) -> None:
        super().__init__(data)
        self._now = now
        self._everybody = everybody
        # `from` is a word of Python's.
        self.fields["from"] = forms.DateField(required=False)
        self.fields["to"] = forms.DateField(required=False)

    def clean_user(self) -> str:
        name: str = self.cleaned_data["user"]
        # Who may not ask for everybody is not told who there is.
        if name and self._everybody and not get_user_model().objects.filter(username=name).exists():
            raise forms.ValidationError("There is no person of this name.")
        return name

    def clean_zone(self) -> tzinfo:
        name = self.cleaned_data["zone"]
        if not name and (project := self.cleaned_data.get("project")):
            # A project's days are those of its budgets.
            name = Project.objects.filter(pk=project).values_list("time_zone", flat=True).first()
        try:
            return zone_of(name or "UTC")
        except ValueError as error:
            raise forms.ValidationError("Name a time zone such as UTC or Europe/Vienna.") from error

    def clean_split(self) -> frozenset[Dimension]:
        text = self.cleaned_data["split"] if "split" in self.data else "key,model"
        try:
            return frozenset(dimension_of(word) for word in text.split(",") if word)
        except ValueError as error:
            allowed = ", ".join(dimension.value for dimension in Dimension)
            raise forms.ValidationError(f"Split by any of {allowed}.") from error

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = self.cleaned_data
        if self.errors:
            return cleaned
        width = cleaned["width"] = Width(cleaned["width"] or "day")
        last = cleaned["to"] = cleaned["to"] or self._now.astimezone(cleaned["zone"]).date()
        default = DEFAULT_DAYS if width is Width.DAY else 2
        try:
            first = cleaned["from"] = cleaned["from"] or last - timedelta(days=default - 1)
            days = (last - first).days + 1
            # Room for the period before and for every time zone.
            first - timedelta(days=days + 1), last + timedelta(days=2)
        except OverflowError:
            raise forms.ValidationError({"from": "That is too far away."}) from None
        if days < 1:
            self.add_error("to", "The last day is before the first.")
        elif days > MAX_DAYS[width]:
            self.add_error(
                "from", f"At most {MAX_DAYS[width]} days can be shown by {width.value}; this is {days}."
            )
        return cleaned


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """A valid question, and who may see what of the answer."""

    first: date
    last: date
    """Inclusive."""
    width: Width
    zone: tzinfo
    project: int | None
    user: str
    key: str
    model: str
    endpoint: str
    status: str
    split: frozenset[Dimension]
    visible: frozenset[str] | None
    """Keys that may be seen; None: all."""

    @property
    def days(self) -> int:
        return (self.last - self.first).days + 1

    def query(self, *without: str, days_back: int = 0) -> UsageQuery:
        """The report's range and filters, but those named."""
        back = timedelta(days=days_back)

        def only(name: str, value: Any) -> frozenset[Any] | None:
            return frozenset({value}) if value and name not in without else None

        return UsageQuery(
            start=midnight(self.first - back, self.zone),
            end=midnight(self.last - back + timedelta(days=1), self.zone),
            zone=self.zone,
            keys=only("key", self.key) or self.visible,
            projects=only("project", self.project),
            models=only("model", self.model),
            endpoints=only("endpoint", self.endpoint),
            statuses=only("status", self.status),
        )

    def words(self) -> dict[str, str]:
        """The question as it stands in the URL, defaults included."""
        return {
            "from": self.first.isoformat(),
            "to": self.last.isoformat(),
            "width": self.width.value,
            "zone": str(self.zone),
            "project": str(self.project or ""),
            "user": self.user,
            "key": self.key,
            "model": self.model,
            "endpoint": self.endpoint,
            "status": self.status,
        }

    def url(self, **changes: str) -> str:
        """The query string of this report with some words changed; empty ones are left out."""
        words = self.words()
        if self.width is Width.DAY:
            del words["width"]
        if self.zone is UTC and not self.project:
            del words["zone"]
        return "?" + urlencode({name: value for name, value in (words | changes).items() if value})
