"""Many CIDR blocks as columns, and which lies in which. Pure, and vectorised: it may be a million.

An address is two numbers of 64 bits, IPv4 as ::ffff:a.b.c.d, and lengths are out of 128, as in the
kernel's tables. Families are apart: no block of IPv6 has one of IPv4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lockgate.objects.address import format_cidr
from lockgate.objects.blocks import pack_cidrs

__all__ = ["NONE", "Prefixes", "high_mask", "is_v4", "low_mask", "parents", "parse"]

U64 = NDArray[np.uint64]
U8 = NDArray[np.uint8]
Places = NDArray[np.int64]
#: No block around it.
NONE = -1
_V4 = np.uint64(0xFFFF)
_ONES = 0xFFFF_FFFF_FFFF_FFFF
#: By length: the bits of the network in each half.
high_mask = np.array([_ONES << max(0, 64 - n) & _ONES for n in range(129)], np.uint64)
low_mask = np.array([_ONES << min(64, 128 - n) & _ONES for n in range(129)], np.uint64)


@dataclass(frozen=True, slots=True)
class Prefixes:
    """Blocks as columns of one length, host bits cleared."""

    high: U64
    low: U64
    length: U8

    def __len__(self) -> int:
        return len(self.length)

    def take(self, places: NDArray[np.bool_] | Places) -> Prefixes:
        return Prefixes(self.high[places], self.low[places], self.length[places])

    def unique(self) -> Prefixes:
        """Each once, those around others before them."""
        order = np.lexsort((self.length, self.low, self.high))
        sorted_ = self.take(order)
        return sorted_.take(sorted_.first())

    def first(self) -> NDArray[np.bool_]:
        """Of a sorted column: where another block begins than before."""
        new = np.ones(len(self), np.bool_)
        new[1:] = (
            (self.high[1:] != self.high[:-1])
            | (self.low[1:] != self.low[:-1])
            | (self.length[1:] != self.length[:-1])
        )
        return new

    def text(self, place: int) -> str:
        address = int(self.high[place]) << 64 | int(self.low[place])
        return format_cidr(address.to_bytes(16, "big"), int(self.length[place]))

    def missing_in(self, other: Prefixes) -> Prefixes:
        """Those of ours that `other` has not; both `unique`."""
        both = Prefixes.joined((self, other))
        which = np.repeat([0, 1], (len(self), len(other)))
        order = np.lexsort((which, both.length, both.low, both.high))
        first = both.take(order).first()
        alone = first & np.append(first[1:], True)
        return both.take(np.sort(order[alone & (which[order] == 0)]))

    @classmethod
    def joined(cls, parts: Iterable[Prefixes]) -> Prefixes:
        all_ = list(parts) or [parse(())[0]]
        return cls(
            np.concatenate([one.high for one in all_]),
            np.concatenate([one.low for one in all_]),
            np.concatenate([one.length for one in all_]),
        )


def parse(texts: Iterable[str], *, bare: bool = False) -> tuple[Prefixes, list[int]]:
    """The blocks in the order of the texts, and the places of those that are none, which are left
    out. `bare` as `pack_cidrs`."""
    addresses, lengths, bad = pack_cidrs(texts, bare=bare)
    words = np.frombuffer(addresses, ">u8").astype(np.uint64).reshape(-1, 2)
    length = np.frombuffer(lengths, np.uint8)
    if bad:
        words, length = np.delete(words, bad, axis=0), np.delete(length, bad)
    return Prefixes(words[:, 0] & high_mask[length], words[:, 1] & low_mask[length], length), bad


def is_v4(of: Prefixes) -> NDArray[np.bool_]:
    """Which are of IPv4."""
    found: NDArray[np.bool_] = (of.high == 0) & (of.low >> np.uint64(32) == _V4)
    return found & (of.length >= 96)


def parents(of: Prefixes) -> Places:
    """The place of the longest other block around each, or NONE. `of` is sorted and `unique`."""
    found = np.full(len(of), NONE, np.int64)
    v4 = is_v4(of)
    for family in (v4, ~v4):
        places = np.flatnonzero(family)
        around = _parents(of.take(places))
        found[places] = np.where(around == NONE, NONE, places[around] if len(places) else NONE)
    return found


def _parents(of: Prefixes) -> Places:
    """The nearest one before each that reaches as far. All go back step by step at once, each as
    far as the one that it stands at has come: for n blocks log n steps."""
    last_high = of.high | ~high_mask[of.length]
    last_low = of.low | ~low_mask[of.length]
    at = np.arange(-1, len(of) - 1, dtype=np.int64)
    left = np.arange(1, len(of), dtype=np.int64)
    while len(left):
        other = at[left]
        around = (last_high[other] > of.high[left]) | (
            (last_high[other] == of.high[left]) & (last_low[other] >= of.low[left])
        )
        left = left[~around]
        at[left] = at[at[left]]
        left = left[at[left] != NONE]
    return at
