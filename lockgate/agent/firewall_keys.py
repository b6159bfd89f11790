"""Prefixes as the firewall's tables have them, one and many; and the two clocks."""

from __future__ import annotations

import struct
import time
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from lockgate.compile.firewall_layout import filter_index
from lockgate.compile.prefixes import Prefixes, high_mask, low_mask

__all__ = [
    "Key",
    "as_bytes",
    "cut",
    "filter_place",
    "holds",
    "is_v4_key",
    "key_records",
    "keys_of",
    "monotonic_of",
    "packed",
    "wall_of",
]

U32 = NDArray[np.uint32]
#: high, low, length.
Key = tuple[int, int, int]
_V4 = 0xFFFF
_KEY = struct.Struct("<16sI")


def is_v4_key(key: Key) -> bool:
    return key[0] == 0 and key[1] >> 32 == _V4 and key[2] >= 96


def cut(key: Key, length: int) -> Key:
    return key[0] & int(high_mask[length]), key[1] & int(low_mask[length]), length


def holds(outer: Key, inner: Key) -> bool:
    """Is the one within the other, and not the same? Of one family."""
    return outer[2] < inner[2] and cut(inner, outer[2]) == outer


def packed(key: Key) -> bytes:
    """As `struct fw_key`."""
    return _KEY.pack((key[0] << 64 | key[1]).to_bytes(16, "big"), key[2])


def keys_of(prefixes: Prefixes) -> Iterable[Key]:
    return zip(prefixes.high.tolist(), prefixes.low.tolist(), prefixes.length.tolist(), strict=True)


def key_records(prefixes: Prefixes, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    made = np.zeros(len(prefixes), dtype)
    made["addr"] = np.stack((prefixes.high, prefixes.low), axis=1).astype(">u8").view(np.uint8)
    made["length"] = prefixes.length
    return made


def as_bytes(keys: NDArray[np.void]) -> NDArray[np.void]:
    return np.ascontiguousarray(keys).view(f"V{keys.dtype.itemsize}").reshape(-1)


def filter_place(high: int) -> int:
    return int(filter_index(np.array([high], np.uint64))[0])


def monotonic_of(expires: NDArray[np.float64]) -> U32:
    """Seconds of the kernel's clock, rounded up; 0 stays 0. What is more than 136 years after the
    boot is that."""
    offset = time.time() - time.monotonic()
    seconds = np.clip(np.ceil(expires - offset), 1, 0xFFFF_FFFF)
    return np.where(expires > 0, seconds, 0).astype(np.uint32)


def wall_of(expires: U32) -> NDArray[np.float64]:
    offset = time.time() - time.monotonic()
    return np.where(expires > 0, expires + offset, 0.0)
