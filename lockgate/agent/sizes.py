"""How large the tables are that remember connections: as many elements as fit in a share of the
machine's memory. The kernel allocates all of them when a table is made."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Self

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import round_up
from lockgate.bpf.syscall import MapType

__all__ = ["SHARE", "Sizes", "table_bytes"]

#: Of the machine's memory, for all nodes that it is.
SHARE = 0.01
#: Bounds of `connections`, and what it is a multiple of.
_LEAST, _MOST, _STEP = 1 << 14, 1 << 21, 1 << 10
#: Sets of flows whose tags are one element: FLOW_TAG_SETS of bpf/types.h.
_TAG_SETS = 4
#: `struct htab_elem` up to its key, and `struct bucket` (kernel/bpf/hashtab.c).
_HEADER, _BUCKET = 48, 16


def table_bytes(entries: int, key: int, value: int) -> int:
    """Memory of an LRU hash: key and value begin at multiples of 8 in each element, and the number
    of buckets is a power of two (htab_map_alloc, htab_map_mem_usage)."""
    element = _HEADER + round_up(key, 8) + round_up(value, 8)
    return entries * element + _BUCKET * (1 << (entries - 1).bit_length())


def flow_tags(sets: int) -> int:
    """Elements of the map of tags for so many sets of flows."""
    return -(-sets // _TAG_SETS)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements of the maps that remember."""

    connections: int
    half_open: int
    nat: int
    sockets: int
    #: Sets of flows, a power of two.
    flows: int

    @classmethod
    def from_memory(cls, schema: Schema, share: float = SHARE, memory: int | None = None) -> Sizes:
        """The largest that take no more than `share` of `memory` in bytes (absent: the machine's)
        together, within bounds."""
        if memory is None:
            memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        low, high = _LEAST // _STEP, _MOST // _STEP
        while low < high:
            middle = (low + high + 1) // 2
            if cls._of(middle * _STEP).bytes(schema) <= memory * share:
                low = middle
            else:
                high = middle - 1
        return cls._of(low * _STEP)

    @classmethod
    def _of(cls, connections: int) -> Self:
        flows = 1 << ((connections // 8).bit_length() - 1)
        return cls(connections, connections // 8, connections // 4, connections // 4, flows)

    def by_map(self) -> dict[str, int]:
        return {
            "connections": self.connections,
            "half_open": self.half_open,
            "crowd": self.half_open,
            "nat": self.nat,
            "sockets": self.sockets,
            "flows": self.flows,
            "flow_tags": flow_tags(self.flows),
        }

    def bytes(self, schema: Schema) -> int:
        """Memory of all of them, with the keys and values of the object."""
        total = 0
        for name, entries in self.by_map().items():
            made = schema.map(name)
            assert made.key is not None and made.value is not None, name
            if made.type == MapType.ARRAY:
                total += entries * made.value.itemsize
            else:
                total += table_bytes(entries, made.key.itemsize, made.value.itemsize)
        return total
