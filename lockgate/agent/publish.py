"""Tables into the kernel: two views, one epoch (docs/architecture.md, Two views, one epoch).

The publisher keeps in memory what the maps hold, read back at start, so a change costs as many
elements as differ. Tables are compared and encoded as arrays; only making arrays of the
compiler's dicts is linear in their size.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.datapath import Datapath
from lockgate.bpf.grace import wait_grace
from lockgate.bpf.maps import HashMap, MappedArray
from lockgate.compile.tables import Tables
from lockgate.objects.address import is_ipv4, parse_address

__all__ = ["EndpointRecord", "Publisher", "TwoViews"]

log = logging.getLogger(__name__)

Bytes = NDArray[np.uint8]
_EP_LIVE = 1
_MAX_EPOCH = 0xFFFFFFFF


@dataclass(frozen=True, slots=True)
class EndpointRecord:
    """What both views share of a local pod."""

    id: int
    mac: bytes
    host_mac: bytes
    mtu: int
    ips: tuple[str, ...]


class TwoViews:
    """A hash whose values hold one record per view, and its copy in memory.

    Keys and values are rows of bytes as in the kernel; a view that is all zero bytes does not
    have the key. Rows are sorted by key.
    """

    def __init__(self, map_: HashMap, view_size: int) -> None:
        self._map = map_
        self._view_size = view_size
        # Behind the two views there may be padding.
        self._value_size = map_.value_dtype.itemsize
        keys, values = map_.items()
        self._keys = rows(keys, map_.key_dtype.itemsize)
        self._values = rows(values, self._value_size)
        order = np.argsort(_sortable(self._keys))
        self._keys, self._values = self._keys[order], self._values[order]

    def __len__(self) -> int:
        return len(self._keys)

    def holds(self, view: int, keys: Bytes, views: Bytes) -> bool:
        """Is this exactly what `view` has? `keys` sorted, see `sort`."""
        mine = self._half(view)
        present = mine.any(axis=1)
        return np.array_equal(self._keys[present], keys) and np.array_equal(mine[present], views)

    def write(self, view: int, keys: Bytes, views: Bytes) -> int:
        """Make `view` so; the other view stays. Keys that are in neither are deleted. Returns
        the number of elements written and deleted. On OSError memory and map disagree."""
        start = view * self._view_size
        both = np.concatenate((self._keys, keys))
        _, first = np.unique(_sortable(both), return_index=True)
        union = both[first]
        values = np.zeros((len(union), self._value_size), np.uint8)
        place = _find(union, self._keys)
        values[place] = self._values
        values[:, start : start + self._view_size] = 0
        values[_find(union, keys), start : start + self._view_size] = views

        before = np.zeros_like(values)
        before[place] = self._values
        existed = np.zeros(len(union), bool)
        existed[place] = True
        alive = values.any(axis=1)
        written = alive & (values != before).any(axis=1)
        dead = existed & ~alive
        if dead.any():
            self._map.delete_many(self._as_keys(union[dead]))
        if written.any():
            self._map.update_many(
                self._as_keys(union[written]),
                np.ascontiguousarray(values[written]).view(self._map.value_dtype).reshape(-1),
            )
        self._keys, self._values = union[alive], values[alive]
        return int(written.sum() + dead.sum())

    def _half(self, view: int) -> Bytes:
        start = view * self._view_size
        return self._values[:, start : start + self._view_size]

    def _as_keys(self, keys: Bytes) -> NDArray[Any]:
        keys = np.ascontiguousarray(keys)
        if self._map.key_dtype.subdtype is not None:
            return keys
        return keys.view(self._map.key_dtype).reshape(-1)


@dataclass(slots=True)
class _Wanted:
    """Tables as arrays of bytes."""

    peers: tuple[Bytes, Bytes]
    services: tuple[Bytes, Bytes]
    backends: tuple[Bytes, Bytes]
    image: NDArray[np.uint64]
    endpoints: NDArray[Any]


class Publisher:
    """Brings tables in force. One at a time, from one thread."""

    def __init__(self, datapath: Datapath) -> None:
        self._dp = datapath
        schema = datapath.object.schema
        self._peer_view = schema.dtype("peer_view")
        self._service_key, self._service_view = (
            schema.dtype("service_key"),
            schema.dtype("service_view"),
        )
        self._backend_key = schema.dtype("backend_key")
        self._endpoint = schema.dtype("endpoint")
        self._endpoint_view = schema.dtype("endpoint_view")
        # The grace period after each move of the epoch passes beside other work; the first is
        # for a predecessor's last move.
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="grace")
        self._grace = self._waiter.submit(wait_grace)
        self.read_back()

    @property
    def epoch(self) -> int:
        """The epoch in force; 0 = nothing was ever published."""
        return int(self._dp.state.view["epoch"][0])

    @property
    def sizes(self) -> dict[str, int]:
        """Elements and image words, for status."""
        return {
            "peers": len(self._peers),
            "services": len(self._services),
            "backends": len(self._backends),
            "imageWords": sum(len(i) for i in self._inner if i is not None),
        }

    def read_back(self) -> None:
        """Learn what the maps hold."""
        self._inner: list[MappedArray | None] = [self._dp.images.inner(v) for v in (0, 1)]
        self._peers = TwoViews(self._dp.peers, self._peer_view.itemsize)
        self._services = TwoViews(self._dp.services, self._service_view.itemsize)
        self._backends = TwoViews(self._dp.backends, 1)
        self._certain = True

    def publish(self, tables: Tables, endpoints: Mapping[int, EndpointRecord]) -> bool:
        """Bring `tables`, with the local pods `endpoints` by slot, in force together; False if
        they are already. On an error what was in force still is. Blocks for a grace period."""
        if not self._certain:
            self.read_back()
        wanted = self._encode(tables, endpoints)
        epoch = self.epoch
        if epoch and self._in_force(epoch & 1, wanted):
            return False
        following = epoch + 1 if epoch < _MAX_EPOCH else 2
        idle = following & 1
        # Whoever reads the idle view began before the last move of the epoch; by now they have
        # mostly finished.
        self._grace.result()
        self._certain = False
        self._write_image(idle, wanted.image)
        self._peers.write(idle, *wanted.peers)
        self._services.write(idle, *wanted.services)
        self._backends.write(idle, *wanted.backends)
        self._write_endpoints(idle, wanted.endpoints)
        self._dp.state.view["epoch"][0] = following
        self._grace = self._waiter.submit(wait_grace)
        # Slots that are no longer wanted: from here on their packets are refused, not unjudged.
        mine = self._dp.endpoints.view
        stale = (mine["id"] != 0) & (wanted.endpoints["id"] == 0)
        for slot in np.flatnonzero(stale):
            mine[slot] = np.zeros((), self._endpoint)
        self._certain = True
        return True

    # ---- Inside --------------------------------------------------------------------

    def _in_force(self, view: int, wanted: _Wanted) -> bool:
        image = self._inner[view]
        size = len(wanted.image)
        mine = self._dp.endpoints.view
        return (
            image is not None
            and len(image) >= size
            and np.array_equal(image.view[:size], wanted.image)
            and self._peers.holds(view, *wanted.peers)
            and self._services.holds(view, *wanted.services)
            and self._backends.holds(view, *wanted.backends)
            and all(np.array_equal(mine[name], wanted.endpoints[name]) for name in self._static)
            and np.array_equal(mine["view"][:, view], wanted.endpoints["view"][:, 0])
        )

    @property
    def _static(self) -> list[str]:
        return [name for name in self._endpoint.names or () if name != "view"]

    def _write_image(self, view: int, image: NDArray[np.uint64]) -> None:
        inner = self._inner[view]
        if inner is not None and len(inner) >= len(image):
            inner.view[: len(image)] = image
            return
        # A quarter more, so that it does not grow with every rule.
        larger = self._dp.images.create_inner(len(image) + len(image) // 4)
        larger.view[: len(image)] = image
        self._dp.images.replace(view, larger)
        if inner is not None:
            inner.close()
        self._inner[view] = larger

    def _write_endpoints(self, view: int, wanted: NDArray[Any]) -> None:
        mine = self._dp.endpoints.view
        for slot in np.flatnonzero(wanted["flags"] & _EP_LIVE):
            for name in self._static:
                if not np.array_equal(mine[name][slot], wanted[name][slot]):
                    mine[name][slot] = wanted[name][slot]
        different = np.flatnonzero(mine["view"][:, view] != wanted["view"][:, 0])
        mine["view"][different, view] = wanted["view"][different, 0]

    def _encode(self, tables: Tables, endpoints: Mapping[int, EndpointRecord]) -> _Wanted:
        addresses = np.frombuffer(b"".join(tables.peers), np.uint8).reshape(-1, 16)
        peers = structured(tables.peers.values(), self._peer_view)

        keys = np.zeros(len(tables.services), self._service_key)
        keys["addr"] = np.frombuffer(b"".join(key[0] for key in tables.services), np.uint8).reshape(
            -1, 16
        )
        keys["port"] = [key[1] for key in tables.services]
        keys["proto"] = [key[2] for key in tables.services]
        services = structured(
            ((s.id, s.backends, s.count, s.flags) for s in tables.services.values()),
            self._service_view,
        )

        pairs = list(tables.backends)
        backends = np.zeros(len(pairs), self._backend_key)
        backends["addr"] = np.frombuffer(b"".join(p[0] for p in pairs), np.uint8).reshape(-1, 16)
        backends["service"] = [p[1] for p in pairs]
        backends["port"] = [p[2] for p in pairs]
        backends["proto"] = [p[3] for p in pairs]
        live = np.ones((len(pairs), 1), np.uint8)

        slots = np.zeros(len(self._dp.endpoints), self._endpoint)
        for slot, record in endpoints.items():
            row = slots[slot]
            row["id"], row["flags"], row["mtu"] = record.id, _EP_LIVE, record.mtu
            row["mac"] = np.frombuffer(record.mac, np.uint8)
            row["host_mac"] = np.frombuffer(record.host_mac, np.uint8)
            for ip in record.ips:
                address = parse_address(ip)
                field = "addr4" if is_ipv4(address) else "addr6"
                row[field] = np.frombuffer(address, np.uint8)
            view = tables.endpoints.get(slot)
            if view is not None:
                row["view"][0] = tuple(view)
        return _Wanted(
            peers=sort(addresses, rows(peers, self._peer_view.itemsize)),
            services=sort(
                rows(keys, self._service_key.itemsize),
                rows(services, self._service_view.itemsize),
            ),
            backends=sort(rows(backends, self._backend_key.itemsize), live),
            image=tables.image,
            endpoints=slots,
        )


# ---- Rows of bytes ---------------------------------------------------------------


def rows(array: NDArray[Any], size: int) -> Bytes:
    """Structured elements as rows of `size` bytes."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).reshape(-1, size)


def structured(records: Iterable[tuple[int, ...]], dtype: np.dtype[Any]) -> NDArray[Any]:
    """Tuples in the order of the struct's fields, as an array."""
    return np.array([tuple(record) for record in records], dtype)


def sort(keys: Bytes, values: Bytes) -> tuple[Bytes, Bytes]:
    """Both, in the order of the keys."""
    order = np.argsort(_sortable(keys))
    return keys[order], values[order]


def _sortable(keys: Bytes) -> NDArray[Any]:
    # numpy has no order for void; strings of bytes lose trailing zeroes but not their order,
    # and keys are all of one length, so none are confounded.
    keys = np.ascontiguousarray(keys)
    return keys.view(f"S{keys.shape[1]}").reshape(-1)


def _find(union: Bytes, keys: Bytes) -> NDArray[np.intp]:
    """Places of `keys`, all of which are there, in the sorted `union`."""
    return np.searchsorted(_sortable(union), _sortable(keys))
