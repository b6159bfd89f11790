"""The firewall's maps, as the loaded object has them, and what sizes they get."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lockgate.bpf.maps import HashMap, MappedArray
from lockgate.bpf.object import Object
from lockgate.compile.firewall_layout import FILTER_BITS, SLOTS

__all__ = ["FirewallMaps", "sizes", "sizes_of"]

#: A slot has 24 bits for a number.
_LEAST, _MOST = 1 << 14, 1 << 24
RULES, PORT_SETS = 1 << 16, 64
#: Sources with a limit whose buckets are kept.
_SOURCES = 1 << 16


def sizes(entries: int) -> dict[str, int]:
    """Elements of each map for so many entries, twice: what replaces all needs room beside it."""
    return sizes_of(min(_MOST, max(_LEAST, 1 << (2 * entries).bit_length())))


def sizes_of(room: int) -> dict[str, int]:
    """The same, for `fw_entries` of that size, a power of two."""
    return {
        "fw_slots": SLOTS,
        "fw_slots_used": SLOTS // 64,
        "fw_bloom": room // 4,  # 16 bits for each of as many prefixes as are asked for
        "fw_filter6": 1 << FILTER_BITS,
        "fw_prefixes": room,
        "fw_entries": room,
        "fw_rules": RULES,
        "fw_ports": PORT_SETS,
        "fw_sources": _SOURCES,
        "fw_state": 1,
    }


@dataclass(frozen=True, slots=True)
class FirewallMaps:
    """Typed views; `close` lets go of them, what is pinned or used by a program stays."""

    slots: MappedArray
    used: MappedArray
    bloom: MappedArray
    filter6: MappedArray
    entries: MappedArray
    rules: MappedArray
    ports: MappedArray
    state: MappedArray
    prefixes: HashMap

    @classmethod
    def of(cls, obj: Object) -> FirewallMaps:
        """Those of a loaded object that was given `sizes`."""
        dtype = obj.schema.dtype
        return cls(
            MappedArray.of(obj, "fw_slots", np.dtype("<u4")),
            MappedArray.of(obj, "fw_slots_used", np.dtype("<u8")),
            MappedArray.of(obj, "fw_bloom", np.dtype("<u8")),
            MappedArray.of(obj, "fw_filter6", dtype("fw_filter")),
            MappedArray.of(obj, "fw_entries", dtype("fw_entry")),
            MappedArray.of(obj, "fw_rules", dtype("fw_rule")),
            MappedArray.of(obj, "fw_ports", dtype("fw_ports")),
            MappedArray.of(obj, "fw_state", dtype("fw_state")),
            HashMap.of(obj, "fw_prefixes", dtype("fw_key"), dtype("fw_prefix")),
        )

    def close(self) -> None:
        for name in self.__slots__:
            getattr(self, name).close()
