"""Join tokens. The nodes themselves are shown with what they do, in `inference.admin`."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from django import forms
from django.contrib import admin, messages
from django.http import HttpRequest, HttpResponse, HttpResponseRedirect
from django.urls import reverse
from django.utils.html import format_html

from registry.actions.nodes import create_join_token
from registry.admin.common import by
from registry.keys import digest_secret
from registry.models import JoinToken


class JoinTokenForm(forms.ModelForm):
    uses = forms.IntegerField(min_value=1, max_value=1000, initial=1, help_text="Nodes that may join.")
    hours = forms.IntegerField(min_value=1, max_value=720, initial=1, help_text="It ends after this long.")

    class Meta:
        model = JoinToken
        fields: list[str] = []


@admin.register(JoinToken)
class JoinTokenAdmin(admin.ModelAdmin):
    form = JoinTokenForm
    list_display = ["created_at", "created_by", "uses_left", "expires_at"]

    def get_fields(self, request: HttpRequest, obj: JoinToken | None = None) -> Any:
        return ["uses", "hours"] if obj is None else ["uses_left", "expires_at", "created_at", "created_by"]

    def has_change_permission(self, request: HttpRequest, obj: JoinToken | None = None) -> bool:
        return False

    def save_model(self, request: HttpRequest, obj: JoinToken, form: Any, change: bool) -> None:
        text = create_join_token(
            by=by(request),
            uses=form.cleaned_data["uses"],
            lifetime=timedelta(hours=form.cleaned_data["hours"]),
        )
        obj.pk = JoinToken.objects.get(digest=digest_secret(text)).pk
        obj.refresh_from_db()
        messages.success(
            request,
            format_html(
                "Run on the new node: <code>manage.py node --join {} --url {}</code>. Copy it now: the token "
                "is not kept, and cannot be shown again.",
                text,
                request.build_absolute_uri("/").rstrip("/"),
            ),
        )

    def response_add(
        self, request: HttpRequest, obj: JoinToken, post_url_continue: str | None = None
    ) -> HttpResponse:
        return HttpResponseRedirect(reverse("admin:registry_jointoken_changelist"))
