"""The CIDR trie that the kernel walks for what is no peer, as bpf/types.h has it.

A look-up costs reads, and each read may miss the cache: strides are as wide as memory
allows, and bits that all networks below have in common are compared at once.
"""

from __future__ import annotations

from array import array
from collections.abc import Collection, Mapping
from itertools import groupby

from lockgate.compile.tables import CIDR_NEXT, CIDR_STRIDE_SHIFT, CIDR_WORD

__all__ = ["trie"]

#: (first address, prefix length, class)
Leaf = tuple[int, int, int]

_WIDEST = 16
_SKIP = 56  # bits that are compared at once at most: beside them stands how many
#: What blocks may take: slots per network, or in all on each level, whichever is more.
_EACH = 256
_ALL = {4: 1 << 16, 6: 1 << 12}


def trie(
    leaves: Collection[tuple[int, int, int, int]], base: int = 0, most: Mapping[int, int] = _ALL
) -> bytes:
    """The trie as words of the image. `leaves` are (family, first address, prefix length, class),
    each network once. `base`: how many words behind IMAGE_CIDRS it will stand. `most`: slots that
    blocks may take in all on each level, by family.

    Leaves are pushed: what a slot says holds for all its addresses, so a look-up keeps nothing.
    OverflowError when it needs more words than a slot can point at.
    """
    slots = array("I", (0, 0))
    for root, (family, bits) in enumerate(((4, 32), (6, 128))):
        own = sorted(leaf[1:] for leaf in leaves if leaf[0] == family)
        room = max(_EACH, most[family] // max(1, len(own)))
        slots[root] = _Grower(slots, bits, room, base).grow(own, 0, 0)
    return slots.tobytes()


class _Grower:
    """Adds the trie of one family to `slots`."""

    def __init__(self, slots: array[int], bits: int, room: int, base: int) -> None:
        """`bits` of an address; `room`: slots that a block may take for each network in it."""
        self._base = base
        self._slots = slots
        self._bits = bits
        self._room = room

    def grow(self, leaves: list[Leaf], depth: int, cls: int) -> int:
        """The slot for the addresses that have their first `depth` bits in common; `leaves` are
        the networks in there, in order, and what is in none of them is of class `cls`."""
        if leaves and leaves[0][1] == depth:
            cls, leaves = leaves[0][2], leaves[1:]
        if not leaves:
            return cls
        deepest = max(length for _, length, _ in leaves) - depth
        stride = min(deepest, _WIDEST, (self._room * len(leaves)).bit_length() - 1)
        common = self._common(leaves) - depth
        # Reads: one for each block, two for each comparison.
        compared = 2 * _ceil(common, _SKIP) + _ceil(deepest - common, stride)
        if common and compared <= _ceil(deepest, stride):
            return self._compare(leaves, depth, min(common, _SKIP), cls)
        return self._branch(leaves, depth, stride, cls)

    def _common(self, leaves: list[Leaf]) -> int:
        """How many bits all networks have in common: those of the outermost, if there is one."""
        different = leaves[0][0] ^ leaves[-1][0]
        return min(self._bits - different.bit_length(), min(length for _, length, _ in leaves))

    def _compare(self, leaves: list[Leaf], depth: int, count: int, cls: int) -> int:
        at = self._reserve(4, 0)
        end = depth + count
        same = leaves[0][0] >> (self._bits - end) & (1 << count) - 1
        match = same << (64 - count) | count
        self._slots[at], self._slots[at + 1] = match & 0xFFFF_FFFF, match >> 32
        self._slots[at + 2] = self.grow(leaves, end, cls)
        self._slots[at + 3] = cls
        return CIDR_NEXT | self._base + at // 2

    def _branch(self, leaves: list[Leaf], depth: int, stride: int, cls: int) -> int:
        at = self._reserve(1 << stride, cls)
        end = depth + stride
        shift, mask = self._bits - end, (1 << stride) - 1
        # Outer networks come before those inside them, which take their part again.
        for first, length, inside in leaves:
            if length <= end:
                start, span = at + (first >> shift & mask), 1 << end - length
                self._slots[start : start + span] = array("I", [inside]) * span
        deeper = (leaf for leaf in leaves if leaf[1] > end)
        for number, group in groupby(deeper, lambda leaf: at + (leaf[0] >> shift & mask)):
            self._slots[number] = self.grow(list(group), end, self._slots[number])
        return CIDR_NEXT | stride << CIDR_STRIDE_SHIFT | self._base + at // 2

    def _reserve(self, count: int, cls: int) -> int:
        """The first of `count` new slots of this class."""
        at = len(self._slots)
        if self._base + at // 2 > CIDR_WORD:
            raise OverflowError("the CIDR blocks in force do not fit the image")
        self._slots.extend(array("I", [cls]) * count)
        return at


def _ceil(number: int, divisor: int) -> int:
    return -(-number // divisor)
