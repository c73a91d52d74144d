"""Notices of budgets: found in the database, told by mail and web hook, each once per period.

A notice is a row first: what cannot be sent now is tried again, and two controls never send the same one,
for each try is claimed by compare-and-set before it is made.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from typing import Any

from django.conf import settings
from django.core.mail import EmailMessage
from django.db import transaction
from django.db.models import F, Q

from registry.actions.budgets import amount_text
from registry.actions.events import record_event
from registry.models import Budget, BudgetNotice, BudgetPeriod
from registry.models.budget import THRESHOLDS, BudgetUnit
from registry.querysets import database_now
from registry.webhooks import post_json

logger = logging.getLogger("roundhouse.budgets")

ENDED_TOLD = timedelta(hours=1)
"""A period that ended not longer ago may still get its notice."""
TRIES = 8
"""Over two hours; then it is given up, and the timeline of the budget says so."""
FIRST_PAUSE = timedelta(minutes=1)
SEND_SECONDS = 20.0
"""Of one call; what is left comes with the next."""

Mailer = Callable[[str, str, list[str]], None]
Poster = Callable[[str, Mapping[str, Any]], None]


def send_mail(subject: str, text: str, recipients: list[str]) -> None:
    """Raises OSError (smtplib's errors are some)."""
    EmailMessage(subject, text, settings.DEFAULT_FROM_EMAIL, recipients).send()


def note_thresholds() -> int:
    """Make a notice of each period that has reached a threshold; returns how many.

    Of several thresholds that were reached since the last look only the highest is told.
    """
    now = database_now()
    running = Q(start__lte=now) & (Q(end__isnull=True) | Q(end__gt=now - ENDED_TOLD))
    periods = BudgetPeriod.objects.filter(running, budget__limit__gt=0).select_related("budget")
    # The lowest threshold; in integers, and without leaving 64 bits.
    reached = periods.filter(spent__gte=F("budget__limit") * THRESHOLDS[0] / 100)
    made = 0
    for period in reached.prefetch_related("notices"):
        percent = 100 * period.spent // period.budget.limit
        known = {notice.percent for notice in period.notices.all()}
        new = [threshold for threshold in THRESHOLDS if threshold not in known and threshold <= percent]
        if new:
            made += _make_notices(period, new, now)
    return made


def _make_notices(period: BudgetPeriod, new: list[int], now: datetime) -> int:
    budget = period.budget
    notices = []
    for threshold in new:
        notice = BudgetNotice(budget_period=period, percent=threshold, spent=period.spent)
        if threshold == max(new):
            notice.mail_open = bool(budget.mail_to) and settings.ROUNDHOUSE_MAIL
            notice.webhook_open = bool(budget.webhook_url)
            notice.next_try_at = now if notice.mail_open or notice.webhook_open else None
        notices.append(notice)
    with transaction.atomic():
        # Another control may be at the same: the constraint lets one have each.
        BudgetNotice.objects.bulk_create(notices, ignore_conflicts=True)
    logger.warning(
        "%s has used %d %% of its limit",
        budget,
        max(new),
        extra={"event": "budget_threshold", "budget": budget.pk, "percent": max(new)},
    )
    return len(notices)


def deliver_notices(*, mail: Mailer = send_mail, post: Poster = post_json) -> int:
    """Send what is due, for at most `SEND_SECONDS`; returns how many notices were delivered whole."""
    deadline = time.monotonic() + SEND_SECONDS
    delivered = 0
    while time.monotonic() < deadline:
        notice = _claim_next()
        if notice is None:
            break
        delivered += _deliver(notice, mail, post)
    return delivered


def _claim_next() -> BudgetNotice | None:
    """The next one due, its next try put off already: whoever else looks does not find it."""
    now = database_now()
    # Uses index budget_notice_open_idx.
    due = BudgetNotice.objects.filter(next_try_at__lte=now).order_by("next_try_at", "pk")
    for notice in due.select_related("budget_period__budget")[:10]:
        pause = FIRST_PAUSE * 2**notice.tries
        claimed = BudgetNotice.objects.filter(pk=notice.pk, next_try_at=notice.next_try_at)
        if claimed.update(next_try_at=now + pause, tries=F("tries") + 1):
            notice.tries += 1
            return notice
    return None


def _deliver(notice: BudgetNotice, mail: Mailer, post: Poster) -> bool:
    budget = notice.budget_period.budget
    if notice.mail_open:
        subject, text = _mail_of(notice)
        recipients = [address.strip() for address in budget.mail_to.split(",") if address.strip()]
        notice.mail_open = not _tried(budget, "mail", lambda: mail(subject, text, recipients))
    if notice.webhook_open:
        payload = _payload_of(notice)
        notice.webhook_open = not _tried(budget, "web hook", lambda: post(budget.webhook_url, payload))
    done = not notice.mail_open and not notice.webhook_open
    facts: dict[str, Any] = {"mail_open": notice.mail_open, "webhook_open": notice.webhook_open}
    if done or notice.tries >= TRIES:
        facts["next_try_at"] = None
    BudgetNotice.objects.filter(pk=notice.pk).update(**facts)
    if not done and notice.tries >= TRIES:
        ways = " and ".join(
            way for way, is_open in (("mail", notice.mail_open), ("web hook", notice.webhook_open)) if is_open
        )
        record_event(budget, "notice given up", reason=f"{notice.percent} %, by {ways}", by="control")
    return done


def _tried(budget: Budget, way: str, send: Callable[[], None]) -> bool:
    try:
        send()
    except Exception as error:
        # Neither the error's text nor a trace: an address or a URL in it may carry a secret.
        logger.warning(
            "a notice of budget %d could not be sent by %s: %s",
            budget.pk,
            way,
            type(error).__name__,
            extra={"event": "notice_failed", "budget": budget.pk, "way": way},
        )
        return False
    return True


def _mail_of(notice: BudgetNotice) -> tuple[str, str]:
    period, budget = notice.budget_period, notice.budget_period.budget
    name = f"{budget.scope} {budget.subject_name or budget.subject}"
    begins = f"It begins anew at {period.end:%Y-%m-%d %H:%M} UTC." if period.end else "It never begins anew."
    consequence = (
        "Requests that could go over it are refused." if budget.hard else "Nothing is refused by it."
    )
    # A name with a line break in it must not add headers; Django refuses such a subject.
    subject = " ".join(f"Roundhouse: {notice.percent} % of the budget of {name} used".split())
    text = (
        f"The {'hard' if budget.hard else 'soft'} budget of {name} "
        f"({amount_text(budget, budget.limit)}, {_WIDTHS[budget.period]}) has reached {notice.percent} %: "
        f"{amount_text(budget, notice.spent)} are used.\n\n{consequence} {begins}\n"
    )
    return subject, text


_WIDTHS = {"day": "per day", "month": "per month", "total": "in all"}


def _payload_of(notice: BudgetNotice) -> dict[str, Any]:
    period, budget = notice.budget_period, notice.budget_period.budget
    return {
        "object": "budget.notice",
        # The same for each try: who gets it twice can tell.
        "id": f"budget-{budget.pk}-{period.pk}-{notice.percent}",
        "percent": notice.percent,
        "budget": {
            "id": budget.pk,
            "scope": budget.scope,
            "subject": budget.subject_name or budget.subject,
            "unit": budget.unit if budget.unit == BudgetUnit.TOKENS else settings.ROUNDHOUSE_CURRENCY,
            "period": budget.period,
            "hard": budget.hard,
            "limit": _number(budget, budget.limit),
        },
        "spent": _number(budget, notice.spent),
        "period_start": period.start.isoformat(),
        "period_end": period.end.isoformat() if period.end else None,
    }


def _number(budget: Budget, amount: int) -> int | float:
    return amount / 1_000_000 if budget.unit == BudgetUnit.MONEY else amount
