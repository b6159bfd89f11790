"""The compiler's tables as arrays of the kernel's records.

The encoder keeps what it made: a table that is still the same object costs nothing, and
addresses that are still the same keep their order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.bpf.btf import Schema
from lockgate.compile.tables import NO_CLASS, PEER_LOCAL, PeerView, ServiceView, Tables
from lockgate.objects.address import is_ipv4, parse_address

__all__ = ["EP_LIVE", "Bytes", "Encoder", "EndpointRecord", "Wanted", "rows", "sortable"]

Bytes = NDArray[np.uint8]
#: Keys in order, and their values.
Table = tuple[Bytes, Bytes]
EP_LIVE = 1
_U32 = np.dtype("<u4")


@dataclass(frozen=True)
class EndpointRecord:
    """What both views share of a local pod."""

    id: int
    mac: bytes
    host_mac: bytes
    mtu: int
    ips: tuple[str, ...]

    @cached_property
    def by_family(self) -> tuple[bytes, bytes]:
        """The IPv4 and the IPv6 address as the kernel has them; zeroes for none."""
        found = [bytes(16), bytes(16)]
        for ip in self.ips:
            address = parse_address(ip)
            found[not is_ipv4(address)] = address
        return found[0], found[1]


@dataclass(slots=True)
class Wanted:
    """Tables as arrays; `slots` are endpoints without their views."""

    peers: Table
    services: Table
    backends: Table
    image: NDArray[np.uint64]
    slots: NDArray[Any]
    views: NDArray[Any]


class Encoder:
    """Encodes one state after the other."""

    def __init__(self, schema: Schema, slots: int) -> None:
        self._peer_view = schema.dtype("peer_view")
        self._service_key = schema.dtype("service_key")
        self._service_view = schema.dtype("service_view")
        self._backend_key = schema.dtype("backend_key")
        self._endpoint = schema.dtype("endpoint")
        self._endpoint_view = schema.dtype("endpoint_view")
        # What was encoded last, and what came of it.
        self._tables = Tables(np.zeros(0, np.uint64))
        self._addresses = b""
        self._keys = rows(np.zeros(0, np.uint8), 16)
        self._order = np.zeros(0, np.intp)
        self._peers = self._encode_peers(self._tables.peers)
        self._services = self._encode_services(self._tables.services)
        self._backends = self._encode_backends(self._tables.backends)
        self._records: Mapping[int, EndpointRecord] = {}
        self._slots = np.zeros(slots, self._endpoint)
        # What peers say of the local pods, and of which peers and slots that was.
        self._own: dict[int, tuple[int, int, int]] = {}
        self._own_of: tuple[object, object] = (None, None)

    def encode(self, tables: Tables, endpoints: Mapping[int, EndpointRecord]) -> Wanted:
        """`endpoints` are the local pods by slot; the same dict, and `slots` come as the same
        array, if they did not change."""
        before, self._tables = self._tables, tables
        if tables.peers is not before.peers:
            self._peers = self._encode_peers(tables.peers)
        if tables.services is not before.services:
            self._services = self._encode_services(tables.services)
        if tables.backends is not before.backends:
            self._backends = self._encode_backends(tables.backends)
        if endpoints is not self._records:
            self._encode_slots(endpoints)
        views = self._encode_views(tables, endpoints)
        return Wanted(self._peers, self._services, self._backends, tables.image, self._slots, views)

    def _encode_peers(self, peers: Mapping[bytes, PeerView]) -> Table:
        addresses = b"".join(peers)
        if addresses != self._addresses:
            keys = np.frombuffer(addresses, np.uint8).reshape(-1, 16)
            self._addresses, self._order = addresses, np.argsort(sortable(keys))
            self._keys = keys[self._order]
        values = rows(structured(peers.values(), self._peer_view), self._peer_view.itemsize)
        return self._keys, values[self._order]

    def _encode_services(self, services: Mapping[tuple[bytes, int, int], ServiceView]) -> Table:
        keys = np.zeros(len(services), self._service_key)
        keys["addr"] = np.frombuffer(b"".join(key[0] for key in services), np.uint8).reshape(-1, 16)
        keys["port"] = [key[1] for key in services]
        keys["proto"] = [key[2] for key in services]
        values = structured(
            ((s.id, s.backends, s.count, s.flags) for s in services.values()), self._service_view
        )
        return sort(
            rows(keys, self._service_key.itemsize), rows(values, self._service_view.itemsize)
        )

    def _encode_backends(self, backends: Iterable[tuple[bytes, int, int, int]]) -> Table:
        pairs = list(backends)
        keys = np.zeros(len(pairs), self._backend_key)
        keys["addr"] = np.frombuffer(b"".join(p[0] for p in pairs), np.uint8).reshape(-1, 16)
        keys["service"] = [p[1] for p in pairs]
        keys["port"] = [p[2] for p in pairs]
        keys["proto"] = [p[3] for p in pairs]
        live = np.ones((len(pairs), 1), np.uint8)
        return sort(rows(keys, self._backend_key.itemsize), live)

    def _encode_slots(self, endpoints: Mapping[int, EndpointRecord]) -> None:
        changed = [
            slot for slot, record in endpoints.items() if self._records.get(slot) is not record
        ]
        gone = [slot for slot in self._records if slot not in endpoints]
        if not changed and not gone:
            self._records = endpoints
            return
        # Another array: what was handed out stays as it is.
        self._slots = self._slots.copy()
        for slot in changed + gone:
            self._slots[slot] = np.zeros((), self._endpoint)
        for slot in changed:
            self._encode_slot(self._slots[slot], endpoints[slot])
        self._records = endpoints

    def _encode_slot(self, row: Any, record: EndpointRecord) -> None:
        row["id"], row["flags"], row["mtu"] = record.id, EP_LIVE, record.mtu
        row["mac"] = np.frombuffer(record.mac, np.uint8)
        row["host_mac"] = np.frombuffer(record.host_mac, np.uint8)
        for field, address in zip(("addr4", "addr6"), record.by_family, strict=True):
            row[field] = np.frombuffer(address, np.uint8)

    def _encode_views(
        self, tables: Tables, endpoints: Mapping[int, EndpointRecord]
    ) -> NDArray[Any]:
        if tables.peers is not self._own_of[0] or self._slots is not self._own_of[1]:
            self._own = {s: _own_peers(tables.peers, s, r) for s, r in endpoints.items()}
            self._own_of = tables.peers, self._slots
        own = self._own
        views = np.zeros(len(self._slots), self._endpoint_view)
        places = [slot for slot in tables.endpoints if slot in own]
        views[places] = structured(
            (tables.endpoints[slot] + own[slot] for slot in places), self._endpoint_view
        )
        return views


def _own_peers(
    peers: Mapping[bytes, PeerView], slot: int, record: EndpointRecord
) -> tuple[int, int, int]:
    """The pod's id and, by family, its class if peers know its address as its own."""
    classes = []
    for address in record.by_family:
        peer = peers.get(address)
        if peer is None or peer.kind != PEER_LOCAL or peer[1::2] != (record.id, slot):
            classes.append(NO_CLASS)
        else:
            classes.append(peer.cls)
    return record.id, classes[0], classes[1]


# ---- Rows of bytes ---------------------------------------------------------------


def rows(array: NDArray[Any], size: int) -> Bytes:
    """Structured elements as rows of `size` bytes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, size)


def structured(records: Iterable[tuple[int, ...]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Tuples in the order of the struct's fields, as an array."""
    names = dtype.names or ()
    if dtype.itemsize == 4 * len(names) and all(dtype[name] == _U32 for name in names):
        return np.fromiter(chain.from_iterable(records), _U32).view(dtype)
    return np.array([tuple(record) for record in records], dtype)


def sort(keys: Bytes, values: Bytes) -> Table:
    """Both, in the order of the keys."""
    order = np.argsort(sortable(keys))
    return keys[order], values[order]


def sortable(keys: Bytes) -> NDArray[Any]:
    """Rows of bytes as what numpy can order."""
    # There is no order for void; strings of bytes lose trailing zeroes but not their order,
    # and keys are all of one length, so none are confounded.
    keys = np.ascontiguousarray(keys)
    return keys.view(f"S{keys.shape[1]}").reshape(-1)
