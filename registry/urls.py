"""Pages for people who are logged in. The report over all keys is the admin's: `config.urls`."""

from django.urls import URLPattern, path

from registry.usage_pages import own_usage

urlpatterns: list[URLPattern] = [path("usage/", own_usage, name="usage")]
