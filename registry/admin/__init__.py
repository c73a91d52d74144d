"""Admin pages of the facts: models, projects, keys, routes, join tokens, usage, the timeline.

All writes go through `registry.actions`, so that gateways and the timeline hear of them.
"""

from django.contrib import admin

from registry.admin import access, language_models, nodes, records, routes  # noqa: F401 (they register)

admin.site.site_header = "Roundhouse"
admin.site.site_title = "Roundhouse"
admin.site.index_title = "Administration"
