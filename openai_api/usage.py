"""GET /v1/organization/usage/completions, in OpenAI's shape: what the key's project used.

The same query as the usage page, in buckets of UTC. Pages are cut by buckets: the cursor is the start of
the next one.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import groupby, pairwise
from typing import Any

from django.db import Error as DatabaseError
from django.http import QueryDict
from rest_framework.request import Request
from rest_framework.response import Response
from rest_framework.views import APIView

from openai_api.auth import Key
from openai_api.errors import InvalidRequest, MissingKey, StorageAway
from registry.reports import Dimension, Figures, Row, UsageQuery, Width

ENDPOINTS = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages"})
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
    # There are no batches: every request is in the one group.
    "batch": frozenset(),
}
USER = "user-"


class CompletionsUsage(APIView):
    """What the project of the key that asks used, bucket by bucket."""

    def get(self, request: Request) -> Response:
        key: Any = request.user
        if not isinstance(key, Key):
            raise MissingKey
        asked = Asked.of(request._request.GET)
        try:
            return Response(asked.page(key.project_id))
        except DatabaseError as error:
            raise StorageAway from error


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """The query string, checked."""

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
    def of(cls, words: QueryDict) -> Asked:
        """Raises InvalidRequest with the name of the word that cannot be used."""
        start = _seconds(words, "start_time")
        if start is None:
            raise InvalidRequest("Missing required parameter: 'start_time'.", param="start_time")
        end = _seconds(words, "end_time")
        now = int(time.time()) + 1
        if end is not None and end <= start:
            raise InvalidRequest("'end_time' must be after 'start_time'.", param="end_time")
        width = words.get("bucket_width", "1d")
        if width not in BUCKETS:
            raise InvalidRequest("'bucket_width' must be one of 1m, 1h, 1d.", param="bucket_width")
        groups = _list(words, "group_by")
        for group in groups:
            if group not in GROUPS:
                raise InvalidRequest(f"'group_by' must be any of {', '.join(GROUPS)}.", param="group_by")
        projects = _list(words, "project_ids")
        # Whatever is no number is the id of no project.
        numbers = frozenset(int(text) for text in projects if text.isascii() and text.isdigit())
        keys = frozenset([*_list(words, "api_key_ids"), *_list(words, "user_ids")])
        models = frozenset(_list(words, "models"))
        page = words.get("page")
        if page:
            start = _cursor(page, start)
        return cls(
            start=start,
            end=end if end is not None else max(now, start + 1),
            bucket=BUCKETS[width],
            groups=frozenset(groups),
            limit=_limit(words, BUCKETS[width]),
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
            endpoints=ENDPOINTS,
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
            names = {
                "project_id": str(row.project_id),
                "user_id": row.key if row.key.startswith(USER) else None,
                "api_key_id": row.key,
                "model": row.model,
                "batch": False,
            }
            identity = tuple((name, value if name in self.groups else None) for name, value in names.items())
            sums.setdefault(identity, Figures()).add(row.figures)
        return [
            {
                "object": "organization.usage.completions.result",
                "input_tokens": figures.input_tokens,
                "output_tokens": figures.output_tokens,
                "input_cached_tokens": figures.cached_tokens,
                "input_audio_tokens": 0,
                "output_audio_tokens": 0,
                "num_model_requests": figures.requests,
                **dict(identity),
            }
            for identity, figures in sums.items()
        ]


def _list(words: QueryDict, name: str) -> list[str]:
    """OpenAI's client writes `name[]=a&name[]=b`, people write `name=a,b`."""
    texts = [*words.getlist(f"{name}[]"), *words.getlist(name)]
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
