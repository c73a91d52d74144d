"""Admin pages of the facts: models, projects, keys, routes, join tokens, usage, the timeline.

All writes go through `registry.actions`, so that gateways and the timeline hear of them.
"""

from django.contrib import admin

from registry.admin import (  # noqa: F401 (they register)
    access,
    budgets,
    language_models,
    limits,
    nodes,
    prices,
    records,
    routes,
)

admin.site.site_header = "Roundhouse"
admin.site.site_title = "Roundhouse"
admin.site.index_title = "Administration"
