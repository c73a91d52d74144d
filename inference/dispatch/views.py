"""What dispatch knows of the fleet: immutable views, replaced as a whole by each snapshot."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerView:
    """A ready worker as the last snapshot saw it."""

    id: int
    epoch: int
    name: str
    node_name: str
    deployment_id: int
    deployment_name: str
    engine: str
    url: str
    secret: str
    slots: int
    capabilities: frozenset[str]
    running: int
    waiting: int
    kv_use: float
    speed: float
    """Tokens per second, measured while it was busy; 0 while unknown."""
    reported_at: float
    """When `running`, `waiting` and `kv_use` were true, by this process's monotonic clock."""

    def __repr__(self) -> str:
        # The secret must not reach a log or a traceback.
        return f"<WorkerView {self.name} #{self.epoch} {self.url}>"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentView:
    id: int
    name: str
    engine: str
    policy: str
    queue_limit: int
    queue_seconds: float
    context_length: int | None
    """None while no engine has told it."""
    workers: tuple[WorkerView, ...]
    """The ready ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteView:
    name: str
    targets: tuple[tuple[DeploymentView, int], ...]
    """Deployments with their weights (≥ 1)."""
    continues: bool = True
    """A stream whose worker dies goes on with another."""
