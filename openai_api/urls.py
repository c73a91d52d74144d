"""URLs that Django serves. Generation, and every other path under /v1, are consumers: `config.asgi`."""

from django.urls import URLPattern, path

from openai_api.views import ModelDetail, Models, healthz, readyz

urlpatterns: list[URLPattern] = [
    path("v1/models", Models.as_view()),
    path("v1/models/<path:model>", ModelDetail.as_view()),
    path("healthz", healthz),
    path("readyz", readyz),
]
