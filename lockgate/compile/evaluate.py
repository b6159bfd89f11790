"""A reader of the image, step by step as the kernel reads it. For tests and for explaining."""

from __future__ import annotations

from typing import NamedTuple

from lockgate.compile.balance import numbers_of, table_words
from lockgate.compile.tables import (
    BACKEND_WORDS,
    CELL_ALLOW,
    CELL_REASON,
    CIDR_LEVELS,
    CIDR_NEXT,
    CIDR_SKIP,
    CIDR_STRIDE,
    CIDR_STRIDE_SHIFT,
    CIDR_WORD,
    IMAGE_CIDRS,
    IMAGE_PORTS,
    ISOLATED_EGRESS,
    ISOLATED_INGRESS,
    OWNER_ENDS,
    PORT_TABLE_BY_NUMBER,
    Direction,
    EndpointView,
    ServiceView,
    Tables,
    Words,
)

__all__ = [
    "Cell",
    "OwnerRead",
    "backends_of",
    "cidr_class",
    "class_of",
    "in_ranges",
    "lookup",
    "owners_of",
    "port_class",
    "slots_of",
]


class Cell(NamedTuple):
    """A verdict; reason 0 with `allow` means that no policy isolates the pod."""

    allow: bool
    reason: int


class OwnerRead(NamedTuple):
    """`struct owner`."""

    address: bytes
    port: int
    ends: bool
    target: int


def class_of(tables: Tables, address: bytes) -> int:
    """The class of an address: by the peers, else by the CIDR trie."""
    peer = tables.peers.get(address)
    if peer is not None:
        return peer.cls
    return cidr_class(tables.image[IMAGE_CIDRS:], address)


def cidr_class(trie: Words, address: bytes, roots: int = 0) -> int:
    """The class that a CIDR trie has for an address. `trie` is the image from IMAGE_CIDRS on,
    `roots` the word in there where it begins."""
    v4 = address[:12] == b"\0" * 10 + b"\xff\xff"
    left = 32 if v4 else 128  # bits of the address not yet used
    number = int.from_bytes(address[12:] if v4 else address, "big")
    slot = int(trie[roots]) >> (0 if v4 else 32) & 0xFFFF_FFFF
    for _ in range(CIDR_LEVELS):
        if not slot & CIDR_NEXT:
            return slot
        at, stride = slot & CIDR_WORD, (slot & CIDR_STRIDE) >> CIDR_STRIDE_SHIFT
        if stride:
            left -= stride
            index = number >> left & (1 << stride) - 1
            slot = int(trie[at + index // 2]) >> 32 * (index % 2) & 0xFFFF_FFFF
        else:
            match = int(trie[at])
            stride = match & CIDR_SKIP
            left -= stride
            same = number >> left & (1 << stride) - 1 == match >> 64 - stride
            slot = int(trie[at + 1]) >> (0 if same else 32) & 0xFFFF_FFFF
    raise AssertionError("the trie is deeper than an address")


def port_class(tables: Tables, protocol: int, port: int) -> int:
    """The port class; 0 for a protocol without ports."""
    table = PORT_TABLE_BY_NUMBER.get(protocol)
    if table is None:
        return 0
    index = table * 65536 + port
    return int(tables.image[IMAGE_PORTS + index // 4]) >> 16 * (index % 4) & 0xFFFF


def lookup(
    tables: Tables,
    view: EndpointView,
    direction: Direction,
    address: bytes,
    port: int,
    protocol: int,
    *,
    pending: bool = False,
) -> Cell:
    """The cell for a connection between the endpoint and the peer at `address`.

    `port` is the destination's; ignored for protocols without ports.
    """
    bit = ISOLATED_INGRESS if direction == "ingress" else ISOLATED_EGRESS
    if not view.isolated & bit:
        return Cell(True, 0)
    shift = 0 if direction == "ingress" else 32
    row = int(tables.image[view.rows + class_of(tables, address)])
    column = int(tables.image[view.cols + port_class(tables, protocol, port)])
    at = (row >> shift & 0xFFFF_FFFF) + (column >> shift & 0xFFFF_FFFF)
    cell = int(tables.image[at]) >> (32 if pending else 0) & 0xFFFF_FFFF
    return Cell(bool(cell & CELL_ALLOW), cell & CELL_REASON)


def backends_of(tables: Tables, service: ServiceView) -> list[tuple[bytes, int, int]]:
    """(address, port, endpoint id) of each backend of a service."""
    found = []
    for number in range(service.count):
        at = service.backends + number * BACKEND_WORDS
        raw = tables.image[at : at + BACKEND_WORDS].tobytes()
        port = int.from_bytes(raw[16:18], "big")
        found.append((raw[:16], port, int.from_bytes(raw[20:24], "little")))
    return found


def owners_of(tables: Tables, service: ServiceView) -> list[OwnerRead]:
    """Those that clients outside may be sent to."""
    found = []
    for number in range(service.owner_count):
        at = service.owners + number * BACKEND_WORDS
        raw = tables.image[at : at + BACKEND_WORDS].tobytes()
        port, flags = int.from_bytes(raw[16:18], "big"), int.from_bytes(raw[18:20], "little")
        target = int.from_bytes(raw[20:24], "little")
        found.append(OwnerRead(raw[:16], port, bool(flags & OWNER_ENDS), target))
    return found


def slots_of(tables: Tables, service: ServiceView) -> list[tuple[int, ...]]:
    """The numbers of the owners of each slot, the first first; none without a table."""
    if not service.owner_count:
        return []
    shape = service.slot_bits, service.number_bits
    words = tables.image[service.table : service.table + table_words(*shape)]
    rows = numbers_of(words, *shape).T.tolist()
    return [tuple(n for n in row if n < service.owner_count) for row in rows]


def in_ranges(tables: Tables, service: ServiceView, address: bytes) -> bool:
    """Is a source in the ranges of a service that has some?"""
    trie = tables.image[IMAGE_CIDRS:]
    return cidr_class(trie, address, service.ranges - IMAGE_CIDRS) == 1
