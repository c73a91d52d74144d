"""S17: behind a proxy that speaks TLS, cookies travel over TLS only and a foreign origin changes nothing."""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from django.contrib.auth import get_user_model
from django.test import Client, override_settings

from config.env import BadEnvironment, read_env

ROOT = Path(__file__).resolve().parents[2]
SHOWN = [
    "SESSION_COOKIE_SECURE",
    "CSRF_COOKIE_SECURE",
    "SECURE_HSTS_SECONDS",
    "CSRF_TRUSTED_ORIGINS",
    "SESSION_COOKIE_HTTPONLY",
    "SESSION_COOKIE_SAMESITE",
]


def settings_with(data: Path, **environment: str) -> dict[str, object]:
    """The settings that a process with this environment has."""
    code = (
        "import django, json; from django.conf import settings; django.setup(); "
        f"shown = {{name: getattr(settings, name) for name in {SHOWN!r}}}; "
        "print(json.dumps(shown | {'formatter': settings.LOGGING['handlers']['stderr']['formatter']}))"
    )
    process = subprocess.run(
        [sys.executable, "-c", code],
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'platform'}",
            "DJANGO_SETTINGS_MODULE": "config.settings.production",
            "ROUNDHOUSE_DATA": str(data),
            **environment,
        },
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return json.loads(process.stdout)  # type: ignore[no-any-return]


def test_a_public_deployment_sends_its_cookies_over_tls_only(tmp_path: Path) -> None:
    public = settings_with(
        tmp_path,
        ROUNDHOUSE_HTTPS="yes",
        ROUNDHOUSE_ALLOWED_HOSTS="roundhouse.example.com",
        ROUNDHOUSE_LOG_FORMAT="json",
    )
    assert public["SESSION_COOKIE_SECURE"] is public["CSRF_COOKIE_SECURE"] is True
    assert public["SESSION_COOKIE_HTTPONLY"] is True
    assert public["SESSION_COOKIE_SAMESITE"] == "Lax"
    assert public["SECURE_HSTS_SECONDS"] == 30 * 24 * 3600
    assert "https://roundhouse.example.com" in public["CSRF_TRUSTED_ORIGINS"]  # type: ignore[operator]
    assert public["formatter"] == "json"
    private = settings_with(tmp_path)
    assert private["SESSION_COOKIE_SECURE"] is False
    assert private["formatter"] == "line"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ROUNDHOUSE_HTTPS", "maybe"),
        ("ROUNDHOUSE_LOG_FORMAT", "xml"),
        ("ROUNDHOUSE_METRICS_TOKEN", "short"),
        ("ROUNDHOUSE_METRICS_TOKEN", "with\na-control-character-in-it"),
    ],
)
def test_a_value_that_cannot_be_used_is_named_and_a_secret_not_shown(
    tmp_path: Path, name: str, value: str
) -> None:
    with pytest.raises(BadEnvironment, match=name) as raised:
        read_env({"ROUNDHOUSE_DATA": str(tmp_path), name: value})
    if "TOKEN" in name:
        assert value not in str(raised.value)


@pytest.mark.django_db
@pytest.mark.parametrize("origin", ["https://roundhouse.example.com", "https://evil.example", "null"])
def test_only_our_own_origin_may_log_in_through_the_proxy(origin: str) -> None:
    get_user_model().objects.create_superuser("olga", password="x")
    client = Client(enforce_csrf_checks=True, headers={"host": "roundhouse.example.com"})
    with override_settings(
        ALLOWED_HOSTS=["roundhouse.example.com"], CSRF_TRUSTED_ORIGINS=["https://roundhouse.example.com"]
    ):
        page = client.get("/admin/login/").content.decode()
        token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page)[1]  # type: ignore[index]
        form = {"username": "olga", "password": "x", "csrfmiddlewaretoken": token}
        answer = client.post("/admin/login/?next=/admin/", form, headers={"origin": origin})
    assert answer.status_code == (302 if origin == "https://roundhouse.example.com" else 403)


def test_the_documented_command_prints_the_derived_pepper(tmp_path: Path) -> None:
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "secret_key").write_text("k" * 60)
    text = (ROOT / "docs" / "security.md").read_text()
    [script] = re.findall(r"<<'PRINT'\n(.*?)PRINT", text, re.DOTALL)
    printed = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, check=True
    ).stdout.strip()
    env = read_env({"ROUNDHOUSE_DATA": str(tmp_path / "var")})
    assert printed == f"1:{env.key_peppers[1].hex()}"
    assert env.key_peppers[1] == hmac.digest(b"k" * 60, b"roundhouse.api-key-pepper.1", hashlib.sha256)
