"""Keys in the browser: `/keys/` for one's own, and parts that the admin's page of a key has too."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from functools import wraps
from typing import Any

from django import forms
from django.contrib import messages
from django.contrib.auth.views import redirect_to_login
from django.http import Http404, HttpRequest, HttpResponse, HttpResponseBase, HttpResponseNotAllowed
from django.shortcuts import redirect, render
from django.urls import reverse
from django.utils import timezone
from django.utils.html import format_html, format_html_join
from django.utils.safestring import SafeString

from registry.actions.api_keys import MAX_OVERLAP
from registry.actions.own_keys import (
    issue_own_key,
    may_issue,
    may_revoke,
    may_rotate,
    revoke_own_key,
    role_in,
    rotate_own_key,
)
from registry.errors import InvalidInput, InvalidTransition, NotAllowed
from registry.models import ApiKey, Membership, Project
from registry.rights import Priority, Role, Scope, validate_cidrs, validate_routes

OVERLAPS = {
    "0": "at once",
    "1": "after an hour",
    "24": "after a day",
    "168": "after a week",
    "720": "after 30 days",
}
"""When the old secret ends, by hours."""
LIFETIMES = {"": "as the project has it", "7": "7 days", "30": "30 days", "90": "90 days", "365": "a year"}
ROWS = 200
"""Keys that the page lists, the newest first."""


# -- parts


def private(response: HttpResponse) -> HttpResponse:
    response["Cache-Control"] = "private, no-store"
    return response


def shown_once(name: str, text: str) -> SafeString:
    return format_html(
        "The key of {} is <code>{}</code>. Copy it now: it is not kept, and cannot be shown again.",
        name,
        text,
    )


def secrets_rows(api_key: ApiKey) -> SafeString:
    """The rows of a key's secrets: which still works, and which is still used."""
    now = timezone.now()
    rows = []
    for secret in api_key.secrets.all():
        if not api_key.usable(now) or not secret.usable(now):
            state = "ended"
        elif secret.expires_at is None:
            state = "works"
        else:
            state = f"works until {secret.expires_at:%Y-%m-%d %H:%M} UTC"
        rows.append(
            (f"…{secret.last4}", f"{secret.created_at:%Y-%m-%d %H:%M}", state, _ago(secret.last_used_at))
        )
    return format_html_join("", "<tr><td>{}</td><td>{}</td><td>{}</td><td>{}</td></tr>", rows)


def secrets_table(api_key: ApiKey, source: str) -> SafeString:
    """The same with its heading; `registry/secrets.js` keeps it up to date from `source`."""
    return format_html(
        '<table class="secrets" data-source="{}"><thead><tr><th scope="col">Secret</th>'
        '<th scope="col">Made</th><th scope="col">State</th><th scope="col">Last used</th></tr></thead>'
        "<tbody>{}</tbody></table>",
        source,
        secrets_rows(api_key),
    )


def _ago(instant: Any) -> str:
    if instant is None:
        return "never"
    seconds = int((timezone.now() - instant).total_seconds())
    if seconds < 90:
        return "within the last minute"
    for size, name in ((86_400, "day"), (3_600, "hour"), (60, "minute")):
        if seconds >= size:
            count = seconds // size
            return f"{count} {name}{'s' if count != 1 else ''} ago"
    return "a minute ago"


class RotateForm(forms.Form):
    overlap = forms.ChoiceField(
        label="The old secret ends",
        choices=list(OVERLAPS.items()),
        initial="24",
        help_text=f"Until then both work. At most {MAX_OVERLAP.days} days by command.",
    )

    def clean_overlap(self) -> timedelta:
        return timedelta(hours=int(self.cleaned_data["overlap"]))


# -- one's own keys


class NewKeyForm(forms.Form):
    """What a member may say of a new key."""

    name = forms.CharField(max_length=120, help_text="Who or what uses it; shown in reports.")
    project = forms.ModelChoiceField(queryset=Project.objects.none(), empty_label=None)
    expires = forms.ChoiceField(required=False, choices=list(LIFETIMES.items()), label="It ends after")
    routes = forms.CharField(
        required=False,
        max_length=2000,
        label="Models",
        help_text="Separated by commas; smol* means those that begin so. Empty: all that the project may.",
    )
    scopes = forms.MultipleChoiceField(
        required=False,
        choices=Scope.choices,
        widget=forms.CheckboxSelectMultiple,
        label="Endpoints",
        help_text="None chosen: all that the project may use.",
    )
    cidrs = forms.CharField(
        required=False,
        max_length=2000,
        label="Addresses",
        help_text="Networks from which it may be used, such as 10.0.0.0/8, separated by commas. "
        "Empty: from everywhere.",
    )
    priority = forms.ChoiceField(
        required=False,
        choices=[("", "as the project has it"), *Priority.choices],
        help_text="When all workers are busy.",
    )

    def __init__(self, data: Any, user: Any) -> None:
        super().__init__(data)
        self._user = user
        roles = (Role.OWNER, Role.MEMBER)
        projects = Project.objects.filter(memberships__user_id=user.pk, memberships__role__in=roles)
        self.fields["project"].queryset = projects  # type: ignore[attr-defined]

    def clean_routes(self) -> list[str]:
        return _words(self.cleaned_data["routes"], validate_routes)

    def clean_cidrs(self) -> list[str]:
        return _words(self.cleaned_data["cidrs"], validate_cidrs)

    def issue(self) -> tuple[ApiKey, str] | None:
        """The key and its text; None: the form says what is wrong."""
        asked = self.cleaned_data
        days = asked["expires"]
        try:
            return issue_own_key(
                user=self._user,
                project=asked["project"],
                name=asked["name"],
                expires_at=timezone.now() + timedelta(days=int(days)) if days else None,
                routes=asked["routes"],
                scopes=asked["scopes"],
                cidrs=asked["cidrs"],
                priority=asked["priority"] or None,
            )
        except InvalidInput as error:
            field = {"expires_at": "expires"}.get(error.field, error.field)
            self.add_error(field if field in self.fields else None, error.message)
        except NotAllowed as error:
            self.add_error("project", str(error))
        return None


