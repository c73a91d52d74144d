"""Admin pages of what runs: deployments, nodes, workers, copies.

They write wishes through `registry.actions` and show what became of them.
"""

from inference.admin import deployments, models, nodes, requests, workers  # noqa: F401 (they register)
