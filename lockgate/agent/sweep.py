"""Taking expired entries out of the tables that the programs fill.

The programs forget by themselves only when a table is full (LRU). The sweep reads a table in
slices by batch look-ups, finds the expired ones as arrays, and deletes them; between slices it
lets others run. `sockets` has no times: it is left to its LRU.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.datapath import Datapath
from lockgate.bpf import syscall
from lockgate.bpf.maps import HashMap

__all__ = ["expired_connections", "expired_nat", "sweep"]

NEW, ESTABLISHED, CLOSING, CLOSED = 1, 2, 3, 4
TCP, UDP = 6, 17
#: Seconds without a packet. No longer than the programs count an entry as alive.
AGE_NEW, AGE_TCP, AGE_UDP, AGE_OTHER = 30, 8000, 120, 30
AGE_CLOSING, AGE_CLOSED, AGE_FRAGMENT = 60, 10, 30

Records = NDArray[Any]
Expired = Callable[[Records, Records, int], NDArray[np.bool_]]


def _age(seen: NDArray[Any], now: int) -> NDArray[np.int64]:
    # A packet may have come after `now` was read.
    return now - seen.astype(np.int64)


def _quiet(proto: NDArray[Any]) -> NDArray[np.int64]:
    return np.where(proto == TCP, AGE_TCP, np.where(proto == UDP, AGE_UDP, AGE_OTHER))


def expired_connections(keys: Records, values: Records, now: int) -> NDArray[np.bool_]:
    """Which entries are past the age of their state."""
    state = values["state"]
    limit = np.select(
        [state == NEW, state == CLOSING, state == CLOSED],
        [AGE_NEW, AGE_CLOSING, AGE_CLOSED],
        _quiet(keys["proto"]),
    )
    return _age(values["seen"], now) > limit


def expired_nat(keys: Records, values: Records, now: int) -> NDArray[np.bool_]:
    """Translations live as long as the quiet connections they serve."""
    return _age(values["seen"], now) > _quiet(keys["proto"])


def expired_fragments(keys: Records, values: Records, now: int) -> NDArray[np.bool_]:
    """Fragments that the receiver gave up long ago."""
    return _age(values["seen"], now) > AGE_FRAGMENT


def sweep(dp: Datapath, slice_: int = 8192) -> Iterator[int]:
    """One pass over all tables; yields the number deleted after each slice."""
    tables: list[tuple[HashMap, Expired]] = [
        (dp.connections, expired_connections),
        (dp.half_open, expired_connections),
        (dp.nat, expired_nat),
        (dp.fragments, expired_fragments),
    ]
    for table, expired in tables:
        for keys, values in slices(table, slice_):
            now = int(time.clock_gettime(time.CLOCK_MONOTONIC))
            dead = expired(keys, values, now)
            yield table.delete_many(keys[dead]) if dead.any() else 0


def slices(table: HashMap, size: int) -> Iterator[tuple[Records, Records]]:
    """All elements of a hash, about `size` at a time."""
    cursor = np.zeros(max(table.key_dtype.itemsize, 8), np.uint8)
    following = np.zeros_like(cursor)
    first = True
    while True:
        keys = np.empty(size, table.key_dtype)
        values = np.empty(size, table.value_dtype)
        count, number = syscall.batch(
            syscall.BatchCommand.LOOKUP,
            table.fd,
            size,
            keys=keys.ctypes.data,
            values=values.ctypes.data,
            in_batch=0 if first else cursor.ctypes.data,
            out_batch=following.ctypes.data,
        )
        if number == errno.ENOSPC and not count:
            size *= 2  # one bucket holds more
            continue
        if number not in (0, errno.ENOENT, errno.ENOSPC):
            raise OSError(number, f"cannot read map {table.name}")
        yield keys[:count], values[:count]
        if number == errno.ENOENT:
            return
        cursor, following, first = following, cursor, False
