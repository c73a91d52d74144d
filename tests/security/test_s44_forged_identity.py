"""S44: nobody is somebody else by saying so. What clients write about themselves in headers moves them into
no other bucket and makes them nobody else, for gateways and for workers; only proxies that are configured
are believed, and no further than their own word goes."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.test import Client

from config.front import make_application
from registry.models import UsageEvent
from registry.rights import client_address, parse_networks
from tests.api.conftest import ROUTE, Served, Worker, facts, say, served, serving, worker  # noqa: F401 - fixtures
from tests.factories import make_api_key
from webchat import login

pytestmark = pytest.mark.django_db(transaction=True)

FORGED = ("X-Forwarded-For", "X-Real-IP", "Forwarded", "X-Client-IP", "CF-Connecting-IP", "True-Client-IP")
PASSWORD = "right-horse-4"
LOGINS = ("/login/", "/admin/login/")


@pytest.fixture(autouse=True)
def ann(transactional_db: None) -> Any:
    return get_user_model().objects.create_superuser("ann", password=PASSWORD)


def addresses(count: int) -> Iterator[str]:
    for at in range(count):
        yield f"10.{at % 7}.{at // 250}.{at % 250}"


def attempt(path: str, password: str, name: str = "ann", **headers: str) -> Any:
    client = Client(headers={"host": "localhost"})
    return client.post(path, {"username": name, "password": password}, headers=headers)


# -- logging in


@pytest.mark.parametrize(("path", "tries"), [("/login/", 1000), ("/admin/login/", 200)])
def test_a_thousand_forged_addresses_have_five_attempts(path: str, tries: int) -> None:
    statuses = []
    for at, address in enumerate(addresses(tries)):
        header = FORGED[at % len(FORGED)]
        forged = f"for={address}" if header == "Forwarded" else address
        statuses.append(attempt(path, "wrong", **{header: forged}).status_code)
    assert statuses == [200] * 5 + [429] * (tries - 5)
    refused = attempt(path, PASSWORD, **{"X-Forwarded-For": "192.0.2.1"})
    assert refused.status_code == 429, "not even the right one"
    assert 0 < int(refused["Retry-After"]) <= 15 * 60
    # The two doors have one lock.
    assert {attempt(one, PASSWORD).status_code for one in LOGINS} == {429}


@pytest.mark.parametrize("path", LOGINS)
def test_one_address_has_fifty_attempts_whatever_the_names(path: str) -> None:
    statuses = [attempt(path, "wrong", name=f"name-{at}").status_code for at in range(60)]
    assert statuses == [200] * 50 + [429] * 10
    assert attempt(path, PASSWORD).status_code == 429


def test_the_right_password_is_no_attempt() -> None:
    for _ in range(60):
        assert attempt("/login/", PASSWORD).status_code == 302
    for _ in range(3):
        for _ in range(4):
            assert attempt("/login/", "wrong").status_code == 200
        assert attempt("/login/", PASSWORD).status_code == 302, "those before are forgotten"


def test_many_at_once_are_no_more_than_many_in_turn() -> None:
    place, allowed = login.Place("ann", "10.0.0.1"), []
    together = threading.Barrier(20)

    def begin() -> None:
        together.wait()
        allowed.append(login.attempts.begin(place) == 0)

    threads = [threading.Thread(target=begin) for _ in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(allowed) == [False] * 15 + [True] * 5


def test_behind_a_trusted_proxy_each_client_has_its_own_attempts(settings: Any) -> None:
    settings.ROUNDHOUSE_TRUSTED_PROXIES = parse_networks(["127.0.0.1", "10.9.0.0/16"])
    for _ in range(5):
        assert attempt("/login/", "wrong", **{"X-Forwarded-For": "192.0.2.1"}).status_code == 200
    # What the client wrote itself stands before what the proxy wrote.
    for forged in addresses(50):
        said = {"X-Forwarded-For": f"{forged}, 192.0.2.1"}
        assert attempt("/login/", PASSWORD, **said).status_code == 429
        assert (
            attempt(
                "/login/", PASSWORD, **{"X-Forwarded-For": f"{said['X-Forwarded-For']}, 10.9.0.1"}
            ).status_code
            == 429
        )
    assert attempt("/login/", PASSWORD, **{"X-Forwarded-For": "192.0.2.2"}).status_code == 302
    # A header of another name is not what a proxy was configured for.
    assert (
        attempt("/login/", PASSWORD, **{"X-Forwarded-For": "192.0.2.1", "X-Real-IP": "192.0.2.9"}).status_code
        == 429
    )


def test_of_ipv6_a_network_is_one_address(settings: Any) -> None:
    settings.ROUNDHOUSE_TRUSTED_PROXIES = parse_networks(["127.0.0.1"])
    for at in range(5):
        said = {"X-Forwarded-For": f"2001:db8:0:1::{at + 1}"}
        assert attempt("/login/", "wrong", **said).status_code == 200
    assert attempt("/login/", PASSWORD, **{"X-Forwarded-For": "2001:db8:0:1:ffff::9"}).status_code == 429
    assert attempt("/login/", PASSWORD, **{"X-Forwarded-For": "2001:db8:0:2::1"}).status_code == 302


# -- addresses of keys


def test_a_thousand_forged_addresses_open_no_key(served: Served) -> None:  # noqa: F811
    bound = make_api_key(cidrs=["10.0.0.0/8"])[1]
    for at, address in enumerate(addresses(1000)):
        header = FORGED[at % len(FORGED)]
        answer = served.request("GET", "/v1/models", None, f"{header}: {address}", key=bound)
        assert (answer.status, answer.error()["code"]) == (403, "ip_not_allowed"), header
        if at % 100 == 0:
            answer = served.chat(say("hi"), f"{header}: {address}", key=bound)
            assert (answer.status, answer.error()["code"]) == (403, "ip_not_allowed"), header


def test_only_the_last_word_of_a_trusted_proxy_counts() -> None:
    proxies = parse_networks(["10.9.0.0/16"])
    inside, outside = ip_address("10.1.1.1"), ip_address("192.0.2.1")
    for address in addresses(1000):
        chain = f"{address}, 192.0.2.1"
        assert client_address("10.9.0.1", chain, proxies) == outside
        assert client_address("10.9.0.1", f"{chain}, 10.9.3.3", proxies) == outside
        # From elsewhere nothing of it is believed, and without proxies nothing of anybody.
        assert client_address("10.1.1.1", chain, proxies) == inside
        assert client_address("10.9.0.1", chain, ()) == ip_address("10.9.0.1")


def test_the_gateway_believes_a_configured_proxy_alone(facts: str, settings: Any) -> None:  # noqa: F811
    bound = make_api_key(cidrs=["10.1.0.0/16"])[1]
    for proxies, status in ((["127.0.0.1"], 200), (["127.0.0.2", "10.9.0.0/16"], 403), ([], 403)):
        settings.ROUNDHOUSE_TRUSTED_PROXIES = parse_networks(proxies)
        with serving(make_application()) as port:
            gateway = Served(port, facts)
            said = "X-Forwarded-For: 10.1.1.1"
            for answer in (
                gateway.request("GET", "/v1/models", None, said, key=bound),
                gateway.chat(say("hi", max_tokens=1), said, key=bound),
            ):
                assert answer.status == status, (proxies, answer.body)


# -- names

NAMES = [
    *("X-User-Id", "X-User", "X-Remote-User", "Remote-User", "X-Forwarded-User", "X-Forwarded-Email"),
    *("X-Auth-User", "X-Webauth-User", "X-Authenticated-User", "X-Roundhouse-User", "X-Roundhouse-Key"),
    *("X-Roundhouse-Secret", "X-Roundhouse-Internal", "X-Internal", "X-Admin", "X-Project-Id", "X-Key-Id"),
    *("OpenAI-Project", "OpenAI-Organization", "X-Forwarded-Authorization", "X-Original-Authorization"),
    *("Proxy-Authorization", "X-Worker-Id", "X-Node-Id", "X-Epoch", "X-Client-Cert", "X-SSL-Client-S-DN"),
    *("X-Roundhouse-Worker", "From"),
]  # fmt: skip


def test_no_header_makes_somebody_of_nobody(served: Served, ann: Any) -> None:  # noqa: F811
    values = ["ann", str(ann.pk), "admin", "1", "true", f"Bearer {served.api_key}", served.api_key]
    for name in NAMES:
        for value in values:
            for method, path, body in (
                ("POST", "/v1/chat/completions", json.dumps(say("hi")).encode()),
                ("GET", "/v1/models", None),
                ("GET", "/api/v1/keys", None),
                ("GET", "/chat/api/conversations", None),
                ("POST", "/fleet/node", b"{}"),
                ("POST", "/fleet/worker", b"{}"),
            ):
                answer = served.request(method, path, body, f"{name}: {value}", key=None)
                assert answer.status in (401, 404), (name, value, path, answer.body)
        answer = served.request("GET", "/admin/", None, f"{name}: ann", key=None)
        assert (answer.status, answer.headers["location"]) == (302, "/admin/login/?next=/admin/"), name
    assert not UsageEvent.objects.exists()


def test_a_request_is_its_keys_whatever_it_calls_itself(served: Served) -> None:  # noqa: F811
    make_api_key(name="other")
    ids = set()
    for at, name in enumerate([*NAMES, "X-Request-Id", "Request-Id", "X-Correlation-Id", "Idempotency-Id"]):
        if name == "Proxy-Authorization":
            continue
        answer = served.chat(say("hi", max_tokens=1, user="somebody"), f"{name}: req_{at:032x}")
        assert answer.status == 200, (name, answer.body)
        # The id is ours: two requests of one id would be one in the ledger.
        assert answer.headers["x-request-id"] != f"req_{at:032x}"
        ids.add(answer.headers["x-request-id"])
    for one in ids:
        event = served.event(one)
        assert (event.key_public_id, event.key_name) == (served.api_key[3:15], "tests")
    assert UsageEvent.objects.count() == len(ids) == len(NAMES) + 3


# -- workers


def test_a_worker_hears_nobody_without_its_own_secret(worker: Worker, served: Served) -> None:  # noqa: F811
    port = int(worker.url.rpartition(":")[2])
    direct = Served(port, "")
    before = worker.load()["steps"]
    body = json.dumps({"model": "sim", "messages": [{"role": "user", "content": "hi"}]}).encode()
    others = [
        "x",
        "0" * 64,
        served.api_key,
        worker.secret[:-1] + "0",
        worker.secret[:-1],
        worker.secret.upper(),
    ]
    forged = [
        f"{name}: {value}"
        for name in NAMES
        for value in ("1", "ann", f"Bearer {worker.secret}", worker.secret)
    ]
    forged += [f"{name}: 127.0.0.1" for name in FORGED]
    paths = [
        ("POST", "/v1/chat/completions", body),
        ("POST", "/v1/completions", b"{}"),
        ("GET", "/health", None),
    ]
    paths += [
        ("GET", "/load", None),
        ("GET", "/v1/models", None),
        ("GET", "/nothing", None),
        ("POST", "/tokenize", b"{}"),
    ]
    for method, path, sent in paths:
        for header in forged:
            assert direct.request(method, path, sent, header, key=None).status == 401, (path, header)
        for key in others:
            assert direct.request(method, path, sent, key=key).status == 401, (path, key)
        # Two secrets in one request are nobody's.
        twice = f"Authorization: Bearer {worker.secret}"
        assert direct.request(method, path, sent, twice, key="x").status == 401
        assert direct.request(method, path, sent, "X-User-Id: ann", key=worker.secret).status != 401
    assert worker.load()["steps"] <= before + 400, "only what was asked with the secret ran"
