"""Where Django's own pages live. Generation and the fleet are consumers: see `config.asgi`."""

from django.contrib import admin
from django.urls import include, path

from inference.admin.dashboard import dashboard_view
from openai_api.pages import docs
from registry.usage_pages import all_usage
from webchat.login import AdminLoginForm, admin_login

admin.site.login_form = AdminLoginForm

urlpatterns = [
    path("admin/dashboard/", dashboard_view, name="console-dashboard"),
    path("admin/usage/", admin.site.admin_view(all_usage), name="admin_usage"),
    path("admin/login/", admin_login),
    path("admin/", admin.site.urls),
    path("docs/", docs, name="api-docs"),
    path("api/v1/", include("openai_api.management")),
    path("", include("registry.urls")),
    path("", include("openai_api.urls")),
    path("", include("webchat.urls")),
]
