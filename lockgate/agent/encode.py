"""The compiler's tables as arrays of the kernel's records: whole, or what changed in them."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import chain
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from lockgate.bpf.btf import Schema
from lockgate.compile.peers import Peers
from lockgate.compile.tables import (
    NO_CLASS,
    PEER_LOCAL,
    BackendKey,
    Delta,
    PeerView,
    ServiceKey,
    ServiceView,
    Tables,
)
from lockgate.objects.address import is_ipv4, parse_address

__all__ = [
    "EP_LIVE",
    "Bytes",
    "Encoder",
    "EndpointRecord",
    "Patch",
    "Table",
    "Wanted",
    "rows",
    "sortable",
]

K = TypeVar("K")
V = TypeVar("V")

Bytes = NDArray[np.uint8]
#: Keys in order, and their values.
Table = tuple[Bytes, Bytes]
EP_LIVE = 1
_U32 = np.dtype("<u4")
_NO_PEER = PeerView(0, 0, 0, 0)
_NO_SERVICE = ServiceView(0, 0, 0, 0)


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


class Wanted(NamedTuple):
    """Whole tables as arrays."""

    peers: Table
    services: Table
    backends: Table


class Patch(NamedTuple):
    """Keys to be written to one view of a table: what they are to be there, and what they are in
    the other view, which is in force. All zero bytes: nothing."""

    keys: Bytes
    wanted: Bytes
    others: Bytes


class Encoder:
    """Encodes one state after the other. Of the local pods, what is still the same is the same
    array."""

    def __init__(self, schema: Schema, slots: int) -> None:
        self._peer_view = schema.dtype("peer_view")
        self._service_key = schema.dtype("service_key")
        self._service_view = schema.dtype("service_view")
        self._backend_key = schema.dtype("backend_key")
        self._endpoint = schema.dtype("endpoint")
        self._endpoint_view = schema.dtype("endpoint_view")
        # What was encoded last of the local pods, and of what.
        self._records: Mapping[int, EndpointRecord] = {}
        self._slots = np.zeros(slots, self._endpoint)
        self._views = np.zeros(slots, self._endpoint_view)
        self._own: dict[int, tuple[int, int, int]] = {}
        self._addresses: set[bytes] = set()
        self._serial = 0
        self._made_of: tuple[object, object] = (None, None)

    def encode(self, tables: Tables) -> Wanted:
        """All but image and endpoints, whole."""
        peers, services, backends = tables.peers, tables.services, tables.backends
        keys = self._peer_keys(peers)
        if isinstance(peers, Peers) and _plain(self._peer_view):
            values = rows(peers.records().astype(_U32, copy=False), self._peer_view.itemsize)
        else:
            values = self._peer_values(peers.values())
        return Wanted(
            sort(keys, values),
            sort(self._service_keys(services), self._service_values(services.values())),
            sort(self._backend_keys(backends), _bits(backends.values(), len(backends))),
        )

    def patches(self, tables: Tables, delta: Delta, behind: Delta) -> tuple[Patch, Patch, Patch]:
        """What the view that is not in force lacks: `delta` tells `tables` from what is in force,
        `behind` what is in force from what the view has. Peers, services, backends."""
        peers, services, backends = tables.peers, tables.services, tables.backends
        p = list({**behind.peers, **delta.peers})
        s = list({**behind.services, **delta.services})
        b = list({**behind.backends, **delta.backends})
        return (
            self._peers_patch(p, peers, delta.peers),
            Patch(
                self._service_keys(s),
                self._service_values(services.get(one) or _NO_SERVICE for one in s),
                self._service_values(
                    _before(one, delta.services, services) or _NO_SERVICE for one in s
                ),
            ),
            Patch(
                self._backend_keys(b),
                _bits((backends.get(one, 0) for one in b), len(b)),
                _bits((_before(one, delta.backends, backends) or 0 for one in b), len(b)),
            ),
        )

    def endpoints(
        self, tables: Tables, endpoints: Mapping[int, EndpointRecord]
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The local pods by slot, without their views, and their views. The same arrays as the
        last time if they did not change."""
        if endpoints is not self._records:
            self._encode_slots(endpoints)
        made_of, delta = (self._slots, tables.endpoints), tables.delta
        if (
            made_of[0] is not self._made_of[0]
            or made_of[1] is not self._made_of[1]
            or delta is None
            or delta.base != self._serial
            or not self._addresses.isdisjoint(delta.peers)
        ):
            self._encode_views(tables, endpoints)
        self._made_of, self._serial = made_of, tables.serial
        return self._slots, self._views

    def _peers_patch(
        self,
        keys: list[bytes],
        peers: Mapping[bytes, PeerView],
        changed: Mapping[bytes, PeerView | None],
    ) -> Patch:
        if isinstance(peers, Peers) and _plain(self._peer_view):
            wanted = rows(peers.take(keys).astype(_U32, copy=False), self._peer_view.itemsize)
        else:
            wanted = self._peer_values(peers.get(one) or _NO_PEER for one in keys)
        others = wanted.copy()
        at = [number for number, one in enumerate(keys) if one in changed]
        others[at] = self._peer_values(changed[keys[number]] or _NO_PEER for number in at)
        return Patch(self._peer_keys(keys), wanted, others)

    # ---- Hashes ----------------------------------------------------------------------

    @staticmethod
    def _peer_keys(peers: Iterable[bytes]) -> Bytes:
        return np.frombuffer(b"".join(peers), np.uint8).reshape(-1, 16)

    def _peer_values(self, peers: Iterable[PeerView]) -> Bytes:
        return rows(structured(peers, self._peer_view), self._peer_view.itemsize)

    def _service_keys(self, services: Collection[ServiceKey]) -> Bytes:
        keys = np.zeros(len(services), self._service_key)
        keys["addr"] = np.frombuffer(b"".join(key[0] for key in services), np.uint8).reshape(-1, 16)
        keys["port"] = [key[1] for key in services]
        keys["proto"] = [key[2] for key in services]
        return rows(keys, self._service_key.itemsize)

    def _service_values(self, services: Iterable[ServiceView]) -> Bytes:
        values = structured(
            (
                (
                    *(s.id, s.backends, s.count, s.flags, s.affinity),
                    *(s.table, s.owners, s.slot_bits, s.number_bits, s.owner_count, s.ranges),
                )
                for s in services
            ),
            self._service_view,
        )
        return rows(values, self._service_view.itemsize)

    def _backend_keys(self, backends: Collection[BackendKey]) -> Bytes:
        keys = np.zeros(len(backends), self._backend_key)
        keys["addr"] = np.frombuffer(b"".join(p[0] for p in backends), np.uint8).reshape(-1, 16)
        keys["service"] = [p[1] for p in backends]
        keys["port"] = [p[2] for p in backends]
        keys["proto"] = [p[3] for p in backends]
        return rows(keys, self._backend_key.itemsize)

    # ---- Endpoints -------------------------------------------------------------------

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

    def _encode_views(self, tables: Tables, endpoints: Mapping[int, EndpointRecord]) -> None:
        own = {slot: _own_peers(tables.peers, slot, one) for slot, one in endpoints.items()}
        views = np.zeros(len(self._slots), self._endpoint_view)
        places = [slot for slot in tables.endpoints if slot in own]
        views[places] = structured(
            (
                (view.rows, view.cols, view.isolated, *own[slot])
                for slot in places
                for view in (tables.endpoints[slot],)
            ),
            self._endpoint_view,
        )
        # Another array only if it is another: what was handed out stays as it is.
        if not np.array_equal(words(views), words(self._views)):
            self._views = views
        self._addresses = {a for record in endpoints.values() for a in record.by_family}


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


