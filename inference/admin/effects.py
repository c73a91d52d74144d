"""What an operation would do, in sentences for the person who is about to confirm it."""

from __future__ import annotations

from collections import Counter

from django.db.models import Count, Sum

from inference.reconcile import place, read_facts, read_wishes
from registry.actions.deployments import replicas_before_stop
from registry.models import Deployment, Node, Route, Worker
from registry.states import WORKER_STARTING, WorkerState

SERVING = (WorkerState.READY, WorkerState.SUSPECT)


def stop_effect(deployment: Deployment, _: int = 0) -> str:
    return scale_effect(deployment, 0)


def start_effect(deployment: Deployment, _: int = 0) -> str:
    if deployment.replicas:
        return f"It is started already: {deployment.replicas} replica(s) are wished for. Nothing changes."
    return scale_effect(deployment, replicas_before_stop(deployment))


def scale_effect(deployment: Deployment, replicas: int) -> str:
    """From what is wished for now to `replicas`."""
    if replicas == deployment.replicas:
        return f"{replicas} replica(s) are wished for already. Nothing changes."
    if replicas > deployment.replicas:
        more = replicas - deployment.replicas
        return f"{more} more worker(s) are started, {replicas} in all. {_place_of(deployment)}"
    ending = [worker for worker in _live(deployment) if worker.replica >= replicas]
    sentences = [_ending(ending, deployment.drain_seconds)]
    if replicas:
        sentences.append(f"{replicas} replica(s) stay.")
    else:
        only = _routes_that_lead_only_to(deployment)
        if only:
            sentences.append(f"Clients of {', '.join(only)} get status 503 until it is started again.")
        sentences.append("The wish is kept; starting it again loads the model anew.")
    return " ".join(sentences)


def restart_effect(deployment: Deployment, _: int = 0) -> str:
    if deployment.replicas == 0:
        return "It is stopped: nothing runs that could be restarted."
    live = _live(deployment)
    starting = [worker for worker in live if worker.state in WORKER_STARTING]
    serving = [worker for worker in live if worker.state in SERVING]
    sentences = []
    if starting:
        sentences.append(f"{len(starting)} worker(s) that do not serve yet are started anew at once.")
    if serving:
        sentences.append(
            f"{len(serving)} worker(s) with {_requests(serving)} are replaced one by one: each accepts "
            f"nothing new, finishes within {deployment.drain_seconds} s at most, and its successor is ready "
            "before the next one follows."
        )
    if not live:
        sentences.append("Nothing runs; past failures are forgotten and it is tried again.")
    if len(serving) == 1 and deployment.replicas == 1:
        sentences.append(
            f"It is the only one: until its successor is ready, requests wait {deployment.queue_seconds} s "
            "at most and then get status 503. Scale to 2 first to avoid that."
        )
    return " ".join(sentences)


def replace_effect(worker: Worker, _: int = 0) -> str:
    if worker.state in (WorkerState.STOPPED, WorkerState.FAILED):
        return f"It has ended ({worker.state}) already. Nothing changes."
    if worker.state == WorkerState.DRAINING:
        return "It is finishing its requests already."
    if worker.replica >= worker.deployment.replicas:
        return f"{_ending([worker], worker.deployment.drain_seconds)} No other takes its place."
    others = worker.deployment.workers.ready().exclude(pk=worker.pk).count()
    return (
        f"{_ending([worker], worker.deployment.drain_seconds)} Then another is started in its place. "
        f"{others} other worker(s) of {worker.deployment} serve meanwhile."
    )


def cordon_effect(node: Node, _: int = 0) -> str:
    if node.cordoned:
        return "It is cordoned already. Nothing changes."
    live = _here(node)
    return (
        f"It gets no new worker. Its {live} live worker(s) go on; one that ends is started again on another "
        "node, if there is one."
    )


def uncordon_effect(node: Node, _: int = 0) -> str:
    if not node.cordoned:
        return "It is not cordoned. Nothing changes."
    return f"It may get new workers again. Its {_here(node)} live worker(s) go on."


def _here(node: Node) -> int:
    return Worker.objects.live().filter(node=node).count()


def _live(deployment: Deployment) -> list[Worker]:
    return list(deployment.workers.live().order_by("replica"))


def _requests(workers: list[Worker]) -> str:
    return f"{sum(worker.running + worker.waiting for worker in workers)} request(s) in flight"


def _ending(workers: list[Worker], drain_seconds: int) -> str:
    if not workers:
        return "No worker runs that would have to end."
    names = ", ".join(worker.name for worker in workers[:5]) + (" …" if len(workers) > 5 else "")
    return (
        f"{len(workers)} worker(s) ({names}) with {_requests(workers)} accept nothing new, finish within "
        f"{drain_seconds} s at most, and end."
    )


def _place_of(deployment: Deployment) -> str:
    """Where reconcile would put the next worker now."""
    wishes = read_wishes([deployment])
    if not wishes:
        return ""
    facts = read_facts(wishes)
    placement = place(wishes[0], facts.nodes, Counter(worker.node_id for worker in facts.workers))
    if placement.node is None:
        return f"No node can take one now: {placement.explain()}."
    return f"The next one goes to {placement.node.name}."


def _routes_that_lead_only_to(deployment: Deployment) -> list[str]:
    routes = Route.objects.filter(targets__deployment=deployment, enabled=True)
    alone = (
        Route.objects.filter(pk__in=routes.values("pk"))
        .annotate(others=Count("targets"), replicas=Sum("targets__deployment__replicas"))
        .order_by("name")
    )
    return [route.name for route in alone if (route.replicas or 0) <= deployment.replicas]
