"""What the kernel says of the node's network cards.

Reading takes a millisecond, in the calling thread's namespace, and changes nothing: so it is
done beside changes, which wait only if something is not as it was.
"""

from __future__ import annotations

import errno
import socket
from dataclasses import dataclass, field

from lockgate.net import dumps

__all__ = ["Card", "Cards", "read_cards"]


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


@dataclass(frozen=True, slots=True)
class Cards:
    """Those that lead to the other nodes and to the rest of the world; may be the same one."""

    underlay: Card | None
    outside: Card | None


def read_cards(underlay: str, outside: str) -> Cards:
    """None for a card without a name, and for one that is not there."""
    return Cards(_read(underlay), _read(outside))


def _read(name: str) -> Card | None:
    if not name:
        return None
    try:
        index = socket.if_nametoindex(name)
    except OSError:
        return None
    try:
        mac, mtu = dumps.link(index)
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
    )
