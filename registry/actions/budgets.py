"""Budgets: set aside the most a request may cost, settle what it did cost, give notice.

    reserve ── Hold, period.held + most ──┬── settle: Hold deleted, held - most, spent + cost
                                          └── release_dead_holds: Hold deleted, held - most

At every commit a period's `spent` is the sum of the ledger's events in it, and `held` the sum of its open
holds. `reserve` alone lets `spent + held` grow towards the limit, by an UPDATE that says so itself: no
number of requests at once gets past it. Every transaction locks rows in the same order (holds, then
periods by number), so that none waits for another in a circle.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta, tzinfo
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from django.conf import settings
from django.contrib.auth import get_user_model
from django.core.exceptions import ValidationError
from django.db import connection, transaction
from django.db.models import F, Q

from registry.actions.events import publish_change, record_event
from registry.adapters import model_names
from registry.costs import PriceBook, money_text, most_micros
from registry.errors import BudgetExhausted, InvalidInput
from registry.models import ApiKey, Budget, BudgetPeriod, Gateway, Hold, Project, UsageEvent
from registry.models.budget import MOST_LIMIT, BudgetPeriodName, BudgetScope, BudgetUnit
from registry.querysets import database_now
from registry.statements import aware, change, insert, select

HOLDS_KEPT = timedelta(hours=1)
"""The hold of a gateway that is silent is given back after this long, if no event has come of it."""
HOLDS_YOUNG = timedelta(seconds=30)
"""Holds are not looked after before this long: most have ended by then."""
RELEASED_AT_ONCE = 500
PASSING_SECONDS = 5.0
"""When to come again if only running requests stand in the way."""
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
CHAT_KEY = re.compile(r"user-(\d+)")
"""Public id under which a person's chats are accounted."""


# -- Who has which.


def hard_budgets(*, key_public_id: str, project_id: int, user_id: int | None) -> tuple[int, ...]:
    """Numbers of the hard budgets that a key's requests may meet, those of routes among them."""
    mine = Q(scope=BudgetScope.KEY, subject=key_public_id)
    mine |= Q(scope=BudgetScope.PROJECT, subject=str(project_id))
    mine |= Q(scope=BudgetScope.ROUTE)
    if user_id is not None:
        mine |= Q(scope=BudgetScope.USER, subject=str(user_id))
    return tuple(Budget.objects.filter(mine, hard=True).order_by("pk").values_list("pk", flat=True))


def route_budgets() -> dict[int, str]:
    """The hard budgets that count one route only, by number: its name."""
    budgets = Budget.objects.filter(scope=BudgetScope.ROUTE, hard=True)
    return dict(budgets.order_by().values_list("pk", "subject"))


def find_subject(scope: str, text: str) -> tuple[str, str]:
    """What a budget of this scope notes for a name that a person wrote, and the name to show. Raises
    InvalidInput."""
    text = text.strip()
    match scope:
        case BudgetScope.KEY:
            found = re.match(r"(?:sk-)?([0-9A-Za-z]{12})(?:-|\Z)", text)
            keys = list(ApiKey.objects.filter(public_id=found[1])) if found else []
            keys = keys or list(ApiKey.objects.filter(name=text, revoked_at=None)[:2])
            if len(keys) == 1:
                return keys[0].public_id, keys[0].name
            if chat := CHAT_KEY.fullmatch(text):
                return text, _user_name(int(chat[1]))
            if keys:
                raise InvalidInput("subject", f"Several keys are called {text}; give the public id.")
        case BudgetScope.PROJECT:
            project = Project.objects.filter(name=text).first()
            if project is not None:
                return str(project.pk), project.name
        case BudgetScope.USER:
            user = get_user_model().objects.filter(username=text).first()
            if user is not None:
                return str(user.pk), user.get_username()
        case BudgetScope.ROUTE:
            if text in model_names():
                return text, text
    raise InvalidInput("subject", f"There is no {scope} {text}.")


def _user_name(user_id: int) -> str:
    user = get_user_model().objects.filter(pk=user_id).first()
    if user is None:
        raise InvalidInput("subject", f"There is no user {user_id}.")
    return f"chats of {user.get_username()}"


# -- Setting them.