def _bits(of: Iterable[int], count: int) -> Bytes:
    """`backend_state.live` of each."""
    return np.fromiter(of, np.uint8, count).reshape(-1, 1)


def _before(key: K, changed: Mapping[K, V | None], now: Mapping[K, V]) -> V | None:
    """What was there before `changed`."""
    return changed[key] if key in changed else now.get(key)


# ---- Rows of bytes ---------------------------------------------------------------


def rows(array: NDArray[Any], size: int) -> Bytes:
    """Structured elements as rows of `size` bytes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, size)


def words(array: NDArray[Any]) -> NDArray[np.uint64]:
    """Structured elements of a multiple of eight bytes, in one stretch of memory, as rows of
    words that share it. Many times faster to compare than field by field."""
    return array.view(np.uint64).reshape(len(array), -1)


def structured(records: Iterable[tuple[int, ...]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Tuples in the order of the struct's fields, as an array."""
    if _plain(dtype):
        return np.fromiter(chain.from_iterable(records), _U32).view(dtype)
    return np.array([tuple(record) for record in records], dtype)


@cache
def _plain(dtype: np.dtype[Any]) -> bool:
    """Are these __u32 only?"""
    names = dtype.names or ()
    return dtype.itemsize == 4 * len(names) and all(dtype[name] == _U32 for name in names)


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
