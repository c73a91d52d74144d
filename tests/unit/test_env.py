import stat

import pytest

from config.env import BadEnvironment, read_env


def test_defaults_are_one_machine_without_services(tmp_path):
    env = read_env({"ROUNDHOUSE_DATA": str(tmp_path / "data")})
    assert env.port == 8000
    assert env.host == "127.0.0.1"
    assert env.database_url == f"sqlite:///{tmp_path / 'data' / 'roundhouse.sqlite3'}"
    assert env.redis_url is None
    assert env.allowed_hosts == ("localhost", "127.0.0.1", "[::1]")


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
        ("ROUNDHOUSE_LOG_LEVEL", "loud"),
        ("ROUNDHOUSE_DATA", "/proc/roundhouse"),
    ],
)
def test_a_bad_value_is_refused_by_its_name(tmp_path, variable, value):
    with pytest.raises(BadEnvironment, match=variable):
        read_env({"ROUNDHOUSE_DATA": str(tmp_path), variable: value})
