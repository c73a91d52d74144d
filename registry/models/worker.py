from django.db import models
from django.db.models import Q
from django.utils import timezone

from registry.querysets import WorkerQuerySet
from registry.states import WORKER_LIVE, WorkerState


class Worker(models.Model):
    """A fact: one run of one replica. Its next run is a new row with the next epoch."""

    name = models.CharField(max_length=80, help_text="The deployment's name and the replica's number.")
    deployment = models.ForeignKey("registry.Deployment", on_delete=models.CASCADE, related_name="workers")
    revision = models.ForeignKey(
        "registry.DeploymentRevision", on_delete=models.CASCADE, related_name="workers"
    )
    node = models.ForeignKey("registry.Node", on_delete=models.CASCADE, related_name="workers")
    replica = models.PositiveIntegerField()
    epoch = models.PositiveIntegerField(help_text="The start number of this replica.")
    state = models.CharField(max_length=16, choices=WorkerState, default=WorkerState.REQUESTED)
    state_changed_at = models.DateTimeField(default=timezone.now)
    state_reason = models.CharField(max_length=500, blank=True)
    cause = models.CharField(max_length=32, blank=True, help_text="Why it ended.")
    exit_code = models.IntegerField(null=True)
    log_tail = models.TextField(blank=True, help_text="Its last log lines, kept when it ended.")
    url = models.CharField(max_length=200, blank=True)
    pid = models.PositiveIntegerField(null=True, help_text="Process id of its supervisor.")
    engine_pid = models.PositiveIntegerField(null=True)
    capabilities = models.JSONField(default=list)
    heartbeat_at = models.DateTimeField(null=True, help_text="By the database's clock.")
    running = models.PositiveIntegerField(default=0)
    waiting = models.PositiveIntegerField(default=0)
    kv_use = models.FloatField(default=0)
    steps = models.PositiveBigIntegerField(default=0)
    tokens = models.PositiveBigIntegerField(default=0)
    tokens_per_second = models.FloatField(default=0, help_text="Measured while it was busy.")
    progress_step = models.CharField(max_length=100, blank=True)
    progress_done = models.PositiveBigIntegerField(default=0)
    progress_total = models.PositiveBigIntegerField(default=0)
    progress_unit = models.CharField(max_length=16, default="bytes")
    created_at = models.DateTimeField(default=timezone.now)
    ready_at = models.DateTimeField(null=True)

    objects = WorkerQuerySet.as_manager()

    class Meta:
        ordering = ["-id"]
        constraints = [
            models.CheckConstraint(condition=Q(state__in=WorkerState.values), name="worker_state_is_known"),
            models.UniqueConstraint(
                fields=["deployment", "replica"],
                condition=Q(state__in=sorted(WORKER_LIVE)),
                name="one_live_worker_per_replica",
            ),
            models.UniqueConstraint(fields=["deployment", "replica", "epoch"], name="one_worker_per_epoch"),
        ]
        indexes = [
            # Dispatch, reconcile and the reaper all ask for the few live workers among many ended ones.
            models.Index(
                fields=["deployment", "state"],
                condition=Q(state__in=sorted(WORKER_LIVE)),
                name="worker_live_idx",
            ),
        ]

    def __str__(self) -> str:
        return f"{self.name} #{self.epoch}"
