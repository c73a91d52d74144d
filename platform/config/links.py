"""`manage.py doctor --model M`: the links between a client and an answer, in order, up to the broken one."""

from __future__ import annotations

from collections.abc import Iterator

from django.db import Error as DatabaseError
from django.utils import timezone

from config.asking import Api, Unanswered
from config.doctor import START, Finding, check_control, check_gateway, check_nodes, well, wrong
from inference.status import DeploymentState, DeploymentStatus, read_statuses
from registry.keys import mask_key, public_id_of
from registry.models import ApiKey, Deployment, Route, Worker

QUESTION = "Say hello."
LOG_LINES = 5


def trace(model: str, *, url: str, key: str) -> Iterator[Finding]:
    """Send one message end to end. When it fails, say which link is broken; the last finding is that one."""
    try:
        api = Api(url, key)
        models = api.models()
    except Unanswered as error:
        yield _why_no_list(error, url, key)
        return
    if models:
        yield well("models", f"{url} offers {len(models)}: {', '.join(models[:5])}")
    else:
        yield wrong("models", "the list of models is empty.", "Make a route that this key may use.")
    try:
        *_, answer = api.chat(model, [{"role": "user", "content": QUESTION}], max_tokens=16)
    except Unanswered as error:
        failure = error
    else:
        yield well("answer", f"{model} answered: {answer.speed()}")
        return
    yield wrong("answer", f"{model} did not answer: {failure}", "See below.")
    try:
        yield from _broken_link(model, key, failure)
    except DatabaseError as error:
        yield wrong("database", "it does not answer.", f"Mend it first ({type(error).__name__}).")


def _why_no_list(error: Unanswered, url: str, key: str) -> Finding:
    if error.status is None:
        gateway = check_gateway()
        todo = gateway.todo if not gateway.well else "Correct --url."
        return wrong("gateway", str(error), todo)
    if error.status in (401, 403):
        return wrong("key", *_why_refused(key))
    return wrong("gateway", f"{url} answers with status {error.status}: {error}", "Read the gateway's log.")


def _why_refused(key: str) -> tuple[str, str]:
    make = "Make one: `manage.py key create NAME`."
    shown = mask_key(key)
    public_id = public_id_of(key)
    if public_id is None:
        return f"{shown} has not the form of a key of ours; a character may be missing.", make
    try:
        row = ApiKey.objects.filter(public_id=public_id).first()
    except DatabaseError:
        return f"{shown} is refused, and the database does not answer.", "Mend the database first."
    if row is None:
        return f"{shown} is not known to this database.", make
    if row.revoked_at is not None:
        return f"{row} was revoked on {row.revoked_at:%Y-%m-%d %H:%M} UTC.", make
    if not row.usable(timezone.now()):
        return f"{row} expired on {row.expires_at:%Y-%m-%d %H:%M} UTC.", make
    return (
        f"{row} is usable, but its text does not prove it.",
        "The secret key or the peppers were changed, or the key is mistyped; make a new one.",
    )


def _broken_link(model: str, key: str, failure: Unanswered) -> Iterator[Finding]:
    """From the client inwards: route, key, deployment, node, control, worker."""
    route = Route.objects.filter(name=model).first()
    if route is None:
        yield wrong("route", *_no_route(model))
        return
    if not route.enabled:
        yield wrong("route", f"{model} is disabled.", "Enable it in the admin.")
        return
    row = ApiKey.objects.filter(public_id=public_id_of(key) or "").first()
    if row is not None and row.routes and model not in row.routes:
        yield wrong(
            "key",
            f"{row} may use only {', '.join(row.routes)}.",
            f"Allow {model} in the admin, or `manage.py key create NAME --routes {model}`.",
        )
        return
    deployments = list(route.deployments.select_related("language_model"))
    if not deployments:
        yield wrong(
            "route",
            f"{model} leads to no deployment.",
            f"Deploy one: `manage.py deploy NAME --model MODEL --route {model}`.",
        )
        return
    yield well("route", f"{model} leads to {', '.join(map(str, deployments))}")
    wanted = [deployment for deployment in deployments if deployment.replicas]
    if not wanted:
        yield wrong(
            "deployment",
            f"{deployments[0]} is scaled to 0.",
            f"Run `manage.py scale {deployments[0]} 1`.",
        )
        return
    statuses = read_statuses(wanted)
    serving = [
        each
        for each in wanted
        if statuses[each.pk].state in (DeploymentState.READY, DeploymentState.DEGRADED)
    ]
    if serving:
        yield from _serving_but_unanswered(serving[0], statuses[serving[0].pk], failure)
        return
    yield from _not_serving(wanted[0], statuses[wanted[0].pk])


def _no_route(model: str) -> tuple[str, str]:
    if Deployment.objects.filter(name=model).exists():
        return (
            f"the deployment {model} has no route of that name, so no client reaches it.",
            f"Run `manage.py deploy {model} --route {model}`.",
        )
    known = ", ".join(Route.objects.filter(enabled=True).values_list("name", flat=True)[:10])
    if not known:
        return (
            f"there is no route {model}, nor any other.",
            "Deploy a model: `manage.py deploy NAME --model MODEL`.",
        )
    return (
        f"there is no route {model}.",
        f"Use one of {known}, or `manage.py deploy NAME --model MODEL --route {model}`.",
    )


def _not_serving(deployment: Deployment, status: DeploymentStatus) -> Iterator[Finding]:
    nodes = list(check_nodes())
    if not any(node.well for node in nodes):
        yield from nodes
        return
    control = check_control()
    if not control.well:
        yield control
        return
    worker = Worker.objects.filter(deployment=deployment).order_by("-id").first()
    said = f"{deployment} is {status.state.value}. {status.reason}"
    if status.state == DeploymentState.FAILED and worker is not None:
        lines = worker.log_tail.splitlines()[-LOG_LINES:]
        said += "".join(f"\n      {line}" for line in lines)
    yield wrong("worker", said, status.next_action or "Wait until it is ready, and look again.")


def _serving_but_unanswered(
    deployment: Deployment, status: DeploymentStatus, failure: Unanswered
) -> Iterator[Finding]:
    if failure.status == 503:
        yield wrong(
            "worker",
            f"{deployment} is {status.state.value}, but all of its workers are busy or cannot be reached.",
            "Look at `manage.py status`; more replicas or slots take more requests. From another machine, "
            "the gateway must reach the node's workers.",
        )
    elif failure.status is not None and failure.status < 500:
        yield wrong("request", f"the engine of {deployment} refuses it.", "Read the sentence above.")
    else:
        yield wrong(
            "worker",
            f"{deployment} is {status.state.value}, but broke while it answered.",
            f"Read its log in the admin. {START} again if it goes on.",
        )
