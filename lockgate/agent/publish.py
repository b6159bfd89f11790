"""Tables into the kernel: two views, one epoch (docs/architecture.md, Two views, one epoch).

Tables that tell what differs from those in force cost that: the idle view is one publication
behind, so it gets the differences of the last two. All others, and the first two, are compared
with what the maps hold.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.datapath import Datapath
from lockgate.agent.encode import (
    EP_LIVE,
    Bytes,
    Encoder,
    EndpointRecord,
    Patch,
    Wanted,
    rows,
    sortable,
)
from lockgate.bpf.grace import wait_grace
from lockgate.bpf.maps import HashMap, MappedArray
from lockgate.compile.tables import Delta, Tables

__all__ = ["EndpointRecord", "Publisher", "TwoViews"]

log = logging.getLogger(__name__)

_MAX_EPOCH = 0xFFFFFFFF


class TwoViews:
    """A hash whose values hold one record per view.

    Keys and values are rows of bytes as in the kernel; a view that is all zero bytes does not
    have the key. Rows are sorted by key. What was read is kept until `forget` or `patch`.
    """

    def __init__(self, map_: HashMap, view_size: int) -> None:
        self._map = map_
        self._view_size = view_size
        # Behind the two views there may be padding.
        self._value_size = map_.value_dtype.itemsize
        self._rows: tuple[Bytes, Bytes] | None = None

    def _read(self) -> tuple[Bytes, Bytes]:
        if self._rows is None:
            keys, values = self._map.items()
            keys = rows(keys, self._map.key_dtype.itemsize)
            order = np.argsort(sortable(keys))
            self._rows = keys[order], rows(values, self._value_size)[order]
        return self._rows

    def __len__(self) -> int:
        return len(self._read()[0])

    def holds(self, view: int, keys: Bytes, views: Bytes) -> bool:
        """Is this exactly what `view` has? `keys` sorted, see `sort`."""
        mine = self._half(view)
        present = mine.any(axis=1)
        return np.array_equal(self._read()[0][present], keys) and np.array_equal(
            mine[present], views
        )

    def write(self, view: int, keys: Bytes, views: Bytes) -> int:
        """Make `view` so; the other view stays. Keys that are in neither are deleted. Returns
        the number of elements written and deleted. On OSError memory and map disagree."""
        if np.array_equal(self._read()[0], keys):
            return self._write_values(view, views)
        return self._write_all(view, keys, views)

    def forget(self) -> None:
        """Let go of what was read."""
        self._rows = None

    def patch(self, view: int, patch: Patch) -> None:
        """Write what differs to `view`."""
        self.forget()
        if not len(patch.keys):
            return
        values = np.zeros((len(patch.keys), self._value_size), np.uint8)
        halves = values[:, : 2 * self._view_size].reshape(len(values), 2, -1)
        halves[:, view], halves[:, 1 - view] = patch.wanted, patch.others
        alive = values.any(axis=1)
        if not alive.all():
            self._map.delete_many(self._as_keys(patch.keys[~alive]))
        if alive.any():
            self._update(patch.keys[alive], values[alive])

    def _write_values(self, view: int, views: Bytes) -> int:
        """All keys, and no others, are in the map already."""
        mine = self._half(view)
        different = np.flatnonzero((mine != views).any(axis=1))
        if len(different):
            mine[different] = views[different]
            own, values = self._read()
            self._update(own[different], values[different])
        return len(different)

    def _write_all(self, view: int, keys: Bytes, views: Bytes) -> int:
        start = view * self._view_size
        mine, known = self._read()
        both = np.concatenate((mine, keys))
        _, first = np.unique(sortable(both), return_index=True)
        union = both[first]
        values = np.zeros((len(union), self._value_size), np.uint8)
        place = _find(union, mine)
        values[place] = known
        values[:, start : start + self._view_size] = 0
        values[_find(union, keys), start : start + self._view_size] = views

        before = np.zeros_like(values)
        before[place] = known
        existed = np.zeros(len(union), bool)
        existed[place] = True
        alive = values.any(axis=1)
        written = alive & (values != before).any(axis=1)
        dead = existed & ~alive
        if dead.any():
            self._map.delete_many(self._as_keys(union[dead]))
        if written.any():
            self._update(union[written], values[written])
        self._rows = union[alive], values[alive]
        return int(written.sum() + dead.sum())

    def _update(self, keys: Bytes, values: Bytes) -> None:
        whole = np.ascontiguousarray(values).view(self._map.value_dtype).reshape(-1)
        self._map.update_many(self._as_keys(keys), whole)

    def _half(self, view: int) -> Bytes:
        start = view * self._view_size
        return self._read()[1][:, start : start + self._view_size]

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
            **self._counts,
            "imageWords": sum(len(i) for i in self._inner if i is not None),
        }

    def read_back(self) -> None:
        """Learn what the maps hold."""
        self._inner: list[MappedArray | None] = [self._dp.images.inner(v) for v in (0, 1)]
        self._peers = TwoViews(self._dp.peers, self._sizes["peer_view"])
        self._services = TwoViews(self._dp.services, self._sizes["service_view"])
        self._backends = TwoViews(self._dp.backends, 1)
        self._counts = {
            "peers": len(self._peers),
            "services": len(self._services),
            "backends": len(self._backends),
        }
        # The serial of the tables in force, and what the idle view lacks of them, if it is known.
        self._serial = 0
        self._behind: Delta | None = None
        # What was written last, by view: the same arrays again need no comparison.
        self._slots: NDArray[Any] | None = None
        self._views: list[NDArray[Any] | None] = [None, None]
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
        slots, views = self._encoder.endpoints(tables, endpoints)
        delta, behind = tables.delta, self._behind
        if delta is not None and delta.base != self._serial:
            delta = None
        wanted = None if delta is not None and behind is not None else self._encoder.encode(tables)
        epoch = self.epoch
        # Connections remember the epoch that judged them, also those that programs of another
        # version judge beside ours: one number, one meaning.
        if (
            epoch > self._dp.beyond
            and (not delta if wanted is None else self._in_force(epoch & 1, tables, wanted))
            and self._has_slots(slots)
            and self._has_views(epoch & 1, views)
            and self._has_hops(epoch & 1, hops)
        ):
            if tables.serial != self._serial and delta is None:
                self._behind = None
            self._serial = tables.serial
            return False
        following = epoch + 1 if epoch < _MAX_EPOCH else 2
        if following <= self._dp.beyond < _MAX_EPOCH - 2:
            following += (self._dp.beyond - following) // 2 * 2 + 2
        idle = following & 1
        # Whoever reads the idle view began before the last move of the epoch; by now they have
        # mostly finished.
        self._grace.result()
        self._certain = False
        if wanted is None:
            assert delta is not None and behind is not None
            self._patch(idle, tables, delta, behind)
        else:
            self._write(idle, tables, wanted)
        self._write_endpoints(idle, slots, views)
        self._write_hops(idle, hops)
        self._dp.state.view["epoch"][0] = following
        self._grace = self._waiter.submit(wait_grace)
        if slots is not self._slots:
            # Those no longer wanted: from here on their packets are refused, not unjudged.
            mine = self._dp.endpoints.view
            stale = (mine["id"] != 0) & (slots["id"] == 0)
            for slot in np.flatnonzero(stale):
                mine[slot] = np.zeros((), self._endpoint)
            self._slots = slots
        self._serial, self._behind = tables.serial, delta
        self._counts = {
            "peers": len(tables.peers),
            "services": len(tables.services),
            "backends": len(tables.backends),
        }
        self._certain = True
        return True

    def level(self, tables: Tables) -> None:
        """Bring the idle view to what is in force, `tables`, if it is not known what it lacks: so
        that the next change costs what it changes. Blocks for a grace period then."""
        if self._behind is not None or tables.serial != self._serial or not self._certain:
            return
        self._grace.result()
        self._certain = False
        self._write(1 - (self.epoch & 1), tables, self._encoder.encode(tables))
        self._behind = Delta(tables.serial, words=[])
        for table in (self._peers, self._services, self._backends):
            table.forget()
        self._certain = True

    # ---- Inside --------------------------------------------------------------------

    def _write(self, idle: int, tables: Tables, wanted: Wanted) -> None:
        self._write_image(idle, tables.image)
        self._peers.write(idle, *wanted.peers)
        self._services.write(idle, *wanted.services)
        self._backends.write(idle, *wanted.backends)

    def _patch(self, idle: int, tables: Tables, delta: Delta, behind: Delta) -> None:
        if behind.words is None or delta.words is None:
            self._write_image(idle, tables.image)
        else:
            self._write_image(idle, tables.image, behind.words + delta.words)
        peers, services, backends = self._encoder.patches(tables, delta, behind)
        self._peers.patch(idle, peers)
        self._services.patch(idle, services)
        self._backends.patch(idle, backends)

    def _in_force(self, view: int, tables: Tables, wanted: Wanted) -> bool:
        image, size = self._inner[view], len(tables.image)
        return (
            image is not None
            and len(image) >= size
            and np.array_equal(image.view[:size], tables.image)
            and self._peers.holds(view, *wanted.peers)
            and self._services.holds(view, *wanted.services)
            and self._backends.holds(view, *wanted.backends)
        )

    def _has_views(self, view: int, views: NDArray[Any]) -> bool:
        if self._views[view] is not views:
            if not np.array_equal(self._dp.endpoints.view["view"][:, view], views):
                return False
            self._views[view] = views
        return True

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

    def _write_image(
        self,
        view: int,
        image: NDArray[np.uint64],
        ranges: list[tuple[int, int]] | None = None,
    ) -> None:
        """`ranges`: the words that may differ; None if any may."""
        inner = self._inner[view]
        if inner is not None and len(inner) >= len(image):
            if ranges is not None:
                for first, behind in ranges:
                    inner.view[first:behind] = image[first:behind]
                return
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

    def _write_endpoints(self, view: int, slots: NDArray[Any], views: NDArray[Any]) -> None:
        mine = self._dp.endpoints.view
        if slots is not self._slots:
            live = (slots["flags"] & EP_LIVE) != 0
            for name in self._static:
                different = mine[name] != slots[name]
                if different.ndim > 1:
                    different = different.any(axis=1)
                at = np.flatnonzero(different & live)
                if len(at):
                    mine[name][at] = slots[name][at]
        if self._views[view] is not views:
            different = np.flatnonzero(mine["view"][:, view] != views)
            mine["view"][different, view] = views[different]
            self._views[view] = views


def _by_view(records: NDArray[Any]) -> Bytes:
    """Records of two views as bytes: [number, view, byte]."""
    return records.view(np.uint8).reshape(len(records), 2, -1)


def _as_rows(records: NDArray[Any]) -> Bytes:
    return rows(records, records.dtype.itemsize)


def _find(union: Bytes, keys: Bytes) -> NDArray[np.intp]:
    """Places of `keys`, all of which are there, in the sorted `union`."""
    return np.searchsorted(sortable(union), sortable(keys))
