"""What the limits of a key are, as the request path knows them."""

from __future__ import annotations

from dataclasses import dataclass

from openai_api.admission.pace import Pace
from registry.models import ApiKey, Each, Limit, Metric, WhenAway
from registry.rights import matches_route


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A limit that concerns a key. Where several keys share it they have the same `bucket`."""

    bucket: str
    metric: Metric
    amount: int
    per: str
    burst: int
    """Parallel requests have as many as their amount."""
    pace: Pace | None
    """None for parallel requests."""
    when_away: WhenAway
    route: str
    """Which models it concerns; `*` for any characters, empty for all."""
    each_route: bool
    subject: str
    """Whose requests it counts together, for messages."""

    def concerns(self, model: str) -> bool:
        return not self.route or matches_route((self.route,), model)

    def bucket_for(self, model: str, base: str = "") -> str | None:
        """What is counted together has one bucket; None for what does not concern the rule. An adapter is
        counted with the model that it belongs to (`base`), where that one is."""
        for name in filter(None, (base, model)):
            if self.concerns(name):
                return f"{self.bucket}:{name}" if self.each_route else self.bucket
        return None


def load_rules(
    *, api_key: ApiKey | None, public_id: str, project_id: int, user_id: int | None
) -> tuple[Rule, ...]:
    """The limits of a key, or of a person's chats (`api_key` None). Asks the database once."""
    found = Limit.objects.concerning(
        api_key_id=api_key.pk if api_key is not None else None, project_id=project_id, user_id=user_id
    ).select_related("api_key", "project", "user")
    owners = {
        "": "",
        Each.KEY: f":{public_id}",
        Each.PROJECT: f":{project_id}",
        # Who has no person behind them shares with no person.
        Each.USER: f":{user_id}" if user_id is not None else None,
    }
    rules = []
    for limit in found.order_by("id"):
        owner = owners[limit.each]
        if owner is None:
            continue
        parallel = limit.metric == Metric.PARALLEL
        rules.append(
            Rule(
                # Counted in other units, or per another time, it is another count.
                bucket=f"{limit.pk}:{limit.metric}:{limit.per}{owner}",
                metric=Metric(limit.metric),
                amount=limit.amount,
                per=limit.per,
                burst=limit.at_once,
                pace=None if parallel else Pace.of(limit.per, limit.amount, limit.at_once),
                when_away=WhenAway(limit.when_redis_is_away),
                route=limit.route,
                each_route=limit.each_route,
                subject=limit.subject,
            )
        )
    return tuple(rules)
