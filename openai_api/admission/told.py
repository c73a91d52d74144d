"""What clients are told of limits: headers and sentences as OpenAI spells them."""

from __future__ import annotations

from typing import NamedTuple

from inference.http import Header
from openai_api.admission.rules import Rule
from openai_api.errors import RateLimited, TokensLimited
from registry.models import Metric

SHOULD_RETRY_MS = 60_000
"""Who would have to wait longer is told not to try again: clients' libraries would give up before."""
PARALLEL_WAIT_MS = 1_000
"""When a running request ends is not known: look again after this."""

_PER = {"second": "sec", "minute": "min", "hour": "hour", "day": "day"}
_COUNTED = {
    Metric.REQUESTS: ("requests", "R"),
    Metric.TOKENS: ("tokens", "T"),
    Metric.INPUT_TOKENS: ("input tokens", "IT"),
    Metric.OUTPUT_TOKENS: ("output tokens", "OT"),
}


class Standing(NamedTuple):
    """How a request found a limit, or left it."""

    rule: Rule
    remaining: int
    reset_ms: int
    used: int = 0
    requested: int = 0
    wait_ms: int = 0
    """How long until what was refused has room; 0: it was not refused by this limit."""


def duration(milliseconds: int) -> str:
    """As Go writes them, and so OpenAI: `0s`, `4ms`, `8.64s`, `6m0s`, `1h0m0s`."""
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    seconds, rest = divmod(milliseconds, 1000)
    minutes, seconds = divmod(seconds, 60)
    hours, minutes = divmod(minutes, 60)
    text = f"{seconds}.{rest:03}".rstrip("0") + "s" if rest else f"{seconds}s"
    if hours:
        return f"{hours}h{minutes}m{text}"
    return f"{minutes}m{text}" if minutes else text


def rate_headers(requests: Standing | None, tokens: Standing | None) -> list[Header]:
    """How much is left, of requests and of tokens."""
    headers: list[Header] = []
    if requests is not None:
        headers = [
            (b"x-ratelimit-limit-requests", b"%d" % requests.rule.burst),
            (b"x-ratelimit-remaining-requests", b"%d" % requests.remaining),
            (b"x-ratelimit-reset-requests", duration(requests.reset_ms).encode()),
        ]
    if tokens is not None:
        headers += [
            (b"x-ratelimit-limit-tokens", b"%d" % tokens.rule.burst),
            (b"x-ratelimit-remaining-tokens", b"%d" % tokens.remaining),
            (b"x-ratelimit-reset-tokens", duration(tokens.reset_ms).encode()),
        ]
    return headers


def tightest(standings: list[Standing]) -> Standing | None:
    """The one to show of several: what refuses longest, else what has least left."""
    if len(standings) == 1:
        return standings[0]
    return min(standings, key=lambda one: (-one.wait_ms, one.remaining, -one.reset_ms), default=None)


def headers_of(standings: list[Standing]) -> list[Header]:
    requests: list[Standing] = []
    tokens: list[Standing] = []
    for one in standings:
        if one.rule.metric == Metric.REQUESTS:
            requests.append(one)
        elif one.rule.metric != Metric.PARALLEL:
            tokens.append(one)
    return rate_headers(tightest(requests), tightest(tokens))


def refusal(model: str, standings: list[Standing]) -> RateLimited:
    """What to answer: names the limit that holds longest, and when to come again."""
    worst = max(standings, key=lambda one: one.wait_ms)
    headers = headers_of(standings)
    headers += [
        (b"retry-after", b"%d" % max(1, -(-worst.wait_ms // 1000))),
        (b"retry-after-ms", b"%d" % worst.wait_ms),
        (b"x-should-retry", b"true" if worst.wait_ms <= SHOULD_RETRY_MS else b"false"),
    ]
    requests = worst.rule.metric in (Metric.REQUESTS, Metric.PARALLEL)
    return (RateLimited if requests else TokensLimited)(_sentence(model, worst), headers)


def _sentence(model: str, worst: Standing) -> str:
    rule = worst.rule
    if rule.metric == Metric.PARALLEL:
        what, at_once = "parallel requests", ""
    else:
        counted, short = _COUNTED[rule.metric]
        what = f"{counted} per {_PER[rule.per]} ({short}P{rule.per[0].upper()})"
        at_once = f" ({rule.burst} at once)" if rule.burst != rule.amount else ""
    return (
        f"Rate limit reached for `{model}` in {rule.subject} on {what}: Limit {rule.amount}{at_once}, "
        f"Used {worst.used}, Requested {worst.requested}. Please try again in {duration(worst.wait_ms)}."
    )
