"""A state as colour, icon and word: none of the three is needed to read the others."""

from __future__ import annotations

from django.utils.html import format_html
from django.utils.safestring import SafeString

LOOKS: dict[str, tuple[str, str]] = {
    "ready": ("good", "●"),
    "online": ("good", "●"),
    "requested": ("busy", "◔"),
    "joining": ("busy", "◔"),
    "starting": ("busy", "◑"),
    "launching": ("busy", "◑"),
    "fetching": ("busy", "◑"),
    "converting": ("busy", "◑"),
    "loading": ("busy", "◕"),
    "draining": ("busy", "◐"),
    "degraded": ("warn", "▲"),
    "suspect": ("warn", "▲"),
    "lost": ("bad", "✖"),
    "offline": ("bad", "✖"),
    "failed": ("bad", "✖"),
    "stopped": ("idle", "■"),
}
"""Class and icon by state, of workers, nodes, deployments and copies alike."""


def badge(state: str, words: str = "") -> SafeString:
    """`words` stand instead of the state's own name."""
    look, icon = LOOKS.get(state, ("idle", "■"))
    return format_html(
        '<span class="rh-badge rh-{}"><span aria-hidden="true">{}</span> {}</span>',
        look,
        icon,
        words or state,
    )


def bar(done: int, total: int, words: str) -> SafeString:
    """How far something is; without a total only the words."""
    if not total:
        return format_html("{}", words)
    return format_html('<progress value="{}" max="{}"></progress> {}', min(done, total), total, words)
