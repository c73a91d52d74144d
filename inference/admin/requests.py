"""Accounted requests, and how the latest of them were dispatched."""

from __future__ import annotations

from django.contrib import admin
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from inference.dispatch.explanations import KEPT, LATEST, Explanation, Step
from registry.admin.records import UsageEventAdmin
from registry.models import UsageEvent

FORGOTTEN = (
    f"Not known any more, or answered by another gateway: each gateway remembers its latest {KEPT} requests, "
    "until it ends."
)


@admin.register(UsageEvent)
class RequestAdmin(UsageEventAdmin):
    readonly_fields = ["dispatch"]

    @admin.display(description="how it was dispatched")
    def dispatch(self, obj: UsageEvent) -> SafeString | str:
        explanation = LATEST.get(obj.request_id)
        return (
            FORGOTTEN
            if explanation is None
            else format_html("{}{}", _times(explanation), _steps(explanation))
        )


def _times(told: Explanation) -> SafeString:
    first = "no byte came" if told.first_seconds is None else f"first byte after {_ms(told.first_seconds)}"
    session = ", in a session" if told.session else ""
    return format_html(
        "<p>Key known after {}, {}, ended after {}. About {} tokens of prompt{}.</p>",
        _ms(told.auth_seconds),
        first,
        _ms(told.total_seconds),
        told.prompt_tokens,
        session,
    )


def _steps(told: Explanation) -> SafeString:
    return format_html_join("", "{}", ((_step(number, one),) for number, one in enumerate(told.steps, 1)))


def _step(number: int, step: Step) -> SafeString:
    choice = step.choice
    waited = f", after {_ms(step.queue_seconds)} in the queue" if step.queue_seconds else ""
    cached = f", about {choice.cached_tokens} tokens in its cache" if choice.cached_tokens else ""
    rows = format_html_join(
        "",
        "<tr><td>{}{}</td><td>{}</td><td>{}</td><td>{}</td></tr>",
        (
            (
                "→ " if one.worker == choice.chosen else "",
                one.worker,
                f"{one.load:.1f}",
                f"{one.work:.0f}",
                f"{one.speed:.0f} tokens/s" if one.speed else "not known",
            )
            for one in choice.candidates
        ),
    )
    return format_html(
        "<p>{}. {} of {}, by {}{}{}{}.</p><table><thead><tr><th>Free worker</th><th>Requests</th>"
        "<th>Tokens to do</th><th>Speed</th></tr></thead><tbody>{}</tbody></table>",
        number,
        choice.chosen,
        choice.deployment,
        choice.policy,
        waited,
        cached,
        f". It failed: {step.failed}" if step.failed else "",
        rows,
    )


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:.1f} ms"
