"""What is in a table, as bits by hash, for XDP (bpf/bits.h): a bit that is not set says "no".

Bits are set before what they are for is in force. What went leaves its bit behind, until so many
did that all are made anew.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Bits", "address_hash", "frontend_hash"]

Keys = NDArray[np.uint8]
_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # HASH_MULTIPLIER of bpf/balance.h
_HALF = np.uint64(32)
#: Of the bits, how many may be newly set until they are made anew.
_SHARE = 8


def address_hash(keys: Keys) -> NDArray[np.uint64]:
    """may_be_peer(), of rows that begin with an address."""
    words = np.ascontiguousarray(keys[:, :16]).view("<u8")
    found: NDArray[np.uint64] = _mix(words[:, 0], words[:, 1])
    return found


def frontend_hash(keys: Keys) -> NDArray[np.uint64]:
    """may_be_frontend(), of `struct service_key`."""
    words = np.ascontiguousarray(keys[:, :16]).view("<u8")
    ends = np.ascontiguousarray(keys[:, 16:20]).view("<u2").astype(np.uint64)
    return _mix(words[:, 0], words[:, 1] ^ ends[:, 0] << np.uint64(8) ^ ends[:, 1])


def _mix(high: NDArray[Any], low: NDArray[Any]) -> NDArray[np.uint64]:
    x = high * _MULTIPLIER
    mixed: NDArray[np.uint64] = (x ^ x >> _HALF ^ low) * _MULTIPLIER
    return mixed


class Bits:
    """`words` are the map's memory; `number` gives the hash of a key, whose highest bits count."""

    def __init__(
        self, words: NDArray[np.uint64], number: Callable[[Keys], NDArray[np.uint64]]
    ) -> None:
        self._words, self._number = words, number
        self._shift = np.uint64(64 - (len(words) * 64 - 1).bit_length())
        self._added = 0
        self._most = len(words) * 64 // _SHARE

    @property
    def full(self) -> bool:
        """Is it time to make them anew?"""
        return self._added > self._most

    def add(self, keys: Keys) -> None:
        """Set the bits of these."""
        self._added += _set(self._words, self._places(keys))

    def renew(self, keys: Keys) -> None:
        """Only those of these, which are all that may be in force."""
        made = np.zeros_like(self._words)
        self._added = 0
        count = _set(made, self._places(keys))
        self._most = max(len(made) * 64 // _SHARE, count)
        self._words[:] = made

    def _places(self, keys: Keys) -> NDArray[np.uint64]:
        return self._number(keys) >> self._shift


def _set(words: NDArray[np.uint64], places: NDArray[np.uint64]) -> int:
    """How many were not set before."""
    at, bit = (places >> np.uint64(6)).astype(np.intp), np.uint64(1) << (places & np.uint64(63))
    fresh = (words[at] & bit) == 0
    np.bitwise_or.at(words, at[fresh], bit[fresh])
    return int(np.count_nonzero(fresh))
