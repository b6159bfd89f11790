"""Tables into the kernel: two views, one epoch (docs/architecture.md, Two views, one epoch).

The publisher keeps in memory what the maps hold, read back at start, so a change costs as many
elements as differ. Tables are compared as the arrays that the encoder makes of them.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.datapath import Datapath
from lockgate.agent.encode import EP_LIVE, Bytes, Encoder, EndpointRecord, Wanted, rows, sortable
from lockgate.bpf.grace import wait_grace
from lockgate.bpf.maps import HashMap, MappedArray
from lockgate.compile.tables import Tables

__all__ = ["EndpointRecord", "Publisher", "TwoViews"]

log = logging.getLogger(__name__)

_MAX_EPOCH = 0xFFFFFFFF


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
        order = np.argsort(sortable(self._keys))
        self._keys, self._values = self._keys[order], self._values[order]
        # What each view was made to be last: the same arrays again need no comparison.
        self._last: list[tuple[Bytes, Bytes] | None] = [None, None]

    def __len__(self) -> int:
        return len(self._keys)

    def holds(self, view: int, keys: Bytes, views: Bytes) -> bool:
        """Is this exactly what `view` has? `keys` sorted, see `sort`."""
        last = self._last[view]
        if last is not None and last[0] is keys and last[1] is views:
            return True
        mine = self._half(view)
        present = mine.any(axis=1)
        return np.array_equal(self._keys[present], keys) and np.array_equal(mine[present], views)

    def write(self, view: int, keys: Bytes, views: Bytes) -> int:
        """Make `view` so; the other view stays. Keys that are in neither are deleted. Returns
        the number of elements written and deleted. On OSError memory and map disagree."""
        self._last[view] = None
        if np.array_equal(self._keys, keys):
            changes = self._write_values(view, views)
        else:
            changes = self._write_all(view, keys, views)
        self._last[view] = keys, views
        return changes

    def _write_values(self, view: int, views: Bytes) -> int:
        """All keys, and no others, are in the map already."""
        mine = self._half(view)
        different = np.flatnonzero((mine != views).any(axis=1))
        if len(different):
            mine[different] = views[different]
            self._update(self._keys[different], self._values[different])
        return len(different)

    def _write_all(self, view: int, keys: Bytes, views: Bytes) -> int:
        start = view * self._view_size
        both = np.concatenate((self._keys, keys))
        _, first = np.unique(sortable(both), return_index=True)
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
            self._update(union[written], values[written])
        self._keys, self._values = union[alive], values[alive]
        return int(written.sum() + dead.sum())

    def _update(self, keys: Bytes, values: Bytes) -> None:
        whole = np.ascontiguousarray(values).view(self._map.value_dtype).reshape(-1)
        self._map.update_many(self._as_keys(keys), whole)

    def _half(self, view: int) -> Bytes:
        start = view * self._view_size
        return self._values[:, start : start + self._view_size]

    def _as_keys(self, keys: Bytes) -> NDArray[Any]:
        keys = np.ascontiguousarray(keys)
        if self._map.key_dtype.subdtype is not None:
            return keys
        return keys.view(self._map.key_dtype).reshape(-1)


class Publisher:
    """Brings tables in force. One at a time, from one thread."""

    def __init__(self, datapath: Datapath) -> None:
        self._dp = datapath
        schema = datapath.object.schema
        self._encoder = Encoder(schema, len(datapath.endpoints))
        self._endpoint = schema.dtype("endpoint")
        self._static = [name for name in self._endpoint.names or () if name != "view"]
        self._sizes = {name: schema.dtype(name).itemsize for name in ("peer_view", "service_view")}
        # The grace period after each move of the epoch passes beside other work; the first is
        # for a predecessor's last move.
        self._waiter = ThreadPoolExecutor(1, thread_name_prefix="grace")
        self._grace = self._waiter.submit(wait_grace)
        self._hops = _by_view(datapath.hops.view)
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
        self._peers = TwoViews(self._dp.peers, self._sizes["peer_view"])
        self._services = TwoViews(self._dp.services, self._sizes["service_view"])
        self._backends = TwoViews(self._dp.backends, 1)
        # The slots that were written last: the same array again needs no comparison.
        self._slots: NDArray[Any] | None = None
        self._hop_tables: list[NDArray[Any] | None] = [None, None]
        self._certain = True

    def hops(self) -> NDArray[Any]:
        """A copy of the hops in force, as `struct hop_view` by number."""
        return self._dp.hops.view["view"][:, self.epoch & 1].copy()

    def publish(
        self, tables: Tables, endpoints: Mapping[int, EndpointRecord], hops: NDArray[Any]
    ) -> bool:
        """Bring `tables`, with the local pods `endpoints` by slot and the `hops` by number, in
        force together; False if they are already. On an error what was in force still is. Blocks
        for a grace period. `hops` that changed are to be another array."""
        if not self._certain:
            self.read_back()
        wanted = self._encoder.encode(tables, endpoints)
        epoch = self.epoch
        # Connections remember the epoch that judged them, also those that programs of another
        # version judge beside ours: one number, one meaning.
        if (
            epoch > self._dp.beyond
            and self._in_force(epoch & 1, wanted)
            and self._has_hops(epoch & 1, hops)
        ):
            return False
        following = epoch + 1 if epoch < _MAX_EPOCH else 2
        if following <= self._dp.beyond < _MAX_EPOCH - 2:
            following += (self._dp.beyond - following) // 2 * 2 + 2
        idle = following & 1
        # Whoever reads the idle view began before the last move of the epoch; by now they have
        # mostly finished.
        self._grace.result()
        self._certain = False
        self._write_image(idle, wanted.image)
        self._peers.write(idle, *wanted.peers)
        self._services.write(idle, *wanted.services)
        self._backends.write(idle, *wanted.backends)
        self._write_endpoints(idle, wanted)
        self._write_hops(idle, hops)
        self._dp.state.view["epoch"][0] = following
        self._grace = self._waiter.submit(wait_grace)
        if wanted.slots is not self._slots:
            # Those no longer wanted: from here on their packets are refused, not unjudged.
            mine = self._dp.endpoints.view
            stale = (mine["id"] != 0) & (wanted.slots["id"] == 0)
            for slot in np.flatnonzero(stale):
                mine[slot] = np.zeros((), self._endpoint)
            self._slots = wanted.slots
        self._certain = True
        return True

    # ---- Inside --------------------------------------------------------------------

    def _in_force(self, view: int, wanted: Wanted) -> bool:
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
            and self._has_slots(wanted.slots)
            and np.array_equal(mine["view"][:, view], wanted.views)
        )

    def _has_slots(self, slots: NDArray[Any]) -> bool:
        mine = self._dp.endpoints.view
        return slots is self._slots or all(
            np.array_equal(mine[name], slots[name]) for name in self._static
        )

    def _has_hops(self, view: int, hops: NDArray[Any]) -> bool:
        if self._hop_tables[view] is not hops:
            if not np.array_equal(self._hops[:, view], _as_rows(hops)):
                return False
            self._hop_tables[view] = hops
        return True

    def _write_hops(self, view: int, hops: NDArray[Any]) -> None:
        if self._hop_tables[view] is not hops:
            mine, wanted = self._hops[:, view], _as_rows(hops)
            different = np.flatnonzero((mine != wanted).any(axis=1))
            mine[different] = wanted[different]
            self._hop_tables[view] = hops

    def _write_image(self, view: int, image: NDArray[np.uint64]) -> None:
        inner = self._inner[view]
        if inner is not None and len(inner) >= len(image):
            # The idle view is two changes old, so what differs is mostly a small part.
            different = np.flatnonzero(inner.view[: len(image)] != image)
            if len(different):
                part = slice(different[0], different[-1] + 1)
                inner.view[part] = image[part]
            return
        # A quarter more, so that it does not grow with every rule.
        larger = self._dp.images.create_inner(len(image) + len(image) // 4)
        larger.view[: len(image)] = image
        self._dp.images.replace(view, larger)
        if inner is not None:
            inner.close()
        self._inner[view] = larger

    def _write_endpoints(self, view: int, wanted: Wanted) -> None:
        mine = self._dp.endpoints.view
        if wanted.slots is not self._slots:
            live = (wanted.slots["flags"] & EP_LIVE) != 0
            for name in self._static:
                different = mine[name] != wanted.slots[name]
                if different.ndim > 1:
                    different = different.any(axis=1)
                at = np.flatnonzero(different & live)
                if len(at):
                    mine[name][at] = wanted.slots[name][at]
        different = np.flatnonzero(mine["view"][:, view] != wanted.views)
        mine["view"][different, view] = wanted.views[different]


def _by_view(records: NDArray[Any]) -> Bytes:
    """Records of two views as bytes: [number, view, byte]."""
    return records.view(np.uint8).reshape(len(records), 2, -1)


def _as_rows(records: NDArray[Any]) -> Bytes:
    return rows(records, records.dtype.itemsize)


def _find(union: Bytes, keys: Bytes) -> NDArray[np.intp]:
    """Places of `keys`, all of which are there, in the sorted `union`."""
    return np.searchsorted(sortable(union), sortable(keys))
