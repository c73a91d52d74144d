"""URLs that Django serves. Generation, probes and whatever else is under /v1 are consumers: `config.asgi`."""

from django.urls import URLPattern, path

from openai_api.usage import CompletionsUsage, Costs, EmbeddingsUsage
from openai_api.views import ModelDetail, Models

urlpatterns: list[URLPattern] = [
    path("v1/organization/usage/completions", CompletionsUsage.as_view()),
    path("v1/organization/usage/embeddings", EmbeddingsUsage.as_view()),
    path("v1/organization/costs", Costs.as_view()),
    path("v1/models", Models.as_view()),
    path("v1/models/<path:model>", ModelDetail.as_view()),
]
