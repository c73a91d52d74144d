"""Which addresses an upstream may have, decided at the moment of connecting: whatever a name resolves to
then, and however an address is spelled."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Callable, Iterable
from typing import Any

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_NEVER = tuple(
    ipaddress.ip_network(network)
    for network in (
        "0.0.0.0/8",  # this host, by another name
        "169.254.0.0/16",  # link-local: the clouds' metadata
        "224.0.0.0/4",
        "240.0.0.0/4",
        "100.100.100.200/32",  # Alibaba's metadata
        "168.63.129.16/32",  # Azure's platform
        "192.0.0.192/32",  # Oracle's metadata
        "::/128",
        "fe80::/10",
        "ff00::/8",
        "fd00:ec2::/32",  # Amazon's metadata
    )
)
_CARRIERS = (
    # Networks of IPv6 that hold an IPv4 address, and where in the 128 bits it ends.
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),
    (ipaddress.IPv6Network("2002::/16"), 80),
    (ipaddress.IPv6Network("::/96"), 0),
)


class Forbidden(OSError):
    """The address is none that this worker may connect to."""


class Addresses:
    """What may be connected to: everything but link-local and its like, or only what `allowed` lists."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        """`allowed`: networks, and names of hosts; none: no further limit."""
        self._networks: list[ipaddress.IPv4Network | ipaddress.IPv6Network] = []
        self._hosts: set[str] = set()
        self._limited = False
        for one in allowed:
            self._limited = True
            try:
                self._networks.append(ipaddress.ip_network(one))
            except ValueError:
                self._hosts.add(one.lower())

    def refusal(self, address: str, host: str) -> str | None:
        """Why this address, to which the host's name led, may not be connected to; None when it may."""
        try:
            parsed = _plain(ipaddress.ip_address(address.partition("%")[0]))
        except ValueError:
            return "is no IP address"
        if any(parsed in network for network in _NEVER):
            return "is link-local, or otherwise never a model server's"
        if not self._limited or host.lower() in self._hosts:
            return None
        if any(parsed in network for network in self._networks):
            return None
        return "is not in ROUNDHOUSE_UPSTREAM_HOSTS"

    def socket_factory(self, host: str) -> Callable[[tuple[Any, ...]], socket.socket]:
        """Makes aiohttp's sockets for connections to this host. Raises Forbidden, before anything is sent."""

        def make(info: tuple[Any, ...]) -> socket.socket:
            family, kind, protocol, _, address = info
            if (reason := self.refusal(str(address[0]), host)) is not None:
                raise Forbidden(f"the address {address[0]} {reason}")
            made = socket.socket(family, kind, protocol)
            made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            return made

        return make


def _plain(address: Address) -> Address:
    """The IPv4 address that an IPv6 one carries, or itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    for network, shift in _CARRIERS:
        if address in network and int(address) > 1:  # not :: nor ::1
            return ipaddress.IPv4Address((int(address) >> shift) & 0xFFFFFFFF)
    return address
