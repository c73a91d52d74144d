"""Routes with wildcards, addresses, and whose word on an address counts."""

from __future__ import annotations

from fnmatch import fnmatchcase
from ipaddress import ip_address

import pytest
from django.core.exceptions import ValidationError
from hypothesis import given
from hypothesis import strategies as st

from registry.rights import (
    client_address,
    matches_route,
    parse_address,
    parse_networks,
    validate_metadata,
    validate_routes,
    validate_zone,
    within,
)

WORDS = st.text("ab-./:", min_size=1, max_size=6)


@given(st.lists(st.text("ab-./:*", min_size=1, max_size=6), min_size=1, max_size=3), WORDS)
def test_a_star_stands_for_any_characters_and_nothing_else_does(names: list[str], route: str) -> None:
    assert matches_route(names, route) == any(fnmatchcase(route, name) for name in names)


def test_no_names_mean_every_route() -> None:
    assert matches_route([], "x")
    assert matches_route(frozenset(), "x")
    assert not matches_route(["y"], "x")
    assert not matches_route(["x"], "x\n")
    assert matches_route(["x*"], "x\n"), "names are checked elsewhere"


@pytest.mark.parametrize("names", [["a b"], ["*****"], [""], ["a" * 121], ["[a]"], "a", [1], ["é"]])
def test_what_cannot_be_a_route_is_refused(names: object) -> None:
    with pytest.raises(ValidationError):
        validate_routes(names)


ADDRESSES = st.ip_addresses().map(str)


@given(ADDRESSES, st.text(max_size=60), st.lists(ADDRESSES, max_size=3))
def test_nobody_is_believed_unless_named(peer: str, claim: str, others: list[str]) -> None:
    told = parse_address(peer)
    assert client_address(peer, claim, ()) == told
    proxies = tuple(network for network in parse_networks(others) if told not in network)
    assert client_address(peer, claim, proxies) == told


@given(ADDRESSES, st.lists(ADDRESSES | st.text("abc,:.[]1 ", max_size=12), max_size=4))
def test_what_a_client_writes_itself_changes_nothing(client: str, lies: list[str]) -> None:
    """A thousand forged headers are one client, also behind two proxies of ours."""
    proxies = parse_networks(["10.9.0.0/16"])
    told = parse_address(client)
    if within(told, proxies):
        return
    forged = ", ".join([*lies, client])
    assert client_address("10.9.0.1", forged, proxies) == told
    assert client_address("10.9.0.2", f"{forged}, 10.9.0.1", proxies) == told


def test_addresses_are_read_as_peers_and_proxies_write_them() -> None:
    for text in ("192.0.2.1", " 192.0.2.1 ", "192.0.2.1:80", "::ffff:192.0.2.1", "[::ffff:192.0.2.1]:80"):
        assert parse_address(text) == ip_address("192.0.2.1"), text
    assert parse_address("[2001:db8::1]:80") == ip_address("2001:db8::1")
    for text in ("", "unknown", "_hidden", "192.0.2", "192.0.2.1, 192.0.2.2", "[", "1.2.3.4:80:90"):
        assert parse_address(text) is None, text
    assert not within(None, parse_networks(["0.0.0.0/0", "::/0"]))


@pytest.mark.parametrize("value", [[], {"a": 1}, {"": "x"}, {"a\n": "x"}, {"a": "\x00"}, {"a": None}])
def test_metadata_are_a_few_short_texts(value: object) -> None:
    validate_metadata({"team": "search"})
    with pytest.raises(ValidationError):
        validate_metadata(value)


@pytest.mark.parametrize("zone", ["Mars/Base", "", "../etc/passwd", "a" * 500, "\x00"])
def test_a_time_zone_is_one_of_the_list(zone: str) -> None:
    validate_zone("Europe/Vienna")
    with pytest.raises(ValidationError):
        validate_zone(zone)
