"""What the kernel says of the node's network cards.

Reading takes a millisecond, in the calling thread's namespace, and changes nothing: so it is
done beside changes, which wait only if something is not as it was.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Collection
from dataclasses import dataclass, field

from lockgate.net import dumps, xdp
from lockgate.net.links import IFINDEX_BASE

__all__ = ["AUTO", "TUNNEL", "Card", "Cards", "names", "read_cards"]

#: In the place of a card's name: find it.
AUTO = "auto"
_LO = 1
#: The VXLAN device.
TUNNEL = "lg-vxlan"


@dataclass(frozen=True, slots=True)
class Card:
    """One card. Addresses with prefix length; MACs of its neighbours, and default gateways, by
    address."""

    name: str
    index: int
    mac: bytes
    mtu: int
    addresses: tuple[str, ...] = ()
    macs: dict[str, bytes] = field(default_factory=dict)
    gateways: tuple[str, ...] = ()
    xdp: xdp.State = field(default_factory=xdp.State)


@dataclass(frozen=True, slots=True)
class Cards:
    """Those that lead to the other nodes and to the rest of the world; may be the same one."""

    underlay: Card | None
    outside: Card | None
    #: Interface index of the VXLAN device; 0 = there is none.
    tunnel: int = 0
    #: With the InternalIP of the other family than the underlay's, where that is another card.
    underlay2: Card | None = None
    #: With the default route of IPv6, where IPv4's is another card's.
    outside6: Card | None = None
    #: Others that clients outside come by: the default route is balanced over them too, or they
    #: are named. What pods send leaves by the first.
    others: tuple[Card, ...] = ()

    @property
    def all(self) -> list[Card]:
        """Each once."""
        found = (self.underlay, self.outside, self.underlay2, self.outside6, *self.others)
        return list({card.index: card for card in found if card is not None}.values())


def read_cards(underlay: str, outside: str, addresses: Collection[str] = ()) -> Cards:
    """None for a card without a name, and for one that is not there. "auto": the one with one of
    the node's `addresses`, and those with the best default route, if they are others; and those
    that have the other family's. `outside` may be several names with commas between."""
    underlay2 = outside6 = ""
    others: list[str] = []
    if underlay == AUTO:
        six = bool(addresses) and ":" in next(iter(addresses))
        underlay = _with_address([ip for ip in addresses if (":" in ip) == six])
        underlay2 = _with_address([ip for ip in addresses if (":" in ip) != six])
        underlay = underlay or underlay2
        underlay2 = "" if underlay2 == underlay else underlay2
    if outside == AUTO:
        ways6, ways = _with_default_route(":"), _with_default_route(".")
        outside6 = next(iter(ways6), "")
        outside = next(iter(ways), outside6)
        others = [*ways[1:], *ways6[1:]]
        outside6 = "" if outside6 == outside else outside6
        outside = "" if outside == underlay else outside
    else:
        outside, *others = names(outside) or [""]
    tunnel = 0
    with contextlib.suppress(OSError):
        tunnel = socket.if_nametoindex(TUNNEL)
    more = [card for card in map(_read, dict.fromkeys(others)) if card is not None]
    return Cards(
        _read(underlay), _read(outside), tunnel, _read(underlay2), _read(outside6), tuple(more)
    )


def names(setting: str) -> list[str]:
    """Cards that the setting `outside` names."""
    return [name.strip() for name in setting.split(",") if name.strip()]


def _with_address(addresses: Collection[str]) -> str:
    """The card with the first of the addresses that a card has."""
    found = {
        address.partition("/")[0]: card.name
        for card in _cards()
        for address in dumps.addresses(card.index)
    }
    return next((found[address] for address in addresses if address in found), "")


def _with_default_route(family: str) -> list[str]:
    """The cards with the best one; `family` is "." or ":", as in its gateways' addresses. Of routes
    without a gateway it is not known, they count for IPv4."""
    cards = {card.index: card.name for card in _cards()}
    routes = [
        route
        for route in dumps.default_routes()
        if route.ifindex in cards and (":" in route.gateway) == (family == ":")
    ]
    best = min((route.metric for route in routes), default=0)
    return list(dict.fromkeys(cards[one.ifindex] for one in routes if one.metric == best))


def _cards() -> list[dumps.Interface]:
    """Links that may lead out of the node: up, and not ours."""
    return [
        link
        for link in dumps.interfaces()
        if link.up and link.index != _LO and link.index < IFINDEX_BASE
    ]


def _read(name: str) -> Card | None:
    if not name:
        return None
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return None
    try:
        mac, mtu = dumps.link(index)
        of_xdp = xdp.state(index)
    except OSError as error:
        if error.errno == errno.ENODEV:
            return None  # it went just now
        raise
    return Card(
        name,
        index,
        mac,
        mtu,
        tuple(dumps.addresses(index)),
        dumps.macs(index),
        tuple(dumps.default_gateways(index)),
        of_xdp,
    )
