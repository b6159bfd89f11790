"""CIDR blocks: which blocks contain an address.

A *block* is an ipBlock: a network and what is taken out of it. All networks
that are named cut the address space into regions; addresses of one region are
in the same blocks. Both families go through the same code.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from lockgate.objects.address import parse_address, parse_cidr
from lockgate.objects.model import IPBlock

__all__ = ["Block", "Regions", "block_key", "network", "pack"]

#: (family 4 or 6, first address as a number, prefix length)
Network = tuple[int, int, int]


class Block(NamedTuple):
    """An ipBlock as a value."""

    network: Network
    without: tuple[Network, ...]


@lru_cache(maxsize=4096)
def pack(address: str) -> bytes:
    """The 16 bytes of an address as the kernel keeps it. ValueError if it is none."""
    return parse_address(address)


def network(cidr: str) -> Network:
    """Raises ValueError for what is no CIDR block; host bits are cleared."""
    first, length = parse_cidr(cidr)
    number = int.from_bytes(first, "big")
    return (6, number, length) if ":" in cidr else (4, number & 0xFFFF_FFFF, length - 96)


def _contains(outer: Network, inner: Network) -> bool:
    shift = (32 if outer[0] == 4 else 128) - outer[2]
    return outer[0] == inner[0] and outer[2] <= inner[2] and outer[1] >> shift == inner[1] >> shift


def block_key(block: IPBlock) -> Block | None:
    """The ipBlock as a value; None if nothing is left of it. ValueError for a bad network."""
    outer = network(block.cidr)
    without = tuple(sorted({network(e) for e in block.except_}))
    if any(_contains(e, outer) for e in without):
        return None
    return Block(outer, tuple(e for e in without if _contains(outer, e)))


class Regions:
    """The regions of one family: `networks` with the blocks that hold there."""

    def __init__(self, family: int, blocks: Iterable[tuple[int, Block]]) -> None:
        """`blocks` are (number, block); the numbers are what `at` answers."""
        self.bits = 32 if family == 4 else 128
        added: dict[tuple[int, int], set[int]] = {}
        removed: dict[tuple[int, int], set[int]] = {}
        for index, block in blocks:
            if block.network[0] == family:
                added.setdefault(block.network[1:], set()).add(index)
                for taken in block.without:
                    removed.setdefault(taken[1:], set()).add(index)
        #: (first address, prefix length) → numbers of the blocks that contain it
        self.networks: dict[tuple[int, int], frozenset[int]] = {}
        nowhere: frozenset[int] = frozenset()
        self._starts = [0]
        self._sets = [nowhere]
        stack: list[tuple[int, frozenset[int]]] = [(1 << self.bits, nowhere)]
        for network in sorted(added.keys() | removed.keys()):
            start, length = network
            while stack[-1][0] <= start:
                end = stack.pop()[0]
                self._mark(end, stack[-1][1])
            members = stack[-1][1]
            members = (members | added.get(network, nowhere)) - removed.get(network, nowhere)
            self.networks[network] = members
            self._mark(start, members)
            stack.append((start + (1 << (self.bits - length)), members))
        while len(stack) > 1:
            end = stack.pop()[0]
            self._mark(end, stack[-1][1])

    def _mark(self, start: int, members: frozenset[int]) -> None:
        if self._starts[-1] == start:
            self._sets[-1] = members
        else:
            self._starts.append(start)
            self._sets.append(members)

    def at(self, address: int) -> frozenset[int]:
        """Numbers of the blocks that contain the address (a number of this family)."""
        return self._sets[bisect_right(self._starts, address) - 1]
