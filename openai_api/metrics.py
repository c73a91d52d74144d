"""Counters of one gateway, and their text for Prometheus.

Recording is a few additions on the event loop, no lock and no library: the whole of it costs a request
about two microseconds. Labels are bounded: a route's name is one only when the route exists.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from registry.states import WORKER_LIVE

if TYPE_CHECKING:
    from openai_api.gateway import Gateway

CONTENT_TYPE = b"text/plain; version=0.0.4; charset=utf-8"

SECONDS = (*(0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 120.0, 300.0, 600.0),)
"""Upper bounds of the histograms' buckets."""


class _Traffic:
    """What one route answered at one endpoint."""

    __slots__ = (
        *("cached", "completion", "first", "first_sum", "prompt", "queued", "queued_sum"),
        *("statuses", "whole", "whole_sum"),
    )

    def __init__(self) -> None:
        self.statuses: dict[int, int] = {}
        self.prompt = 0
        self.cached = 0
        self.completion = 0
        self.first = [0] * (len(SECONDS) + 1)
        self.first_sum = 0.0
        self.whole = [0] * (len(SECONDS) + 1)
        self.whole_sum = 0.0
        self.queued = [0] * (len(SECONDS) + 1)
        self.queued_sum = 0.0


class Meter:
    """Counts ended requests. One event loop owns it."""

    def __init__(self) -> None:
        self._traffic: dict[tuple[str, str], _Traffic] = {}
        self.continued = 0
        """Streams that went on with another worker."""
        self.interrupted = 0
        """Streams whose worker broke off and nobody could go on."""

    def note(
        self,
        route: str,
        endpoint: str,
        status: int,
        seconds: float,
        first_seconds: float | None,
        queue_seconds: float,
        prompt: int,
        cached: int,
        completion: int,
    ) -> None:
        """A request has ended. `route` is "" when it named none that exists or that its key may use;
        `first_seconds` is the time to the first token of a streamed answer, else None."""
        traffic = self._traffic.get((route, endpoint))
        if traffic is None:
            traffic = self._traffic[route, endpoint] = _Traffic()
        traffic.statuses[status] = traffic.statuses.get(status, 0) + 1
        traffic.prompt += prompt
        traffic.cached += cached
        traffic.completion += completion
        traffic.whole[bisect_left(SECONDS, seconds)] += 1
        traffic.whole_sum += seconds
        traffic.queued[bisect_left(SECONDS, queue_seconds)] += 1
        traffic.queued_sum += queue_seconds
        if first_seconds is not None:
            traffic.first[bisect_left(SECONDS, first_seconds)] += 1
            traffic.first_sum += first_seconds

    def lines(self) -> Iterator[str]:
        shown = [({"route": route, "endpoint": end}, one) for (route, end), one in self._traffic.items()]
        yield from _head(
            "requests_total", "counter", "Ended requests, by status class (a client that left: 4xx)."
        )
        for labels, traffic in shown:
            classes: Counter[str] = Counter()
            for status, count in traffic.statuses.items():
                classes[f"{status // 100}xx"] += count
            for status_class, count in sorted(classes.items()):
                yield _line("requests_total", labels | {"status": status_class}, count)
        for name, told, attribute in (
            ("prompt_tokens_total", "Tokens in.", "prompt"),
            ("cached_prompt_tokens_total", "Tokens in that a worker had in its cache.", "cached"),
            ("completion_tokens_total", "Tokens out.", "completion"),
        ):
            yield from _head(name, "counter", told)
            for labels, traffic in shown:
                yield _line(name, labels, getattr(traffic, attribute))
        name = "time_to_first_token_seconds"
        yield from _head(name, "histogram", "From the request to the first token of a streamed answer.")
        for labels, traffic in shown:
            yield from _histogram(name, labels, traffic.first, traffic.first_sum)
        name = "queue_time_seconds"
        yield from _head(name, "histogram", "Waited for a free worker; nearly all wait less than the least.")
        for labels, traffic in shown:
            yield from _histogram(name, labels, traffic.queued, traffic.queued_sum)
        name = "e2e_request_latency_seconds"
        yield from _head(name, "histogram", "From the request to the end of its answer.")
        for labels, traffic in shown:
            yield from _histogram(name, labels, traffic.whole, traffic.whole_sum)
        name = "continuations_total"
        yield from _head(name, "counter", "Streams whose worker broke off: did another one go on?")
        yield _line(name, {"continued": "true"}, self.continued)
        yield _line(name, {"continued": "false"}, self.interrupted)