@transaction.atomic
def save_budget(*, budget: Budget, by: str) -> Budget:
    """Make a budget or change one's limit, hardness and notices. Raises InvalidInput.

    Whom it counts, in what and how often is fixed: for another one, make another. Gateways know within a
    second.
    """
    is_new = budget.pk is None
    if is_new:
        budget.created_by = by[:150]
        budget.starts_at = database_now()
    else:
        fixed = ("scope", "subject", "unit", "period")
        before = Budget.objects.values(*fixed).get(pk=budget.pk)
        for name in fixed:
            if getattr(budget, name) != before[name]:
                raise InvalidInput(name, "It cannot be changed; make another budget.")
    try:
        budget.full_clean()
    except ValidationError as error:
        field, messages = next(iter(error.message_dict.items()))
        raise InvalidInput("budget" if field == "__all__" else field, " ".join(messages)) from error
    budget.save()
    # Never the web hook's URL: it may have a secret in it.
    facts = {"limit": budget.limit, "hard": budget.hard, "unit": budget.unit, "period": budget.period}
    record_event(budget, "created" if is_new else "changed", by=by, data=facts)
    _publish(budget)
    return budget


@transaction.atomic
def delete_budget(*, budget: Budget, by: str) -> None:
    """Nothing is counted or refused by it any more; its periods go with it, the ledger stays."""
    record_event(budget, "deleted", by=by)
    _publish(budget)
    budget.delete()


def _publish(budget: Budget) -> None:
    publish_change("api_key", budget.subject if budget.scope == BudgetScope.KEY else "*")


# -- A request that begins.


@transaction.atomic
def reserve(
    *,
    budget_ids: Sequence[int],
    request_id: str,
    route: str,
    prompt_tokens: int,
    completion_tokens: int,
    started_at: float,
    gateway: str,
    base: str = "",
) -> None:
    """Set aside, in each of these budgets that is hard and concerns the route, or the one that it is an
    adapter of (`base`), the most that the request may use: all of them or, with BudgetExhausted, none.

    `prompt_tokens` and `completion_tokens` are the most there can be, over all choices; `started_at`, in
    seconds since the epoch, and `request_id` are those of the ledger's entry, whose event settles it;
    `gateway` is the name under which the gateway says that it lives. Raises ValueError for less than nothing.
    """
    if prompt_tokens < 0 or completion_tokens < 0:
        raise ValueError("A request cannot use less than nothing.")
    # More than any limit there can be: no sum below leaves its 64 bits.
    prompt_tokens, completion_tokens = min(prompt_tokens, MOST_LIMIT), min(completion_tokens, MOST_LIMIT)
    at = datetime.fromtimestamp(started_at, UTC)
    budgets = select(_CONCERNING, at, at, tuple(budget_ids), (route, base)) if budget_ids else []
    if not budgets:
        return
    price = PriceBook([route, base]).in_force(route, at, base)
    cost = most_micros(price, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens)
    amounts = {BudgetUnit.TOKENS.value: prompt_tokens + completion_tokens, BudgetUnit.MONEY.value: cost}
    places = sorted(
        (period or _make_period(budget, at).pk, budget, limit, min(amounts[unit], MOST_LIMIT + 1))
        for budget, limit, unit, period in budgets
    )
    holds = []
    for period, budget, limit, amount in places:
        if not change(_SET_ASIDE, amount, period, limit - amount):
            raise _exhausted(budget, period, amount, at)
        holds.append((request_id, period, amount, price.pk if price is not None else None, gateway[:80]))
    insert(Hold, ("request_id", "budget_period_id", "amount", "price_id", "gateway"), holds)


_CONCERNING = """
    SELECT budget.id, budget."limit", budget.unit, period.id
    FROM registry_budget budget LEFT JOIN registry_budgetperiod period
    ON period.budget_id = budget.id AND period.start <= %s AND (period."end" IS NULL OR period."end" > %s)
    WHERE budget.id IN %s AND budget.hard AND (budget.scope <> 'route' OR budget.subject IN %s)
    ORDER BY budget.id
"""
# The guard and the change are one statement: checked again by the database under the row's lock.
_SET_ASIDE = "UPDATE registry_budgetperiod SET held = held + %s WHERE id = %s AND spent <= %s - held"


