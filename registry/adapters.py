"""LoRA adapters, as deployments name them: clients send `route:adapter`."""

from __future__ import annotations

from typing import Any

from registry.models import Route, RouteTarget
from registry.states import EngineName


def adapters_of(engine: str, arguments: Any) -> frozenset[str]:
    """Names of the adapters that workers started with these arguments carry; whether they can is theirs to
    say."""
    if engine != EngineName.VLLM or not isinstance(arguments, dict):
        return frozenset()
    given = arguments.get("lora_adapters")
    return frozenset(given) if isinstance(given, dict) else frozenset()


def model_names() -> list[str]:
    """Every name that clients can send, or could if its route were enabled: routes, and `route:adapter`."""
    names = set(Route.objects.values_list("name", flat=True))
    carrying = RouteTarget.objects.filter(deployment__engine=EngineName.VLLM)
    for route, engine, arguments in carrying.values_list(
        "route__name", "deployment__engine", "deployment__arguments"
    ):
        names.update(f"{route}:{adapter}" for adapter in adapters_of(engine, arguments))
    return sorted(names)
