"""Template tags of the admin's pages."""

from __future__ import annotations

from typing import Any

from django import template

from inference.admin.dashboard import read_dashboard

register = template.Library()


@register.inclusion_tag("console/dashboard.html", takes_context=True)
def dashboard(context: Any) -> dict[str, Any]:
    """The block at the top of the admin's first page."""
    return read_dashboard(context["request"].user)