def _exhausted(budget_id: int, period_id: int, amount: int, at: datetime) -> BudgetExhausted:
    budget, period = Budget.objects.get(pk=budget_id), BudgetPeriod.objects.get(pk=period_id)
    passing = period.spent + amount <= budget.limit
    whole = {"day": "daily", "month": "monthly", "total": "whole"}[budget.period]
    limit, spent, held, most = (
        amount_text(budget, each) for each in (budget.limit, period.spent, period.held, amount)
    )
    message = (
        f"You exceeded the {whole} budget of {budget.scope} `{budget.subject_name or budget.subject}`: "
        f"of {limit}, {spent} are used and {held} set aside for running requests; "
        f"this request may use up to {most}."
    )
    if passing:
        return BudgetExhausted(
            f"{message} Try again when some of them have ended.", retry_after=PASSING_SECONDS, passing=True
        )
    if period.end is None:
        return BudgetExhausted(f"{message} It does not begin anew.", retry_after=None, passing=False)
    return BudgetExhausted(
        f"{message} It begins anew at {period.end.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}.",
        retry_after=(period.end - at).total_seconds(),
        passing=False,
    )


def amount_text(budget: Budget, amount: int) -> str:
    """An amount in the budget's unit, for people."""
    if budget.unit == BudgetUnit.MONEY:
        return money_text(amount, settings.ROUNDHOUSE_CURRENCY)
    return f"{amount:,} tokens"


# -- A request that has ended. Called within the transaction that appends its event.


class OpenHold(NamedTuple):
    """A hold as its event needs it."""

    pk: int
    request_id: str
    amount: int
    price_id: int | None
    period_id: int
    budget_id: int
    unit: str


_HOLDS = """
    SELECT hold.id, hold.request_id, hold.amount, hold.price_id, period.id, budget.id, budget.unit
    FROM registry_hold hold
    JOIN registry_budgetperiod period ON period.id = hold.budget_period_id
    JOIN registry_budget budget ON budget.id = period.budget_id
    WHERE hold.request_id IN %s ORDER BY hold.id
"""


def open_holds(request_ids: Iterable[str]) -> dict[str, list[OpenHold]]:
    """The holds of these requests, locked until the transaction ends."""
    found: dict[str, list[OpenHold]] = {}
    # SQLite has one writer at a time anyway.
    lock = " FOR UPDATE OF hold" if connection.features.has_select_for_update_of else ""
    for hold in map(OpenHold._make, select(_HOLDS + lock, tuple(request_ids))):
        found.setdefault(hold.request_id, []).append(hold)
    return found


def within_holds(event: UsageEvent, holds: Iterable[OpenHold]) -> bool:
    """False for an event that used more than the most it could use: its figures are not to be trusted."""
    return all(_used(event, hold.unit) <= hold.amount for hold in holds)


def settle(events: Sequence[UsageEvent], holds: Mapping[str, Sequence[OpenHold]]) -> None:
    """Count events that are new in the ledger, and end their holds.

    What was set aside settles to the period where it stands; in the other budgets, hard or soft, an event
    counts in the period in which it began, if the budget had begun by then. So does a correction.
    """
    ended = [hold for held in holds.values() for hold in held]
    if ended:
        change("DELETE FROM registry_hold WHERE id IN %s", tuple(hold.pk for hold in ended))
    budgets = _BudgetsOf(events)
    if not budgets.all and not ended:
        return
    spent: defaultdict[int, int] = defaultdict(int)
    held: defaultdict[int, int] = defaultdict(int)
    counted = []
    for event in events:
        done = set()
        for hold in holds.get(event.request_id, ()):
            held[hold.period_id] += hold.amount
            spent[hold.period_id] += _used(event, hold.unit)
            done.add(hold.budget_id)
        for budget in budgets.of(event):
            amount = _used(event, budget.unit)
            if amount and budget.pk not in done and event.started_at >= budget.starts_at:
                counted.append((budget.pk, event.started_at, amount))
    periods = _Periods(counted)
    # Sorted: whoever makes missing periods makes them in this order.
    for budget_id, at, amount in sorted(counted):
        spent[periods.of(budget_id, at)] += amount
    for pk in sorted({*spent, *held}):
        change(_SETTLE, spent[pk], held[pk], pk)


_SETTLE = "UPDATE registry_budgetperiod SET spent = spent + %s, held = held - %s WHERE id = %s"


def _used(event: UsageEvent, unit: str) -> int:
    if unit == BudgetUnit.MONEY:
        return event.cost_micros
    return event.prompt_tokens + event.completion_tokens


class _Counting(NamedTuple):
    """A budget as the events that it counts need it."""

    pk: int
    unit: str
    starts_at: datetime


