"""Hashes whose values hold a record per view (docs/architecture.md, Two views, one epoch)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.bits import Bits
from lockgate.agent.encode import Bytes, Patch, Table, rows, sortable
from lockgate.bpf import syscall
from lockgate.bpf.maps import HashMap

__all__ = ["TwoViews"]


class TwoViews:
    """A hash whose values hold one record per view.

    Keys and values are rows of bytes as in the kernel; a view that is all zero bytes does not
    have the key. Rows are sorted by key. What was read is kept until `forget` or `patch`.

    Packets go on reading the view in force while the other is written. So values are written where
    they are, under their lock (bpf/types.h). An element is deleted only when neither view has its
    key; its memory may be another key's at once, but one that the view in force does not have
    either: whoever found it before reads that there is nothing, which is what it was to read.
    """

    def __init__(
        self,
        map_: HashMap,
        view_size: int,
        bits: Bits | None = None,
        counts: Callable[[Bytes], NDArray[np.bool_]] | None = None,
    ) -> None:
        """`bits`: what is in the map; with `counts`, of which values."""
        self._map = map_
        self._bits, self._counts = bits, counts
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
            if self._bits is not None:
                self._bits.add(self._counted(*self._rows))
        return self._rows

    def __len__(self) -> int:
        return len(self._read()[0])

    def table(self, view: int) -> Table:
        """What `view` has."""
        mine = self._half(view)
        present = mine.any(axis=1)
        return self._read()[0][present], mine[present]

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
        if self._bits is not None:
            self._bits.add(self._counted(keys, values))
        self._map.update_many(self._as_keys(keys), whole, syscall.BPF_F_LOCK)
        if self._bits is not None and self._bits.full:
            own, every = self._map.items()
            key_size = self._map.key_dtype.itemsize
            self._bits.renew(self._counted(rows(own, key_size), rows(every, self._value_size)))

    def _counted(self, keys: Bytes, values: Bytes) -> Bytes:
        return keys if self._counts is None else keys[self._counts(values)]

    def _half(self, view: int) -> Bytes:
        start = view * self._view_size
        return self._read()[1][:, start : start + self._view_size]

    def _as_keys(self, keys: Bytes) -> NDArray[Any]:
        keys = np.ascontiguousarray(keys)
        if self._map.key_dtype.subdtype is not None:
            return keys
        return keys.view(self._map.key_dtype).reshape(-1)


def _find(union: Bytes, keys: Bytes) -> NDArray[np.intp]:
    """Places of `keys`, all of which are there, in the sorted `union`."""
    return np.searchsorted(sortable(union), sortable(keys))
