"""Taking expired entries out of the tables that the programs fill.

The programs forget by themselves only when a table is full (LRU). The sweep reads a table in
slices by batch look-ups, finds the expired ones as arrays, and deletes them; between slices it
lets others run. `sockets` has no times: it is left to its LRU.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.datapath import Datapath
from lockgate.bpf import syscall
from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import HashMap

__all__ = ["expired_connections", "expired_nat", "sweep", "timeouts"]

NEW, ESTABLISHED, CLOSING, CLOSED = 1, 2, 3, 4
ORIGIN_HI, NAT_ORIGIN, NAT_REPLY, FINS = 1, 4, 8, 16 | 32  # enum ct_flag
TCP, UDP, SCTP = 6, 17, 132

Records = NDArray[Any]
Timeouts = Mapping[str, int]
Expired = Callable[[Records, Records, int, Timeouts], NDArray[np.bool_]]


def timeouts(schema: Schema) -> Timeouts:
    """Seconds without a packet, by name: what the programs themselves go by."""
    found = schema.enum("timeout")
    return {name.removeprefix("TIMEOUT_").lower(): age for name, age in found.items()}


def _age(seen: NDArray[Any], now: int) -> NDArray[np.int32]:
    # A packet may have come after `now` was read. Signed, modulo 2^32, as the programs subtract.
    return (np.uint32(now) - seen).astype(np.int32)


def _quiet(proto: NDArray[Any], ages: Timeouts) -> NDArray[np.int64]:
    return np.where((proto == TCP) | (proto == SCTP), ages["established"], ages["datagram"])


def expired_connections(
    keys: Records, values: Records, now: int, ages: Timeouts
) -> NDArray[np.bool_]:
    """Which entries are past the age of their state; ct_timeout() in bpf/conntrack.h."""
    state = values["state"]
    aborted = (keys["proto"] == SCTP) & (values["flags"] & FINS != FINS)
    limit = np.select(
        [state == NEW, state == CLOSING, (state == CLOSED) & aborted, state == CLOSED],
        [ages["half_open"], ages["closing"], ages["half_open"], ages["closed"]],
        _quiet(keys["proto"], ages),
    )
    return _age(values["seen"], now) > limit


def expired_nat(keys: Records, values: Records, now: int, ages: Timeouts) -> NDArray[np.bool_]:
    """Translations whose connection went without the sweep: the LRU evicted it."""
    return _age(values["seen"], now) > _quiet(keys["proto"], ages)


def expired_fragments(
    keys: Records, values: Records, now: int, ages: Timeouts
) -> NDArray[np.bool_]:
    """Fragments that the receiver gave up long ago."""
    return _age(values["seen"], now) > ages["fragment"]


def sweep(dp: Datapath, slice_: int = 8192) -> Iterator[int]:
    """One pass over all tables; yields the number deleted after each slice."""
    ages = timeouts(dp.object.schema)
    tables: list[tuple[HashMap, Expired]] = [
        (dp.connections, expired_connections),
        (dp.half_open, expired_connections),
        (dp.crowd, expired_connections),
        (dp.nat, expired_nat),
        (dp.fragments, expired_fragments),
    ]
    for table, expired in tables:
        for keys, values in slices(table, slice_):
            now = int(time.clock_gettime(time.CLOCK_MONOTONIC))
            dead = expired(keys, values, now, ages)
            if not dead.any():
                yield 0
                continue
            count = table.delete_many(keys[dead])
            if expired is expired_connections:
                over = translations(dp.nat, keys[dead], values[dead])
                count += dp.nat.delete_many(over) if len(over) else 0
            yield count


def translations(nat: HashMap, keys: Records, values: Records) -> Records:
    """Keys in `nat`, both ways, of connections that are over: their ports are free at once."""
    flags = values["flags"]
    translated = flags & (NAT_ORIGIN | NAT_REPLY) != 0
    keys, flags = keys[translated], flags[translated]
    # A connection's key is a tuple from its lower to its higher end. What is translated by the
    # connection's own tuple: what its originator sends (masquerade), the reply (service), or both.
    rising = keys.view(nat.key_dtype)
    falling = reverse(rising)
    high = flags & ORIGIN_HI != 0
    origin, reply = flags & NAT_ORIGIN != 0, flags & NAT_REPLY != 0
    found = []
    for tuples in (
        rising[origin & ~high],
        falling[origin & high],
        rising[reply & high],
        falling[reply & ~high],
    ):
        for key in tuples:
            value = nat.get(key.tobytes())
            if value is not None:
                found += [key, reverse(value["to"])]
    return np.array(found, nat.key_dtype)


def reverse(tuples: Records) -> Records:
    """The other direction."""
    other = tuples.copy()
    other["saddr"], other["daddr"] = tuples["daddr"], tuples["saddr"]
    other["sport"], other["dport"] = tuples["dport"], tuples["sport"]
    return other


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
