"""Where Django's own pages live. Generation and the fleet are consumers: see `config.asgi`."""

from django.contrib import admin
from django.urls import include, path

urlpatterns = [
    path("admin/", admin.site.urls),
    path("", include("openai_api.urls")),
]
