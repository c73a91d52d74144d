"""Pages for people who are logged in. The report over all keys is the admin's: `config.urls`."""

from django.urls import URLPattern, path

from registry import key_pages
from registry.usage_pages import own_usage

urlpatterns: list[URLPattern] = [
    path("usage/", own_usage, name="usage"),
    path("keys/", key_pages.own_keys_page, name="own_keys"),
    path("keys/<slug:public_id>/", key_pages.own_key_page, name="own_key"),
    path("keys/<slug:public_id>/secrets/", key_pages.own_key_secrets, name="own_key_secrets"),
    path("keys/<slug:public_id>/rotate/", key_pages.rotate_page, name="rotate_own_key"),
    path("keys/<slug:public_id>/revoke/", key_pages.revoke_page, name="revoke_own_key"),
]
