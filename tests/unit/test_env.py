import re
import stat
import sys
from pathlib import Path

import pytest

from config import env
from config.env import BadEnvironment, read_env


def test_the_readme_lists_every_variable():
    variables = set(re.findall(r"^\| ([A-Z_]+) \|", env.__doc__, re.MULTILINE))
    assert "ROUNDHOUSE_VLLM_PYTHON" in variables
    listed = {
        name
        for line in (env.ROOT / "README.md").read_text().splitlines()
        if line.startswith("| `")
        for name in re.findall(r"`([A-Z_]+)`", line.split("|")[1])
    }
    assert variables == listed


def test_the_python_with_vllm_may_be_named(tmp_path):
    given = {"ROUNDHOUSE_DATA": str(tmp_path)}
    assert read_env(given).vllm_python is None
    assert read_env(given | {"ROUNDHOUSE_VLLM_PYTHON": sys.executable}).vllm_python == Path(sys.executable)


def test_defaults_are_one_machine_without_services(tmp_path):
    found = read_env({"ROUNDHOUSE_DATA": str(tmp_path / "data")})
    assert found.port == 8000
    assert found.host == "127.0.0.1"
    assert found.database_url == f"sqlite:///{tmp_path / 'data' / 'roundhouse.sqlite3'}"
    assert found.redis_url is None
    assert found.allowed_hosts == ("localhost", "127.0.0.1", "[::1]")


def test_the_secret_key_is_generated_once_and_only_its_owner_may_read_it(tmp_path):
    first = read_env({"ROUNDHOUSE_DATA": str(tmp_path)})
    again = read_env({"ROUNDHOUSE_DATA": str(tmp_path)})
    assert first.secret_key == again.secret_key
    assert len(first.secret_key) >= 50
    assert stat.S_IMODE((tmp_path / "secret_key").stat().st_mode) == 0o600


def test_peppers_follow_the_secret_key_unless_they_are_given(tmp_path):
    one = read_env({"ROUNDHOUSE_DATA": str(tmp_path), "ROUNDHOUSE_SECRET_KEY": "a" * 50})
    two = read_env({"ROUNDHOUSE_DATA": str(tmp_path), "ROUNDHOUSE_SECRET_KEY": "b" * 50})
    assert one.key_peppers != two.key_peppers
    given = read_env(
        {"ROUNDHOUSE_DATA": str(tmp_path), "ROUNDHOUSE_KEY_PEPPERS": f"1:{'00' * 32},2:{'11' * 32}"}
    )
    assert given.key_peppers == {1: bytes(32), 2: b"\x11" * 32}


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("ROUNDHOUSE_PORT", "http"),
        ("ROUNDHOUSE_PORT", "0"),
        ("ROUNDHOUSE_PORT", "65536"),
        ("ROUNDHOUSE_SECRET_KEY", "short"),
        ("ROUNDHOUSE_ALLOWED_HOSTS", "example.org,*"),
        ("ROUNDHOUSE_KEY_PEPPERS", "1:zz"),
        ("ROUNDHOUSE_KEY_PEPPERS", "one:" + "00" * 32),
        ("ROUNDHOUSE_UPSTREAM_HOSTS", "10.0.0.1/8"),
        ("ROUNDHOUSE_UPSTREAM_HOSTS", "https://api.example.com"),
        ("ROUNDHOUSE_LOG_LEVEL", "loud"),
        ("ROUNDHOUSE_CURRENCY", "euros"),
        ("ROUNDHOUSE_CURRENCY", "€"),
        ("ROUNDHOUSE_USAGE_DAYS", "31"),
        ("ROUNDHOUSE_USAGE_DAYS", "-5"),
        ("ROUNDHOUSE_MAIL_URL", "mail.example.org"),
        ("ROUNDHOUSE_MAIL_URL", "http://mail.example.org"),
        ("ROUNDHOUSE_MAIL_URL", "smtp://mail.example.org:port"),
        ("ROUNDHOUSE_MAIL_FROM", "nobody"),
        ("ROUNDHOUSE_DATA", "/proc/roundhouse"),
        ("ROUNDHOUSE_VLLM_PYTHON", "/proc/none"),
        ("ROUNDHOUSE_VLLM_PYTHON", "/"),
        ("ROUNDHOUSE_VLLM_PYTHON", "python3"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(tmp_path, variable, value):
    with pytest.raises(BadEnvironment, match=variable):
        read_env({"ROUNDHOUSE_DATA": str(tmp_path), variable: value})


def test_a_mail_servers_password_never_goes_out_in_the_clear_nor_into_a_message(tmp_path):
    def mail_of(url):
        return read_env({"ROUNDHOUSE_DATA": str(tmp_path), "ROUNDHOUSE_MAIL_URL": url}).mail

    with_password = mail_of("smtp://robot:p%40ss@mail.example.org")
    assert (with_password.host, with_password.port, with_password.starttls) == ("mail.example.org", 587, True)
    assert (with_password.user, with_password.password) == ("robot", "p@ss")
    implicit = mail_of("smtps://robot:x@mail.example.org")
    assert (implicit.port, implicit.implicit_tls, implicit.starttls) == (465, True, False)
    assert mail_of("smtp://localhost").port == 25
    assert mail_of("") is None
    with pytest.raises(BadEnvironment) as refused:
        mail_of("imap://robot:s3cr3t@mail.example.org")
    assert "s3cr3t" not in str(refused.value)
