"""S32: how long a refusal takes says nothing about how near the guess was, nor whether a person exists."""

from __future__ import annotations

import ast
import random
import re
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.contrib.auth.hashers import MD5PasswordHasher
from django.test import Client

from config.env import ROOT
from openai_api import auth
from openai_api.auth import Key, KeyRing, Secret
from openai_api.errors import WrongKey
from registry.keys import CHECKSUM_LENGTH, SECRET_LENGTH, NewKey, _checksum, digest_key, generate_key

pytestmark = pytest.mark.usefixtures("steady")

PEPPERS = {1: b"p" * 32}
SAMPLES = 10_000
"""Of each kind."""
TELLING = 4.5
"""A t beyond this is the usual sign of a leak."""


def key_with(public_id: str, secret: str) -> str:
    """A well-formed key, so that it comes as far as the comparison."""
    return f"sk-{public_id}-{secret}{_checksum(public_id + secret)}"


def welch_t(one: list[float], other: list[float]) -> float:
    def trimmed(times: list[float]) -> list[float]:
        # What else runs here makes some of them long, of either kind.
        return sorted(times)[: len(times) * 8 // 10]

    one, other = trimmed(one), trimmed(other)
    spread = statistics.variance(one) / len(one) + statistics.variance(other) / len(other)
    return (statistics.mean(one) - statistics.mean(other)) / spread**0.5


def test_the_measure_tells_a_comparison_that_stops_at_the_first_difference() -> None:
    """A check of the check: were it done so, it would be seen."""
    right = "s" * SECRET_LENGTH

    def compare(text: str) -> bool:
        return all(mine == theirs for mine, theirs in zip(text, right, strict=True))

    near, far = right[:-1] + "x", "x" + right[1:]
    times = timed(lambda text: compare(text), [near, far], 2_000)
    assert abs(welch_t(*times)) > TELLING


async def test_a_guess_with_the_right_beginning_is_refused_as_fast_as_any_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(auth, "note_key_use", lambda **_: None)
    monkeypatch.setattr(auth, "UNKNOWN_SECONDS", 3600.0)
    new = generate_key()
    while len({_checksum_digits(text) for text in guesses(new)}) > 1:
        new = generate_key()
    key = Key(
        public_id=new.public_id,
        name="n",
        project_id=1,
        project_name="p",
        routes=frozenset(),
        expires_at=None,
        revoked=False,
        secrets=(Secret(id=1, digest=digest_key(new.text, PEPPERS[1]), pepper=1),),
    )
    ring = KeyRing(PEPPERS, away_seconds=lambda: 0.0, load=lambda _: key)
    await ring.authenticate(new.text)

    def ask(text: str) -> None:
        # It is in the ring: the check does not wait.
        try:
            ring.authenticate(text).send(None)
        except WrongKey:
            return
        raise AssertionError("a wrong key got in, or it was looked up")

    with pytest.raises(WrongKey):
        # The first wrong secret has the key read again, whichever it is.
        await ring.authenticate(guesses(new)[0])
    assert abs(welch_t(*timed(ask, guesses(new), SAMPLES))) < TELLING


def guesses(new: NewKey) -> list[str]:
    """One wrong in its secret's last character only, one in its first."""
    secret = new.text[-SECRET_LENGTH - CHECKSUM_LENGTH : -CHECKSUM_LENGTH]
    last = "0" if secret[-1] != "0" else "1"
    first = "0" if secret[0] != "0" else "1"
    return [key_with(new.public_id, secret[:-1] + last), key_with(new.public_id, first + secret[1:])]


def _checksum_digits(text: str) -> int:
    """Of the number that the guess's own checksum is made of. Python divides one of a single digit (30 bits)
    some 30 ns sooner, which tells the guesser nothing new."""
    public_id, proved = text.split("-")[1:]
    return 1 if zlib.crc32((public_id + proved[:SECRET_LENGTH]).encode()) < 2**30 else 2


def timed(call: Any, kinds: list[str], samples: int) -> list[list[float]]:
    """How long each kind took, asked in random order."""
    order = random.Random(1)
    times: list[list[float]] = [[] for _ in kinds]
    for _ in range(samples):
        for kind in order.sample(range(len(kinds)), len(kinds)):
            began = time.perf_counter_ns()
            call(kinds[kind])
            times[kind].append(time.perf_counter_ns() - began)
    return times


@pytest.mark.django_db
@pytest.mark.parametrize("url", ["/admin/login/", "/login/"])
def test_a_name_that_nobody_has_costs_a_password_hash_too(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    get_user_model().objects.create_user("ann", password="right")
    hashed: list[str] = []
    encode = MD5PasswordHasher.encode

    def counted(self: MD5PasswordHasher, password: str, salt: str) -> str:
        hashed.append(password)
        return str(encode(self, password, salt))

    monkeypatch.setattr(MD5PasswordHasher, "encode", counted)
    client = Client(headers={"host": "localhost:8000"})
    for name in ("ann", "nobody"):
        hashed.clear()
        answer = client.post(url, {"username": name, "password": "wrong"})
        assert answer.status_code == 200
        assert hashed == ["wrong"], name


SECRET_NAME = re.compile(r"(?:^|_)(?:secret|digest|password|pepper|signature|hmac|credential|token)\Z")
PLAIN = (ast.Eq, ast.NotEq)
PACKAGES = ("platform", "registry", "inference", "openai_api", "webchat")


def compared_plainly(source: str) -> list[str]:
    """Comparisons by `==` in which a secret takes part, by its name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Compare) or not any(isinstance(one, PLAIN) for one in node.ops):
            continue
        if any(SECRET_NAME.search(_name(part)) for part in (node.left, *node.comparators)):
            found.append(ast.unparse(node))
    return found


def _name(node: ast.expr) -> str:
    match node:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Call(func=function):
            return _name(function)
        case ast.Subscript(slice=ast.Constant(value=name)):
            return str(name)
    return ""


def test_no_secret_is_compared_by_equality() -> None:
    assert compared_plainly("if node.secret_digest == digest: pass\nif a['token'] != b: pass") == [
        "node.secret_digest == digest",
        "a['token'] != b",
    ]
    found = {
        str(path.relative_to(ROOT)): plainly
        for package in PACKAGES
        for path in sorted(Path(ROOT / package).rglob("*.py"))
        if (plainly := compared_plainly(path.read_text()))
    }
    assert found == {}