def render(gateway: Gateway, *, version: str) -> bytes:
    """Everything this gateway knows, as Prometheus text. Asks neither the database nor a worker."""
    lines = [
        *_head("gateway_info", "gauge", "1, with the gateway's name and version as labels."),
        _line("gateway_info", {"gateway": gateway.name, "version": version}, 1),
        *gateway.meter.lines(),
        *_gauge("requests_in_flight", "Requests that are being answered here.", [({}, gateway.active)]),
        *_gauge(
            "requests_waiting",
            "Requests queued here because every worker of the deployment is busy.",
            [
                ({"deployment": one.name}, gateway.dispatcher.waiting(one.id))
                for one in gateway.fleet.deployments
            ],
        ),
        *_gauge(
            "tokens_waiting",
            "What those requests ask for, in tokens of prompts; a generated one counts as four.",
            [
                ({"deployment": one.name}, gateway.dispatcher.waiting_work(one.id))
                for one in gateway.fleet.deployments
            ],
        ),
        *_head("queue_refused_total", "counter", "Requests that got no worker, by reason."),
        *(
            _line("queue_refused_total", {"reason": reason}, count)
            for reason, count in gateway.dispatcher.refused.items()
        ),
        *_gauge(
            "worker_requests",
            "Requests that this gateway has at a worker.",
            [({"worker": one.worker.name}, one.leases) for one in gateway.fleet.tallies.values()],
        ),
        *_head("dispatched_total", "counter", "Requests that this gateway gave to a worker."),
        *(
            _line("dispatched_total", {"worker": one.worker.name}, one.given)
            for one in gateway.fleet.tallies.values()
        ),
        *_gauge(
            "workers",
            "Live workers by state.",
            [({"state": str(state)}, gateway.fleet.states.get(state, 0)) for state in sorted(WORKER_LIVE)],
        ),
        *_gauge(
            "deployment_ready_workers",
            "Workers of a deployment that may get requests.",
            [({"deployment": one.name}, len(one.workers)) for one in gateway.fleet.deployments],
        ),
        *_gauge(
            "worker_ejected",
            "1 while a worker failed so often that requests go to others.",
            [
                ({"worker": one.worker.name}, 0 if one.breaker_closed else 1)
                for one in gateway.fleet.tallies.values()
            ],
        ),
        *_head("retries_total", "counter", "Requests that went to another worker, or might not any more."),
        _line("retries_total", {"granted": "true"}, gateway.dispatcher.retries.granted),
        _line("retries_total", {"granted": "false"}, gateway.dispatcher.retries.refused),
        *_gauge(
            "spool_pending",
            "Ended requests that are not in the database yet.",
            [({}, gateway.spool.pending)] if gateway.started else [],
        ),
        *_gauge(
            "database_away_seconds",
            "For how long the database has not answered; 0 while it does.",
            [({}, gateway.fleet.database_away_seconds)],
        ),
    ]
    return ("\n".join(lines) + "\n").encode()


def _gauge(name: str, told: str, values: Iterable[tuple[Mapping[str, str], float]]) -> Iterator[str]:
    yield from _head(name, "gauge", told)
    for labels, value in values:
        yield _line(name, labels, value)


def _head(name: str, kind: str, told: str) -> Iterator[str]:
    yield f"# HELP roundhouse_{name} {told}"
    yield f"# TYPE roundhouse_{name} {kind}"


def _line(name: str, labels: Mapping[str, str], value: float) -> str:
    inside = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
    return f"roundhouse_{name}{{{inside}}} {value}" if inside else f"roundhouse_{name} {value}"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def _histogram(name: str, labels: Mapping[str, str], counts: list[int], total: float) -> Iterator[str]:
    so_far = 0
    for bound, count in zip((*SECONDS, "+Inf"), counts, strict=True):
        so_far += count
        yield _line(f"{name}_bucket", {**labels, "le": str(bound)}, so_far)
    yield _line(f"{name}_sum", labels, round(total, 6))
    yield _line(f"{name}_count", labels, so_far)
