"""The form of deployments: a wish's own fields, and the key of an upstream server, which it takes and never
shows."""

from __future__ import annotations

from typing import Any

from django import forms

from registry.models import Deployment
from registry.upstreams import MAX_KEY, check_key, url_of


class DeploymentForm(forms.ModelForm):
    new_key = forms.CharField(
        required=False,
        max_length=MAX_KEY,
        label="New key",
        widget=forms.PasswordInput(attrs={"autocomplete": "new-password"}),
        help_text="Sent to the server as a bearer token. It is kept encrypted, and shown to nobody again. "
        "Empty: the key stays as it is, unless the URL in the arguments changes: then it is cleared.",
    )
    remove_key = forms.BooleanField(required=False, label="Remove the key")

    class Meta:
        model = Deployment
        fields: list[str] = []  # the admin's fieldsets say which

    def clean(self) -> dict[str, Any]:
        cleaned: dict[str, Any] = super().clean() or {}
        if cleaned.get("new_key"):
            try:
                check_key(cleaned["new_key"])
            except forms.ValidationError as error:
                self.add_error("new_key", error)
            if cleaned.get("remove_key"):
                self.add_error("remove_key", "Give a new key or remove the old one, not both.")
        return cleaned

    def _post_clean(self) -> None:
        super()._post_clean()  # type: ignore[misc]
        if self.cleaned_data.get("new_key") and not self.errors and not url_of(self.instance):
            self.add_error("new_key", "Only a deployment of the upstream engine has one.")

    @property
    def upstream_key(self) -> str | None:
        """As `save_deployment` takes it."""
        return "" if self.cleaned_data.get("remove_key") else self.cleaned_data.get("new_key") or None
