"""A reader of the image, step by step as the kernel reads it. For tests and for explaining."""

from __future__ import annotations

from typing import NamedTuple

from lockgate.compile.tables import (
    BACKEND_WORDS,
    CELL_ALLOW,
    CELL_REASON,
    CIDR_BLOCK_WORDS,
    CIDR_NEXT,
    IMAGE_CIDRS,
    IMAGE_PORTS,
    ISOLATED_EGRESS,
    ISOLATED_INGRESS,
    PORT_TABLE_BY_NUMBER,
    Direction,
    EndpointView,
    ServiceView,
    Tables,
)

__all__ = ["Cell", "backends_of", "class_of", "lookup", "port_class"]


class Cell(NamedTuple):
    """A verdict; reason 0 with `allow` means that no policy isolates the pod."""

    allow: bool
    reason: int


def class_of(tables: Tables, address: bytes) -> int:
    """The class of an address: by the peers, else by the CIDR trie."""
    peer = tables.peers.get(address)
    if peer is not None:
        return peer.cls
    v4 = address[:12] == b"\0" * 10 + b"\xff\xff"
    block = 0 if v4 else 1
    for byte in address[12:] if v4 else address:
        word = int(tables.image[IMAGE_CIDRS + block * CIDR_BLOCK_WORDS + byte // 2])
        slot = word >> 32 * (byte % 2) & 0xFFFF_FFFF
        if not slot & CIDR_NEXT:
            return slot
        block = slot & ~CIDR_NEXT
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
