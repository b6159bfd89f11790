"""How entries lie in the firewall's tables: which leads to which, and what an address begins with.

Pure, and vectorised. Numbers are the kernel's: 0 is the default. docs/firewall.md, How it works.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lockgate.compile.prefixes import NONE, Places, Prefixes, is_v4, parents

__all__ = [
    "FILTER_BITS",
    "LENGTHS",
    "NUMBER",
    "SLOTS",
    "Layout",
    "bloom_bits",
    "filter_bit",
    "filter_index",
    "lay_out",
    "slots_used",
]

U32 = NDArray[np.uint32]
SLOTS = 1 << 24
FILTER_BITS = 18
#: A slot: the number, and from this bit on the lengths beyond /24.
NUMBER, LENGTHS = 0xFFFFFF, 24
_GOLDEN = np.uint32(0x9E3779B1)


@dataclass(frozen=True, slots=True)
class Layout:
    """Of entries in the order `order`: their numbers, what comes next, and the place of the
    built-in entry that hides each (NONE). `heads`: the places of the first of each prefix."""

    order: Places
    numbers: U32
    next: U32
    hidden: Places
    heads: Places
    nodes: Prefixes
    #: Prefixes beyond /24 that a slot leads to by itself: all of its /24 lie in one another. `tips`
    #: are the places of the innermost ones.
    chained: NDArray[np.bool_]
    tips: Places

    @property
    def head_numbers(self) -> U32:
        return self.numbers[self.heads]

    def hashed(self) -> NDArray[np.bool_]:
        """Which prefixes are found in the hash: IPv4 beyond /24, but for `chained`; IPv6, but for
        ::/0."""
        long4 = (self.nodes.length > 120) & ~self.chained
        return np.where(is_v4(self.nodes), long4, self.nodes.length > 0)

    def slots(self) -> U32:
        """All of `fw_slots`."""
        made = np.zeros(SLOTS, np.uint32)
        v4, numbers = is_v4(self.nodes), self.head_numbers
        first = _slot(self.nodes)
        for length in range(96, 121):
            here = np.flatnonzero(v4 & (self.nodes.length == length))
            span = 1 << (120 - length)
            if span == 1:
                made[first[here]] = numbers[here]
            elif span >= 4096:
                for place in here:
                    made[first[place] : first[place] + span] = numbers[place]
            elif len(here):
                into = first[here][:, None] + np.arange(span)
                made[into] = numbers[here][:, None]
        for length in range(121, 129):
            here = v4 & (self.nodes.length == length) & ~self.chained
            made[first[here]] |= np.uint32(1 << (LENGTHS + 128 - length))
        made[first[self.tips]] = numbers[self.tips]
        return made

    def bloom(self, words: int) -> NDArray[np.uint64]:
        """`fw_bloom` of so many words, a power of two."""
        of = self.nodes.take(self.hashed())
        made = np.zeros(words, np.uint64)
        at, bits = bloom_bits(of.high, of.low, of.length, words)
        order = np.argsort(at, kind="stable")
        at, bits = at[order], bits[order]
        begins = np.flatnonzero(np.append(True, at[1:] != at[:-1])) if len(at) else at
        if len(at):
            made[at[begins]] = np.bitwise_or.reduceat(bits, begins)
        return made

    def filter6(self) -> tuple[NDArray[np.uint64], int]:
        """`fw_filter6` as rows of two words, and `fw_state.short6`."""
        made = np.zeros((1 << FILTER_BITS, 2), np.uint64)
        v6 = ~is_v4(self.nodes)
        short = 0
        for length in np.unique(self.nodes.length[v6]).tolist():
            word, bit = filter_bit(length)
            if 0 < length < 32:
                short |= bit
            elif length:
                at = filter_index(self.nodes.high[v6 & (self.nodes.length == length)])
                made[at, word] |= np.uint64(bit)
        return made, short

    def root6(self) -> int:
        """The number of ::/0."""
        at = np.flatnonzero(self.nodes.length == 0)
        return int(self.head_numbers[at[0]]) if len(at) else 0


def bloom_bits(
    high: NDArray[np.uint64], low: NDArray[np.uint64], length: NDArray[np.uint8], words: int
) -> tuple[Places, NDArray[np.uint64]]:
    """As fw_may_be_there() in bpf/firewall.h: of each prefix the word, and its bits there."""
    by, one = np.uint64(0x9E3779B97F4A7C15), np.uint64(1)
    x = high * by + low
    x = ((x ^ x >> np.uint64(29)) + length.astype(np.uint64)) * by
    x ^= x >> np.uint64(32)
    at = (x >> np.uint64(12) & np.uint64(words - 1)).astype(np.int64)
    six = np.uint64(63)
    return at, one << (x & six) | one << (x >> np.uint64(6) & six)


def slots_used(slots: U32) -> NDArray[np.uint64]:
    """`fw_slots_used` of those slots, of which there are a multiple of 64."""
    return np.packbits(slots != 0, bitorder="little").view("<u8")


def filter_bit(length: int) -> tuple[int, int]:
    """Which word and bit of a filter stand for a length."""
    return (0, 1 << (128 - length)) if length > 64 else (1, 1 << (64 - length))


def filter_index(high: NDArray[np.uint64]) -> NDArray[np.int64]:
    """As fw_filter_index() in bpf/firewall.h: of the first four bytes as they lie in memory."""
    first = (high >> np.uint64(32)).astype(np.uint32).byteswap()
    return (first * _GOLDEN >> np.uint32(32 - FILTER_BITS)).astype(np.int64)


def lay_out(
    prefixes: Prefixes,
    rank: NDArray[np.int64],
    builtin: NDArray[np.bool_],
    numbers: U32,
    apart: Places | None = None,
) -> Layout:
    """Entries are given by prefix, by the rank of their rule, and whether it is built in; `numbers`
    are for them in the order of the result. Of those with the same prefix the lowest rank is
    first; built-in ones are before all others. `apart`: slots whose longer prefixes are to be in
    the hash."""
    order = np.lexsort((rank, prefixes.length, prefixes.low, prefixes.high))
    sorted_ = prefixes.take(order)
    first = sorted_.first()
    heads = np.flatnonzero(first)
    node = np.cumsum(first) - 1
    nodes = sorted_.take(heads)
    around = parents(nodes)

    following = np.zeros(len(order), np.uint32)
    following[:-1] = numbers[1:]
    last = np.append(first[1:], True) if len(order) else first
    outer = around[node[last]]
    following[last] = np.where(outer == NONE, 0, numbers[heads[outer]] if len(heads) else 0)

    hides = builtin[order][heads] if len(heads) else np.zeros(0, np.bool_)
    hidden = around.copy()
    left = np.flatnonzero(hidden != NONE)
    left = left[~hides[hidden[left]]]
    while len(left):
        hidden[left] = hidden[hidden[left]]
        left = left[hidden[left] != NONE]
        left = left[~hides[hidden[left]]]
    hidden = np.where(hidden == NONE, NONE, heads[hidden] if len(heads) else NONE)[node]
    hidden[builtin[order]] = NONE
    chained, tips = _chains(nodes, around, apart)
    return Layout(order, numbers, following, hidden, heads, nodes, chained, tips)


def _slot(of: Prefixes) -> Places:
    """The first slot of a prefix of IPv4."""
    return (of.low & np.uint64(0xFFFFFFFF)).astype(np.int64) >> 8


def _chains(
    nodes: Prefixes, around: Places, apart: Places | None
) -> tuple[NDArray[np.bool_], Places]:
    """`chained` and `tips` of a Layout."""
    chained = np.zeros(len(nodes), np.bool_)
    long4 = np.flatnonzero(is_v4(nodes) & (nodes.length > 120))
    if not len(long4):
        return chained, long4
    slot = _slot(nodes)[long4]
    begins = np.append(True, slot[1:] != slot[:-1])
    group = np.cumsum(begins) - 1
    broken = ~begins & (around[long4] != long4 - 1)
    if apart is not None:
        broken |= np.isin(slot, apart)
    whole = np.bincount(group, weights=broken)[group] == 0
    chained[long4] = whole
    ends = np.append(begins[1:], True)
    return chained, long4[ends & whole]