def _words(text: str, validate: Callable[[Any], None]) -> list[str]:
    words = [part.strip() for part in text.split(",") if part.strip()]
    validate(words)
    return words


def _own(*methods: str) -> Callable[[Callable[..., HttpResponse]], Callable[..., HttpResponseBase]]:
    """A page for people who are logged in. Their keys are nobody else's business, caches included."""

    def decorate(view: Callable[..., HttpResponse]) -> Callable[..., HttpResponseBase]:
        @wraps(view)
        def guarded(request: HttpRequest, **arguments: Any) -> HttpResponseBase:
            if not request.user.is_authenticated:
                return redirect_to_login(request.get_full_path())
            if request.method not in methods:
                return HttpResponseNotAllowed(methods)
            return private(view(request, **arguments))

        return guarded

    return decorate


def _found(request: HttpRequest, public_id: str) -> ApiKey:
    """A key that this person may see. Whether there is another is not told."""
    keys = ApiKey.objects.seen_by(request.user).select_related("project", "owner")  # type: ignore[arg-type]
    key = keys.filter(public_id=public_id).first()
    if key is None:
        raise Http404
    return key


@_own("GET", "POST")
def own_keys_page(request: HttpRequest) -> HttpResponse:
    """The keys of one's projects, and a form for a new one."""
    user: Any = request.user
    roles = dict(Membership.objects.filter(user_id=user.pk).values_list("project_id", "role"))
    form = NewKeyForm(request.POST if request.method == "POST" else None, user)
    status = 200
    if request.method == "POST":
        issued = form.issue() if form.is_valid() else None
        if issued is not None:
            messages.success(request, shown_once(issued[0].name, issued[1]))
            return redirect("own_key", public_id=issued[0].public_id)
        status = 400
    now = timezone.now()
    keys = ApiKey.objects.seen_by(user).select_related("project", "owner")[: ROWS + 1]
    context = {
        "title": "Your keys",
        "form": form if any(may_issue(role) for role in roles.values()) else None,
        "member": bool(roles),
        "keys": [(key, _state(key, now), key.owner_id == user.pk) for key in keys[:ROWS]],
        "more": len(keys) > ROWS,
    }
    return render(request, "registry/keys.html", context, status=status)


@_own("GET")
def own_key_page(request: HttpRequest, public_id: str) -> HttpResponse:
    """One key: what it may do, which of its secrets is still used, and what can be done with it."""
    key = _found(request, public_id)
    role = role_in(request.user, key.project_id)
    usable = key.usable(timezone.now())
    context = {
        "title": key.name,
        "key": key,
        "state": _state(key, timezone.now()),
        "secrets": secrets_table(key, reverse("own_key_secrets", args=[public_id])),
        "rotate": RotateForm() if usable and may_rotate(request.user, key, role) else None,
        "may_revoke": key.revoked_at is None and may_revoke(request.user, key, role),
    }
    return render(request, "registry/key.html", context)


@_own("GET")
def own_key_secrets(request: HttpRequest, public_id: str) -> HttpResponse:
    """The rows of its secrets as they are now."""
    return HttpResponse(secrets_rows(_found(request, public_id)))


@_own("POST")
def rotate_page(request: HttpRequest, public_id: str) -> HttpResponse:
    key = _found(request, public_id)
    form = RotateForm(request.POST)
    if not form.is_valid():
        messages.error(request, "Say when the old secret ends.")
        return redirect("own_key", public_id=public_id)
    try:
        text = rotate_own_key(user=request.user, api_key=key, overlap=form.cleaned_data["overlap"])
    except (InvalidInput, InvalidTransition, NotAllowed) as error:
        messages.error(request, str(error))
    else:
        messages.success(request, shown_once(key.name, text))
    return redirect("own_key", public_id=public_id)


@_own("POST")
def revoke_page(request: HttpRequest, public_id: str) -> HttpResponse:
    key = _found(request, public_id)
    if not request.POST.get("sure"):
        messages.error(request, "Tick that you are sure: it cannot be undone.")
        return redirect("own_key", public_id=public_id)
    try:
        revoke_own_key(user=request.user, api_key=key)
    except NotAllowed as error:
        messages.error(request, str(error))
    else:
        messages.success(request, f"{key.name} is revoked: programs that use it are refused within a second.")
    return redirect("own_key", public_id=public_id)


def _state(key: ApiKey, now: Any) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if not key.usable(now):
        return "expired"
    return "usable"
