"""The ring of keys, with the database's part played by a function."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace

import pytest
from django.db import OperationalError

from openai_api import auth
from openai_api.auth import Key, KeyRing, Secret
from openai_api.errors import MissingKey, StorageAway, WrongKey
from registry.keys import CHECKSUM_LENGTH, NewKey, _checksum, digest_key, generate_key

PEPPERS = {1: b"p" * 32, 2: b"q" * 32}


class Database:
    """What the ring may ask, and how often it did."""

    def __init__(self) -> None:
        self.keys: dict[str, Key] = {}
        self.asked = 0
        self.away = False
        self.away_seconds = 0.0
        self.gate = threading.Event()
        self.gate.set()
        self.reading = threading.Event()

    def load(self, public_id: str) -> Key | None:
        self.asked += 1
        key = self.keys.get(public_id)
        self.reading.set()
        self.gate.wait(5)
        if self.away:
            raise OperationalError("away")
        return key

    def issue(self, *, pepper: int = 1, expires_at: float | None = None, revoked: bool = False) -> NewKey:
        new = generate_key()
        self.keys[new.public_id] = Key(
            public_id=new.public_id,
            name="n",
            project_id=1,
            project_name="p",
            secrets=(Secret(id=1, digest=digest_key(new.text, PEPPERS.get(pepper, b"gone")), pepper=pepper),),
            routes=frozenset(),
            expires_at=expires_at,
            revoked=revoked,
        )
        return new

    def ring(self) -> KeyRing:
        return KeyRing(PEPPERS, away_seconds=lambda: self.away_seconds, load=self.load)


@pytest.fixture
def database(monkeypatch: pytest.MonkeyPatch) -> Database:
    # Its only write; the unit tests have no database.
    monkeypatch.setattr(auth, "note_key_use", lambda **_: None)
    return Database()


async def test_a_key_is_looked_up_once_however_many_ask(database: Database) -> None:
    ring, new = database.ring(), database.issue(pepper=2)
    found = await asyncio.gather(*[ring.authenticate(new.text) for _ in range(20)])
    assert {key.public_id for key in found} == {new.public_id}
    await ring.authenticate(new.text)
    assert database.asked == 1


async def test_a_key_with_another_secret_is_refused(database: Database) -> None:
    ring, new = database.ring(), database.issue()
    await ring.authenticate(new.text)
    secret = generate_key().text[16:-CHECKSUM_LENGTH]
    # Well-formed, with the right public id: only the digest tells that it is not the key.
    with pytest.raises(WrongKey):
        await ring.authenticate(f"sk-{new.public_id}-{secret}{_checksum(new.public_id + secret)}")
    assert (await ring.authenticate(new.text)).public_id == new.public_id


async def test_revoked_expired_and_orphaned_keys_are_refused(database: Database) -> None:
    ring = database.ring()
    for new in (
        database.issue(revoked=True),
        database.issue(expires_at=time.time() - 1),
        database.issue(pepper=9),
    ):
        with pytest.raises(WrongKey):
            await ring.authenticate(new.text)
    with pytest.raises(MissingKey):
        await ring.authenticate(None)


async def test_an_unknown_key_is_not_looked_up_again_at_once(database: Database) -> None:
    ring, new = database.ring(), generate_key()
    for _ in range(5):
        with pytest.raises(WrongKey):
            await ring.authenticate(new.text)
    assert database.asked == 1
    ring.forget(new.public_id)
    with pytest.raises(WrongKey):
        await ring.authenticate(new.text)
    assert database.asked == 2


async def test_a_malformed_key_costs_no_query(database: Database) -> None:
    ring = database.ring()
    for text in ("", "sk-", "x" * 5000, generate_key().text[:-1] + "!"):
        with pytest.raises(WrongKey):
            await ring.authenticate(text)
    assert database.asked == 0


async def test_a_change_heard_while_a_key_is_being_read_is_not_lost(database: Database) -> None:
    ring, new = database.ring(), database.issue()
    database.gate.clear()
    first = asyncio.create_task(ring.authenticate(new.text))
    await asyncio.to_thread(database.reading.wait, 5)
    # It is read as valid; then it is revoked and the feed says so, before the answer is here.
    del database.keys[new.public_id]
    ring.forget(new.public_id)
    database.gate.set()
    await first
    with pytest.raises(WrongKey):
        await ring.authenticate(new.text)


async def test_while_the_database_is_away_known_keys_count_for_a_minute(database: Database) -> None:
    ring, known, unknown = database.ring(), database.issue(), database.issue()
    await ring.authenticate(known.text)
    database.away, database.away_seconds = True, 59.0
    assert (await ring.authenticate(known.text)).public_id == known.public_id
    with pytest.raises(StorageAway):
        await ring.authenticate(unknown.text)
    database.away_seconds = 61.0
    with pytest.raises(StorageAway):
        await ring.authenticate(known.text)
    database.away, database.away_seconds = False, 0.0
    await ring.authenticate(known.text)
    await ring.authenticate(unknown.text)


async def test_the_ring_holds_a_bounded_number_of_keys(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auth, "KEYS_KEPT", 3)
    ring = database.ring()
    keys = [database.issue() for _ in range(5)]
    for new in keys:
        await ring.authenticate(new.text)
    await ring.authenticate(keys[-1].text)
    assert database.asked == 5
    await ring.authenticate(keys[0].text)
    assert database.asked == 6


async def test_a_new_secret_works_at_once_and_wrong_ones_cost_few_queries(database: Database) -> None:
    ring, new = database.ring(), database.issue()
    await ring.authenticate(new.text)
    wrong = generate_key(new.public_id)
    for _ in range(5):
        with pytest.raises(WrongKey):
            await ring.authenticate(wrong.text)
    assert database.asked == 2
    rotated = generate_key(new.public_id)
    old = database.keys[new.public_id]
    secret = Secret(id=2, digest=digest_key(rotated.text, PEPPERS[2]), pepper=2)
    database.keys[new.public_id] = replace(old, secrets=(secret, *old.secrets))
    ring._reread.clear()
    for text in (rotated.text, new.text, rotated.text):
        assert (await ring.authenticate(text)).public_id == new.public_id
    assert database.asked == 3


async def test_a_secret_ends_by_itself_and_old_peppers_go_on(database: Database) -> None:
    ring, new = database.ring(), database.issue(pepper=1)
    rotated = generate_key(new.public_id)
    old = database.keys[new.public_id]
    [first] = old.secrets
    second = Secret(id=2, digest=digest_key(rotated.text, PEPPERS[2]), pepper=2)
    database.keys[new.public_id] = replace(old, secrets=(second, replace(first, expires_at=time.time() + 1)))
    for _ in range(2):
        await ring.authenticate(new.text)
        await ring.authenticate(rotated.text)
    await asyncio.sleep(1.05)
    with pytest.raises(WrongKey):
        await ring.authenticate(new.text)
    await ring.authenticate(rotated.text)


async def test_each_secrets_use_is_noted(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    noted: list[int] = []
    monkeypatch.setattr(auth, "note_key_use", lambda *, secret_id, at: noted.append(secret_id))
    ring, new = database.ring(), database.issue()
    rotated = generate_key(new.public_id)
    old = database.keys[new.public_id]
    second = Secret(id=2, digest=digest_key(rotated.text, PEPPERS[1]), pepper=1)
    database.keys[new.public_id] = replace(old, secrets=(second, *old.secrets))
    for _ in range(3):
        await ring.authenticate(rotated.text)
        await ring.authenticate(new.text)
    await ring.stop()
    assert sorted(noted) == [1, 2]
