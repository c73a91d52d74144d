"""`manage.py status`: what is there, how it is, and what to do about it."""

from __future__ import annotations

import json
from typing import Any

from django.core.management.base import BaseCommand, CommandParser
from django.db.models import Count, Q, Sum

from config.printing import age, amount_of_bytes, share, table
from inference.status import read_statuses
from registry.models import Deployment, Node, UsageEvent, Worker
from registry.querysets import database_now
from registry.states import Outcome


class Command(BaseCommand):
    help = "Nodes, deployments with the next action, workers, and today's usage."

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="The same as JSON.")

    def handle(self, *args: Any, **options: Any) -> None:
        facts: dict[str, Any] = {
            "nodes": _nodes(),
            "deployments": _deployments(),
            "workers": _workers(),
            "usage_today": _usage_today(),
        }
        if options["json"]:
            self.stdout.write(json.dumps(facts, indent=2, default=str, ensure_ascii=False))
            return
        now = database_now()
        self.stdout.write(
            _section(
                "No node has joined; `manage.py up` makes this machine one.",
                ["NODE", "STATE", "ADDRESS", "CORES", "MEMORY FREE", "SEEN", "LABELS"],
                [
                    [
                        node["name"],
                        f"{node['state']}, cordoned" if node["cordoned"] else node["state"],
                        node["address"],
                        node["cores"],
                        f"{amount_of_bytes(node['memory_free_bytes'])} of "
                        f"{amount_of_bytes(node['memory_bytes'])}",
                        age(node["last_seen_at"], now),
                        " ".join(f"{name}={value}" for name, value in node["labels"].items()),
                    ]
                    for node in facts["nodes"]
                ],
            )
        )
        self.stdout.write(
            _section(
                "No deployment yet; `manage.py deploy NAME --model MODEL` makes one.",
                ["DEPLOYMENT", "STATUS", "READY", "ROUTES", "MODEL", "WHY"],
                [
                    [
                        deployment["name"],
                        deployment["status"],
                        f"{deployment['ready']} of {deployment['replicas']}",
                        ", ".join(deployment["routes"]),
                        deployment["model"],
                        deployment["reason"],
                    ]
                    for deployment in facts["deployments"]
                ],
            )
        )
        for deployment in facts["deployments"]:
            if deployment["next_action"]:
                self.stdout.write(f"→ {deployment['name']}: {deployment['next_action']}")
        self.stdout.write(
            _section(
                "No worker runs.",
                ["WORKER", "STATE", "NODE", "REQUESTS", "SPEED", "STEP"],
                [
                    [
                        worker["name"],
                        worker["state"],
                        worker["node"],
                        f"{worker['running']} running, {worker['waiting']} waiting",
                        f"{worker['tokens_per_second']:.0f} tok/s" if worker["tokens_per_second"] else "",
                        worker["step"],
                    ]
                    for worker in facts["workers"]
                ],
            )
        )
        usage = facts["usage_today"]
        self.stdout.write(
            f"\nToday (UTC): {usage['requests']} requests, {usage['failed']} of them failed; "
            f"{usage['prompt_tokens']} tokens in, {usage['completion_tokens']} out."
        )


def _section(nothing: str, headings: list[str], rows: list[list[object]]) -> str:
    return "\n" + (table(headings, rows) if rows else nothing)


def _nodes() -> list[dict[str, Any]]:
    return [
        {
            "name": node.name,
            "state": str(node.state),
            "cordoned": node.cordoned,
            "address": node.address,
            "labels": node.labels,
            "cores": node.cores,
            "memory_bytes": node.memory_bytes,
            "memory_free_bytes": node.memory_free_bytes,
            "last_seen_at": node.last_seen_at,
        }
        for node in Node.objects.all()
    ]


def _deployments() -> list[dict[str, Any]]:
    deployments = list(Deployment.objects.select_related("language_model").prefetch_related("routes"))
    statuses = read_statuses(deployments)
    return [
        {
            "name": deployment.name,
            "model": deployment.language_model.name,
            "engine": deployment.engine,
            "routes": [route.name for route in deployment.routes.all()],
            "status": statuses[deployment.pk].state.value,
            "ready": statuses[deployment.pk].ready,
            "replicas": deployment.replicas,
            "reason": statuses[deployment.pk].reason,
            "next_action": statuses[deployment.pk].next_action,
        }
        for deployment in deployments
    ]


def _workers() -> list[dict[str, Any]]:
    workers = Worker.objects.live().select_related("node", "deployment").order_by("name")
    return [
        {
            "name": str(worker),
            "deployment": worker.deployment.name,
            "state": str(worker.state),
            "node": worker.node.name,
            "running": worker.running,
            "waiting": worker.waiting,
            "tokens_per_second": worker.tokens_per_second,
            "step": ""
            if worker.ready_at or not worker.progress_step
            else share(worker.progress_step, worker.progress_done, worker.progress_total),
        }
        for worker in workers
    ]


def _usage_today() -> dict[str, int]:
    today = database_now().replace(hour=0, minute=0, second=0, microsecond=0)
    sums = UsageEvent.objects.filter(started_at__gte=today).aggregate(
        requests=Count("id"),
        failed=Count("id", filter=Q(outcome__in=[Outcome.FAILED, Outcome.INTERRUPTED])),
        prompt_tokens=Sum("prompt_tokens", default=0),
        completion_tokens=Sum("completion_tokens", default=0),
    )
    return dict(sums)
