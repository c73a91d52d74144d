"""The tables. One file per thing; import them from here."""

from registry.models.api_key import ApiKey, KeySecret, Membership, Project
from registry.models.budget import Budget, BudgetNotice, BudgetPeriod, Hold
from registry.models.deployment import Deployment, DeploymentRevision
from registry.models.event import Change, Event
from registry.models.gateway import Gateway
from registry.models.language_model import LanguageModel, ModelCopy, UnwantedCopy
from registry.models.limit import Each, Limit, Metric, Per, WhenAway
from registry.models.node import JoinToken, Node
from registry.models.price import Price
from registry.models.rollup import Grain, UsageAudit, UsageDay, UsageHour, UsageRollup, UsageSummary
from registry.models.route import Route, RouteTarget
from registry.models.usage import LedgerDoor, UsageEvent
from registry.models.worker import Worker

__all__ = [
    "ApiKey",
    "Budget",
    "BudgetNotice",
    "BudgetPeriod",
    "Change",
    "Deployment",
    "DeploymentRevision",
    "Each",
    "Event",
    "Gateway",
    "Grain",
    "Hold",
    "JoinToken",
    "KeySecret",
    "LanguageModel",
    "LedgerDoor",
    "Limit",
    "Membership",
    "Metric",
    "ModelCopy",
    "Node",
    "Per",
    "Price",
    "Project",
    "Route",
    "RouteTarget",
    "UnwantedCopy",
    "UsageAudit",
    "UsageDay",
    "UsageEvent",
    "UsageHour",
    "UsageRollup",
    "UsageSummary",
    "WhenAway",
    "Worker",
]
