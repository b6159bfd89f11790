"""What programs of another version remember, into the tables of this one.

Where only the layout of a table changed does it get here: else both versions' programs use the
same table, and nothing has to be carried. The agent calls `before` twice, so that the second
pass is short, then switches the programs, waits until none of the old ones is running, and
calls `after`: docs/cluster.md, Versioned pins, says what that leaves open.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.datapath import Datapath
from lockgate.agent.encode import Bytes, rows, sortable
from lockgate.agent.others import open_other
from lockgate.bpf.maps import HashMap
from lockgate.bpf.pins import convert

__all__ = ["CarriedTable", "Carry"]


class CarriedTable:
    """One table of another version, and ours."""

    def __init__(self, other: HashMap, mine: HashMap) -> None:
        """Takes over `other`; `mine` stays the caller's."""
        self._other, self._mine = other, mine
        self._keys: Bytes = np.zeros((0, mine.info.key_size), np.uint8)
        self._values: Bytes = np.zeros((0, mine.info.value_size), np.uint8)

    def before(self) -> int:
        """Copy what is not in ours, or is older there; and take out again what the last pass
        copied and is over. Returns the number of elements written and deleted."""
        last = self._keys
        keys, values, changed = self._read()
        place, found = _places(keys, last)
        over = last[~found]
        if len(over):
            self._mine.delete_many(self._as_keys(over))
        present, current = self._read_mine()
        place, found = _places(present, keys[changed])
        stale = np.zeros(len(changed), bool)
        stale[found] = self._later(current[place[found]], values[changed[found]])
        return len(over) + self._write(keys, values, changed[~stale])

    def after(self) -> int:
        """Copy what began in the other table since the last pass: there it was judged by all
        hooks, here perhaps by some. What went on there is copied unless it did here too."""
        last_keys, last_values = self._keys, self._values
        keys, values, changed = self._read()
        if not len(changed):
            return 0
        place, known = _places(last_keys, keys[changed])
        present, current = self._read_mine()
        mine, there = _places(present, keys[changed])
        write = ~known
        both = np.flatnonzero(known & there)
        untouched = current[mine[both]] == last_values[place[both]]
        write[both] = untouched.all(axis=1)
        return self._write(keys, values, changed[write])

    def close(self) -> None:
        self._other.close()

    # ---- Inside --------------------------------------------------------------------

    def _read(self) -> tuple[Bytes, Bytes, NDArray[np.intp]]:
        """The other table in our layout, by key; and which elements are not as last time."""
        found = self._other.items()
        keys = rows(convert(found[0], self._mine.key_dtype), self._mine.info.key_size)
        values = rows(convert(found[1], self._mine.value_dtype), self._mine.info.value_size)
        # Two keys of theirs may have become one of ours.
        _, order = np.unique(sortable(keys), return_index=True)
        keys, values = keys[order], values[order]
        place, known = _places(self._keys, keys)
        same = np.zeros(len(keys), bool)
        same[known] = (self._values[place[known]] == values[known]).all(axis=1)
        self._keys, self._values = keys, values
        return keys, values, np.flatnonzero(~same)

    def _read_mine(self) -> tuple[Bytes, Bytes]:
        found = self._mine.items()
        keys = rows(found[0], self._mine.info.key_size)
        order = np.argsort(sortable(keys))
        return keys[order], rows(found[1], self._mine.info.value_size)[order]

    def _later(self, mine: Bytes, theirs: Bytes) -> NDArray[np.bool_]:
        """Did our programs see more of it? Without a time: they did."""
        names = self._mine.value_dtype.names or ()
        if "seen" not in names:
            return np.ones(len(mine), bool)
        late, early = self._seen(mine), self._seen(theirs)
        return (late - early).astype(np.int32) > 0

    def _seen(self, values: Bytes) -> NDArray[np.uint32]:
        whole = np.ascontiguousarray(values).view(self._mine.value_dtype).reshape(-1)
        return np.ascontiguousarray(whole["seen"]).astype(np.uint32)

    def _write(self, keys: Bytes, values: Bytes, at: NDArray[np.intp]) -> int:
        if len(at):
            if "seen" in (self._mine.value_dtype.names or ()):
                # The latest last: should room be short, the LRU evicts the others.
                at = at[np.argsort(self._seen(values[at]), kind="stable")]
            whole = np.ascontiguousarray(values[at]).view(self._mine.value_dtype).reshape(-1)
            self._mine.update_many(self._as_keys(keys[at]), whole)
        return len(at)

    def _as_keys(self, keys: Bytes) -> NDArray[np.void]:
        return np.ascontiguousarray(keys).view(self._mine.key_dtype).reshape(-1)


class Carry:
    """All tables that another version's programs fill."""

    def __init__(self, dp: Datapath) -> None:
        self._tables: list[CarriedTable] = []
        self._translations: list[CarriedTable] = []
        by_name = {
            "connections": dp.connections,
            "half_open": dp.half_open,
            "crowd": dp.crowd,
            "nat": dp.nat,
            "fragments": dp.fragments,
            "sockets": dp.sockets,
            "affinities": dp.affinities,
        }
        # What is in both goes to `connections` last: it is looked up there first.
        for name, mine in reversed(by_name.items()):
            for pin in dp.others:
                other = open_other(pin) if pin.name == name else None
                if isinstance(other, HashMap):
                    tables = self._translations if name == "nat" else self._tables
                    tables.append(CarriedTable(other, mine))

    # No connection gets here without its translation: it would be given another, from another
    # port. A translation without its connection is found and kept when that begins anew.

    def before(self) -> int:
        """See `CarriedTable.before`."""
        return sum(table.before() for table in (*self._tables, *self._translations))

    def after(self) -> int:
        """See `CarriedTable.after`."""
        return sum(table.after() for table in (*self._translations, *self._tables))

    def __enter__(self) -> Carry:
        return self

    def __exit__(self, *_: object) -> None:
        for table in (*self._tables, *self._translations):
            table.close()


def _places(keys: Bytes, wanted: Bytes) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Where each of `wanted` is in the sorted `keys`, and whether it is there at all."""
    if not len(keys) or not len(wanted):
        return np.zeros(len(wanted), np.intp), np.zeros(len(wanted), bool)
    place = np.minimum(np.searchsorted(sortable(keys), sortable(wanted)), len(keys) - 1)
    return place, (keys[place] == wanted).all(axis=1)