class _BudgetsOf:
    """The budgets, hard and soft, that count some events."""

    def __init__(self, events: Sequence[UsageEvent]) -> None:
        self._found: dict[tuple[str, str], list[_Counting]] = {}
        self._owners: dict[str, int] = {}
        self.all: list[_Counting] = []
        if not select("SELECT 1 FROM registry_budget LIMIT 1"):
            return
        keys = {event.key_public_id for event in events}
        self._owners = dict(select(_OWNERS, tuple(keys)))
        self._owners |= {key: int(chat[1]) for key in keys if (chat := CHAT_KEY.fullmatch(key))}
        projects = {str(event.project_id) for event in events}
        # Nobody has the empty name: without an owner there would be no list.
        owners = {"", *map(str, self._owners.values())}
        routes = {name for event in events for name in (event.route, event.base)}
        subjects = (keys, projects, routes, owners)
        for pk, scope, subject, unit, starts_at in select(_COUNTING, *map(tuple, subjects)):
            budget = _Counting(pk, unit, aware(starts_at))
            self.all.append(budget)
            self._found.setdefault((scope, subject), []).append(budget)

    def of(self, event: UsageEvent) -> Iterable[_Counting]:
        if not self.all:
            return
        yield from self._found.get((BudgetScope.KEY, event.key_public_id), ())
        yield from self._found.get((BudgetScope.PROJECT, str(event.project_id)), ())
        yield from self._found.get((BudgetScope.ROUTE, event.route), ())
        yield from self._found.get((BudgetScope.ROUTE, event.base), ())
        owner = self._owners.get(event.key_public_id)
        if owner is not None:
            yield from self._found.get((BudgetScope.USER, str(owner)), ())


_OWNERS = "SELECT public_id, owner_id FROM registry_apikey WHERE public_id IN %s AND owner_id IS NOT NULL"
_COUNTING = """
    SELECT id, scope, subject, unit, starts_at FROM registry_budget
    WHERE scope = 'key' AND subject IN %s OR scope = 'project' AND subject IN %s
    OR scope = 'route' AND subject IN %s OR scope = 'user' AND subject IN %s
    ORDER BY id
"""


# -- Holds that nobody will settle.


def release_dead_holds() -> int:
    """Give back what was set aside for requests that no event will settle any more; returns how many.

    A hold has an entry in its gateway's spool, made before it; so when a gateway dies, its event comes as
    soon as another gateway or control has read that spool. Only without one it is given back here: when
    the event was there before the hold (the client left while it was made), or when the gateway has been
    silent and no event came for `HOLDS_KEPT` (its disk is lost, or away). Should the event come later all
    the same, it is counted like one without a hold. A hold of a gateway that lives is never given back.
    """
    now = database_now()
    # Uses index hold_by_age_idx.
    old = Hold.objects.filter(created_at__lt=now - HOLDS_YOUNG).order_by("pk")
    candidates = dict(old.values_list("pk", "request_id"))
    released = 0
    settled = _recorded(candidates.values())
    gone = [pk for pk, request_id in candidates.items() if request_id in settled]
    alive = Gateway.objects.filter(seen_at__gte=now - HOLDS_KEPT).values("name")
    silent = old.filter(created_at__lt=now - HOLDS_KEPT).exclude(gateway__in=alive)
    gone.extend(silent.values_list("pk", flat=True))
    ids = sorted(set(gone))
    for first in range(0, len(ids), RELEASED_AT_ONCE):
        released += _release(ids[first : first + RELEASED_AT_ONCE])
    return released


def _recorded(request_ids: Iterable[str]) -> set[str]:
    listed = list(request_ids)
    found: set[str] = set()
    for first in range(0, len(listed), RELEASED_AT_ONCE):
        some = listed[first : first + RELEASED_AT_ONCE]
        found.update(UsageEvent.objects.filter(request_id__in=some).values_list("request_id", flat=True))
    return found


@transaction.atomic
def _release(ids: Sequence[int]) -> int:
    # Whichever of these was settled in this moment is not found any more.
    holds = list(Hold.objects.select_for_update().filter(pk__in=ids).order_by("pk"))
    held: defaultdict[int, int] = defaultdict(int)
    for hold in holds:
        held[hold.budget_period_id] += hold.amount
    Hold.objects.filter(pk__in=[hold.pk for hold in holds]).delete()
    for pk in sorted(held):
        BudgetPeriod.objects.filter(pk=pk).update(held=F("held") - held[pk])
    return len(holds)


# -- Periods.


