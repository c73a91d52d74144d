"""What dispatch knows of the fleet: immutable views, replaced as a whole by each snapshot."""

from __future__ import annotations

from dataclasses import dataclass, replace


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
    revision_id: int
    """Workers of one revision serve the same model with the same arguments."""
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
    adapters: frozenset[str] = frozenset()
    """LoRA adapters that its workers are to carry."""
    queue_tokens: int | None = None
    """Most that wait, as `Demand.work` counts; None: any number."""
    replicas: int = 1
    """Wished for."""
    starts_in: float | None = None
    """Seconds until a worker is started, where there is none; 0 while one starts or may come back, None when
    none will be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Of a route's requests, in seconds."""

    connect: float = 1.0
    queue: float | None = None
    """None: as its deployments say."""
    first_token: float = 600.0
    """Longest silence before a whole answer, or before the first byte of a streamed one."""
    idle: float = 60.0
    """Longest silence within a stream."""
    total: float | None = None
    """None: no bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteView:
    name: str
    targets: tuple[tuple[DeploymentView, int], ...]
    """Deployments with their weights (≥ 1), those of the lowest rank first."""
    ranks: tuple[int, ...] = ()
    """Of each target; empty: all have the same one."""
    timeouts: Timeouts = Timeouts()
    continues: bool = True
    """A stream whose worker dies goes on with another."""
    base: str = ""
    adapter: str = ""
    """Of `base:adapter`: the route it comes from, and the LoRA adapter that is asked for."""

    def adapted(self) -> dict[str, RouteView]:
        """For each adapter on its deployments the route `base:adapter` to those that carry it."""
        ranks = self.ranks or (0,) * len(self.targets)
        found = {}
        for adapter in sorted({name for deployment, _ in self.targets for name in deployment.adapters}):
            those = [at for at, (deployment, _) in enumerate(self.targets) if adapter in deployment.adapters]
            found[f"{self.name}:{adapter}"] = replace(
                self,
                name=f"{self.name}:{adapter}",
                targets=tuple(self.targets[at] for at in those),
                ranks=tuple(ranks[at] for at in those),
                base=self.name,
                adapter=adapter,
            )
        return found
