from django.core.validators import MaxValueValidator, MinValueValidator, URLValidator, validate_email
from django.db import models
from django.db.models import F, Q
from django.db.models.functions import Now
from django.utils import timezone

MOST_LIMIT = 10**15
"""Of a budget: a thousand million of the currency. The sums beside it stay within 64 bits."""

THRESHOLDS = (50, 80, 100)
"""Percent of the limit at which a notice is sent."""


def validate_addresses(text: str) -> None:
    """Raises ValidationError unless it is mail addresses, separated by commas."""
    for address in text.split(","):
        validate_email(address.strip())


class BudgetScope(models.TextChoices):
    """Whose requests a budget counts."""

    KEY = "key"
    PROJECT = "project"
    USER = "user"
    """The keys that a person owns, and their chats."""
    ROUTE = "route"
    """Everybody's requests of one route, and of its adapters."""


class BudgetUnit(models.TextChoices):
    TOKENS = "tokens"
    """Prompt and generated tokens."""
    MONEY = "money"
    """Millionths of the currency."""


class BudgetPeriodName(models.TextChoices):
    DAY = "day"
    MONTH = "month"
    TOTAL = "total"
    """Never begins anew."""


class Budget(models.Model):
    """How much may be used in each day, each month or in all. Counts requests from `starts_at` on.

    A hard budget refuses a request that could go over it; a soft one only gives notice.
    """

    scope = models.CharField(max_length=16, choices=BudgetScope)
    subject = models.CharField(
        max_length=120, help_text="A key's public id, a project's or user's number, a route's name."
    )
    subject_name = models.CharField(max_length=150, blank=True, editable=False)
    unit = models.CharField(max_length=16, choices=BudgetUnit, default=BudgetUnit.MONEY)
    period = models.CharField(max_length=16, choices=BudgetPeriodName, default=BudgetPeriodName.MONTH)
    limit = models.BigIntegerField(
        validators=[MinValueValidator(0), MaxValueValidator(MOST_LIMIT)],
        help_text="Tokens, or millionths of the currency.",
    )
    hard = models.BooleanField(
        default=True, help_text="Refuse what could go over it. Otherwise it only gives notice."
    )
    mail_to = models.CharField(
        max_length=500,
        blank=True,
        validators=[validate_addresses],
        help_text="Addresses that get its notices, separated by commas.",
    )
    webhook_url = models.CharField(
        "web hook",
        max_length=500,
        blank=True,
        validators=[URLValidator(schemes=["http", "https"])],
        help_text="URL that gets its notices as JSON, by POST.",
    )
    starts_at = models.DateTimeField(default=timezone.now, editable=False)
    created_by = models.CharField(max_length=150, blank=True, editable=False)

    class Meta:
        ordering = ["scope", "subject_name", "unit", "period", "hard"]
        constraints = [
            models.UniqueConstraint(
                fields=["scope", "subject", "unit", "period", "hard"], name="budget_is_one"
            ),
            models.CheckConstraint(
                condition=Q(limit__gte=0, limit__lte=MOST_LIMIT), name="budget_limit_within_bounds"
            ),
            models.CheckConstraint(condition=Q(scope__in=BudgetScope.values), name="budget_scope_is_known"),
            models.CheckConstraint(condition=Q(unit__in=BudgetUnit.values), name="budget_unit_is_known"),
            models.CheckConstraint(
                condition=Q(period__in=BudgetPeriodName.values), name="budget_period_is_known"
            ),
        ]

    def __str__(self) -> str:
        kind = "hard" if self.hard else "soft"
        name = self.subject_name or self.subject
        return f"{self.scope} {name}: {self.unit}, {self.period}, {kind}"


class BudgetPeriod(models.Model):
    """One day, month or whole life of a budget. `spent` is the sum of the ledger's events in it, `held` the
    sum of the open holds, at every commit."""

    budget = models.ForeignKey(Budget, on_delete=models.CASCADE, related_name="periods")
    start = models.DateTimeField()
    end = models.DateTimeField(null=True, help_text="Empty: never.")
    spent = models.BigIntegerField(default=0)
    held = models.BigIntegerField(default=0)

    class Meta:
        ordering = ["budget", "-start"]
        constraints = [
            models.UniqueConstraint(fields=["budget", "start"], name="budget_period_is_one"),
            models.CheckConstraint(condition=Q(spent__gte=0), name="budget_spent_is_not_negative"),
            models.CheckConstraint(condition=Q(held__gte=0), name="budget_held_is_not_negative"),
            models.CheckConstraint(
                condition=Q(end__isnull=True) | Q(end__gt=F("start")), name="budget_period_has_a_length"
            ),
        ]

    def __str__(self) -> str:
        return f"{self.budget_id} from {self.start:%Y-%m-%d %H:%M} UTC"


class Hold(models.Model):
    """What a running request may cost at most, set aside. Ends in the transaction of its usage event."""

    request_id = models.CharField(max_length=64)
    budget_period = models.ForeignKey(BudgetPeriod, on_delete=models.CASCADE, related_name="holds")
    amount = models.BigIntegerField()
    price_id = models.BigIntegerField(null=True, help_text="The price when the request was admitted.")
    gateway = models.CharField(max_length=80, blank=True)
    created_at = models.DateTimeField(db_default=Now())

    class Meta:
        constraints = [
            models.UniqueConstraint(fields=["request_id", "budget_period"], name="hold_is_one"),
            models.CheckConstraint(condition=Q(amount__gte=0), name="hold_is_not_negative"),
        ]
        indexes = [models.Index(fields=["created_at"], name="hold_by_age_idx")]

    def __str__(self) -> str:
        return f"{self.request_id}: {self.amount}"


class BudgetNotice(models.Model):
    """That a period reached a threshold: told once, by each way that the budget has."""

    budget_period = models.ForeignKey(BudgetPeriod, on_delete=models.CASCADE, related_name="notices")
    percent = models.PositiveSmallIntegerField()
    spent = models.BigIntegerField(help_text="When it was seen.")
    created_at = models.DateTimeField(db_default=Now())
    mail_open = models.BooleanField(default=False, help_text="Mail is still to be sent.")
    webhook_open = models.BooleanField(default=False, help_text="The web hook is still to be called.")
    tries = models.PositiveSmallIntegerField(default=0)
    next_try_at = models.DateTimeField(null=True, help_text="Empty: done, or given up.")

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.UniqueConstraint(fields=["budget_period", "percent"], name="budget_notice_is_one"),
        ]
        indexes = [
            models.Index(
                fields=["next_try_at"],
                name="budget_notice_open_idx",
                condition=Q(next_try_at__isnull=False),
            ),
        ]

    def __str__(self) -> str:
        return f"{self.percent} % of budget period {self.budget_period_id}"
