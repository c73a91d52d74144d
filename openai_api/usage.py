"""GET /v1/organization/usage/{completions,embeddings} and /v1/organization/costs, in OpenAI's shape: what
the key's project used.

The same query as the usage page, in buckets of UTC. Pages are cut by buckets: the cursor is the start of
the next one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise
from typing import Any

from django.conf import settings
from django.db import Error as DatabaseError
from django.http import QueryDict
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from openai_api.auth import Key
from openai_api.errors import InvalidRequest, MissingKey, StorageAway
from openai_api.views import READ
from registry.reports import Dimension, Figures, Row, UsageQuery, Width
from registry.rights import Scope

CURSOR = "page_"
LATEST = 253_402_300_799
"""The last second of the year 9999."""


@dataclass(frozen=True, slots=True)
class _Bucket:
    width: Width
    length: timedelta
    default: int
    most: int


BUCKETS = {
    "1m": _Bucket(Width.MINUTE, timedelta(minutes=1), 60, 1440),
    "1h": _Bucket(Width.HOUR, timedelta(hours=1), 24, 168),
    "1d": _Bucket(Width.DAY, timedelta(days=1), 7, 31),
}
GROUPS: dict[str, frozenset[Dimension]] = {
    "project_id": frozenset({Dimension.PROJECT}),
    "api_key_id": frozenset({Dimension.KEY}),
    # A person's chats are accounted under a key of their own.
    "user_id": frozenset({Dimension.KEY}),
    "model": frozenset({Dimension.MODEL}),
    "line_item": frozenset({Dimension.MODEL}),
    # There are no batches: every request is in the one group.
    "batch": frozenset(),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kind:
    """What one of the URLs tells of its rows."""

    object: str
    groups: tuple[str, ...]
    """Words of `group_by`, each a field of a result."""
    endpoints: frozenset[str] | None = None
    """None: whatever was asked."""
    buckets: Mapping[str, _Bucket] = field(default_factory=lambda: BUCKETS)
    figures: Callable[[Figures], dict[str, Any]]


def _tokens(figures: Figures) -> dict[str, Any]:
    return {
        "input_tokens": figures.input_tokens,
        "output_tokens": figures.output_tokens,
        "input_cached_tokens": figures.cached_tokens,
        "input_audio_tokens": 0,
        "output_audio_tokens": 0,
        "num_model_requests": figures.requests,
    }


def _embedded(figures: Figures) -> dict[str, Any]:
    return {"input_tokens": figures.input_tokens, "num_model_requests": figures.requests}


def _amount(figures: Figures) -> dict[str, Any]:
    currency = settings.ROUNDHOUSE_CURRENCY.lower()
    return {"amount": {"value": figures.cost_micros / 1_000_000, "currency": currency}}


COMPLETIONS = _Kind(
    object="organization.usage.completions.result",
    groups=("project_id", "user_id", "api_key_id", "model", "batch"),
    endpoints=frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"}),
    figures=_tokens,
)
EMBEDDINGS = _Kind(
    object="organization.usage.embeddings.result",
    groups=("project_id", "user_id", "api_key_id", "model"),
    endpoints=frozenset({"/v1/embeddings"}),
    figures=_embedded,
)
COSTS = _Kind(
    object="organization.costs.result",
    groups=("line_item", "project_id", "api_key_id"),
    buckets={"1d": _Bucket(Width.DAY, timedelta(days=1), 7, 180)},
    figures=_amount,
)
USER = "user-"


class _Usage(APIView):
    """What the project of the key that asks used, bucket by bucket."""

    scope = Scope.USAGE.value
    kind: _Kind
    http_method_names = READ

    def get(self, request: Request) -> Response:
        key: Any = request.user
        if not isinstance(key, Key):
            raise MissingKey
        asked = Asked.of(request._request.GET, self.kind)
        try:
            return Response(asked.page(key.project_id))
        except DatabaseError as error:
            raise StorageAway from error


class CompletionsUsage(_Usage):
    """What was generated."""

    kind = COMPLETIONS


class EmbeddingsUsage(_Usage):
    """What was embedded."""

    kind = EMBEDDINGS


class Costs(_Usage):
    """What all of it cost, by the day."""

    kind = COSTS


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The query string, checked."""

    kind: _Kind
    start: int
    end: int
    bucket: _Bucket
    groups: frozenset[str]
    limit: int
    projects: frozenset[int] | None
    keys: frozenset[str] | None
    models: frozenset[str] | None
    batch: bool | None

    @classmethod
    def of(cls, words: QueryDict, kind: _Kind) -> Asked:
        """Raises InvalidRequest with the name of the word that cannot be used."""
        start = _seconds(words, "start_time")
        if start is None:
            raise InvalidRequest("Missing required parameter: 'start_time'.", param="start_time")
        end = _seconds(words, "end_time")
        now = int(time.time()) + 1
        if end is not None and end <= start:
            raise InvalidRequest("'end_time' must be after 'start_time'.", param="end_time")
        width = words.get("bucket_width", "1d")
        if width not in kind.buckets:
            allowed = ", ".join(kind.buckets)
            raise InvalidRequest(f"'bucket_width' must be one of {allowed}.", param="bucket_width")
        groups = _list(words, "group_by")
        for group in groups:
            if group not in kind.groups:
                allowed = ", ".join(kind.groups)
                raise InvalidRequest(f"'group_by' must be any of {allowed}.", param="group_by")
        projects = _list(words, "project_ids")
        # Whatever is no number is the id of no project.
        numbers = frozenset(int(text) for text in projects if text.isascii() and text.isdigit())
        keys = frozenset([*_list(words, "api_key_ids"), *_list(words, "user_ids")])
        models = frozenset(_list(words, "models"))
        page = words.get("page")
        if page:
            start = _cursor(page, start)
        return cls(
            kind=kind,
            start=start,
            end=end if end is not None else max(now, start + 1),
            bucket=kind.buckets[width],
            groups=frozenset(groups),
            limit=_limit(words, kind.buckets[width]),
            projects=numbers if projects else None,
            keys=keys or None,
            models=models or None,
            batch={"true": True, "false": False}.get(words.get("batch", "").lower()),
        )

    def page(self, project_id: int) -> dict[str, Any]:
        """The answer, for this project only."""
        edges, more = self._edges()
        visible = frozenset({project_id}) & (self.projects if self.projects is not None else {project_id})
        query = UsageQuery(
            start=_instant(edges[0]),
            end=_instant(edges[-1]),
            width=self.bucket.width,
            by=frozenset[Dimension]().union(*(GROUPS[group] for group in self.groups)),
            projects=visible,
            keys=self.keys,
            models=self.models,
            endpoints=self.kind.endpoints,
        )
        # Nothing here is a batch.
        rows = () if self.batch else query.rows()
        found = {int(start.timestamp()): list(of) for start, of in groupby(rows, key=lambda row: row.start)}
        return {
            "object": "page",
            "data": [
                {
                    "object": "bucket",
                    "start_time": start,
                    "end_time": end,
                    "results": self._results(found.get(start, ())),
                }
                for start, end in pairwise(edges)
            ],
            "has_more": more,
            "next_page": f"{CURSOR}{edges[-1]}" if more else None,
        }

    def _edges(self) -> tuple[list[int], bool]:
        """Where buckets begin and end: at whole minutes, hours and days of UTC, cut off by the range."""
        length = int(self.bucket.length.total_seconds())
        edges = [self.start]
        while edges[-1] < self.end and len(edges) <= self.limit:
            edges.append(min((edges[-1] // length + 1) * length, self.end))
        return edges, edges[-1] < self.end

    def _results(self, rows: Iterable[Row]) -> list[dict[str, Any]]:
        sums: dict[tuple[tuple[str, Any], ...], Figures] = {}
        for row in rows:
            if not (row.figures.requests or row.figures.cost_micros):
                continue
            names = {
                "project_id": str(row.project_id),
                "user_id": row.key if row.key.startswith(USER) else None,
                "api_key_id": row.key,
                "model": row.model,
                "line_item": row.model,
                "batch": False,
            }
            identity = tuple(
                (name, names[name] if name in self.groups else None) for name in self.kind.groups
            )
            sums.setdefault(identity, Figures()).add(row.figures)
        return [
            {"object": self.kind.object, **self.kind.figures(figures), **dict(identity)}
            for identity, figures in sums.items()
        ]


def _list(words: QueryDict, name: str) -> list[str]:
    """OpenAI's client writes `name[]=a&name[]=b`, people write `name=a,b`."""
    texts = [*words.getlist(f"{name}[]"), *words.getlist(name)]
    if any("\x00" in text for text in texts):
        # PostgreSQL would refuse to be asked.
        raise InvalidRequest(f"'{name}' has a NUL character.", param=name)
    return [part for text in texts for part in text.split(",") if part]


def _seconds(words: QueryDict, name: str) -> int | None:
    text = words.get(name, "")
    if not text:
        return None
    if not (text.isascii() and text.isdigit() and int(text[:12]) <= LATEST and len(text) <= 12):
        raise InvalidRequest(f"'{name}' must be a time in seconds since 1970.", param=name)
    return int(text)


def _limit(words: QueryDict, bucket: _Bucket) -> int:
    text = words.get("limit", "")
    if not text:
        return bucket.default
    if not (text.isascii() and text.isdigit() and len(text) <= 4 and 1 <= int(text) <= bucket.most):
        raise InvalidRequest(f"'limit' must be from 1 to {bucket.most} for this bucket_width.", param="limit")
    return int(text)


def _cursor(page: str, start: int) -> int:
    number = page.removeprefix(CURSOR)
    if not (number.isascii() and number.isdigit() and len(number) <= 12 and start < int(number) <= LATEST):
        raise InvalidRequest("'page' must be the 'next_page' of an earlier answer.", param="page")
    return int(number)


def _instant(seconds: int) -> datetime:
    return datetime.fromtimestamp(seconds, UTC)