def calendar_period(period: str, zone: tzinfo, at: datetime) -> tuple[datetime, datetime | None]:
    """The day or month of `zone` in which `at` lies, from its first midnight to the next one's; on days
    when clocks change it is an hour longer or shorter."""
    if period == BudgetPeriodName.TOTAL:
        return EPOCH, None
    day = at.astimezone(zone).date()
    if period == BudgetPeriodName.DAY:
        return _midnight(day, zone), _midnight(day + timedelta(days=1), zone)
    first = day.replace(day=1)
    following = (first + timedelta(days=32)).replace(day=1)
    return _midnight(first, zone), _midnight(following, zone)


def _midnight(day: date, zone: tzinfo) -> datetime:
    # Where the clock jumps over midnight, or meets it twice, this is the instant of the jump, or the first.
    return datetime.combine(day, time.min, tzinfo=zone).astimezone(UTC)


class _Periods:
    """The periods in which budgets count instants, numbers all of them; made where missing."""

    def __init__(self, counted: Sequence[tuple[int, datetime, int]]) -> None:
        self._known: defaultdict[int, list[tuple[datetime, datetime | None, int]]] = defaultdict(list)
        if not counted:
            return
        budgets, instants = {budget_id for budget_id, _, _ in counted}, [at for _, at, _ in counted]
        for budget_id, start, end, pk in select(_PERIODS, tuple(budgets), max(instants), min(instants)):
            self._known[budget_id].append((aware(start), aware(end) if end is not None else None, pk))

    def of(self, budget_id: int, at: datetime) -> int:
        known = self._known[budget_id]
        for start, end, pk in known:
            if start <= at and (end is None or at < end):
                return pk
        period = _make_period(budget_id, at)
        known.append((period.start, period.end, period.pk))
        return period.pk


_PERIODS = """
    SELECT budget_id, start, "end", id FROM registry_budgetperiod
    WHERE budget_id IN %s AND start <= %s AND ("end" IS NULL OR "end" > %s) ORDER BY start
"""


def _make_period(budget_id: int, at: datetime) -> BudgetPeriod:
    """The budget's period at `at`, which nobody has met before; others may make it in the same moment."""
    budget = Budget.objects.get(pk=budget_id)
    start, end = calendar_period(budget.period, _zone_of(budget), at)
    # When the project's time zone has been changed, a period runs on to the end that it had.
    others = BudgetPeriod.objects.filter(budget=budget)
    before = others.filter(end__gt=start, end__lte=at).order_by("-end").first()
    if before is not None and before.end is not None:
        start = before.end
    after = others.filter(start__gt=at).order_by("start").first()
    if after is not None and (end is None or after.start < end):
        end = after.start
    # Not `update_conflicts`: that would lock a row out of the order in which all are locked.
    BudgetPeriod.objects.bulk_create(
        [BudgetPeriod(budget=budget, start=start, end=end)], ignore_conflicts=True
    )
    return BudgetPeriod.objects.get(budget=budget, start=start)


def _zone_of(budget: Budget) -> tzinfo:
    """The time zone of its project; budgets of people and of routes have UTC."""
    if budget.scope == BudgetScope.PROJECT:
        name = Project.objects.filter(pk=budget.subject).values_list("time_zone", flat=True).first()
    elif budget.scope == BudgetScope.KEY:
        keys = ApiKey.objects.filter(public_id=budget.subject)
        name = keys.values_list("project__time_zone", flat=True).first()
    else:
        name = None
    if name in (None, "UTC"):
        return UTC
    try:
        return ZoneInfo(name)
    except (KeyError, ValueError, OSError):
        # It was known when it was set: better a day of UTC than no answer.
        return UTC


def current_periods(budgets: Iterable[Budget], now: datetime) -> dict[int, BudgetPeriod]:
    """By budget: the period that runs, where anything was used or set aside in it."""
    running = Q(start__lte=now) & (Q(end__isnull=True) | Q(end__gt=now))
    found = BudgetPeriod.objects.filter(running, budget__in=list(budgets))
    return {period.budget_id: period for period in found}


def facts_of(budget: Budget, period: BudgetPeriod | None) -> dict[str, Any]:
    """What pages and commands show of a budget."""
    return {
        "id": budget.pk,
        "scope": budget.scope,
        "subject": budget.subject_name or budget.subject,
        "unit": budget.unit,
        "period": budget.period,
        "hard": budget.hard,
        "limit": budget.limit,
        "spent": period.spent if period else 0,
        "held": period.held if period else 0,
        "resets_at": period.end if period else None,
    }
