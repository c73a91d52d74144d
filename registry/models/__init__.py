"""The tables. One file per thing; import them from here."""

from registry.models.api_key import ApiKey, Project
from registry.models.deployment import Deployment, DeploymentRevision
from registry.models.event import Change, Event
from registry.models.gateway import Gateway
from registry.models.language_model import LanguageModel, ModelCopy
from registry.models.node import JoinToken, Node
from registry.models.rollup import UsageHour, UsageRollup
from registry.models.route import Route, RouteTarget
from registry.models.usage import UsageEvent
from registry.models.worker import Worker

__all__ = [
    "ApiKey",
    "Change",
    "Deployment",
    "DeploymentRevision",
    "Event",
    "Gateway",
    "JoinToken",
    "LanguageModel",
    "ModelCopy",
    "Node",
    "Project",
    "Route",
    "RouteTarget",
    "UsageEvent",
    "UsageHour",
    "UsageRollup",
    "Worker",
]
