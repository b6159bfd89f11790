"""The ranges of loadBalancerSourceRanges as tries in the image, each set of them once."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from lockgate.compile.cidr import network
from lockgate.compile.image import Image
from lockgate.compile.tables import IMAGE_CIDRS
from lockgate.compile.trie import trie

__all__ = ["Ranges", "Set", "read"]

#: (family, first address, prefix length)
Set = frozenset[tuple[int, int, int]]
#: Slots that a block of a trie may take on each level: there may be a trie for each service.
_MOST = {4: 256, 6: 256}


def read(texts: Iterable[str], tell: Callable[[str], None]) -> Set:
    """The ranges; what is none is told. All of a family means anybody: of the other family too,
    where that has no ranges of its own."""
    found = set()
    for text in texts:
        try:
            found.add(network(text.strip()))
        except ValueError as error:
            tell(str(error))
    for family in {4, 6} - {family for family, _, _ in found}:
        if any(length == 0 for _, _, length in found):
            found.add((family, 0, 0))
    return frozenset(found)


class Ranges:
    """Where each set is: `take` and `give_back` count who uses it."""

    def __init__(self, image: Image) -> None:
        self._image = image
        self._places: dict[Set, tuple[int, int]] = {}
        self._users: dict[Set, int] = {}

    def take(self, ranges: Set) -> int:
        """The word of the roots. OverflowError: the image is too long for it."""
        self._users[ranges] = self._users.get(ranges, 0) + 1
        known = self._places.get(ranges)
        if known is not None:
            return known[0]
        leaves = [(*one, 1) for one in ranges]
        size = len(trie(leaves, most=_MOST)) // 8
        at = self._image.place(size)
        self._places[ranges] = at, size
        self._image.write(at, trie(leaves, at - IMAGE_CIDRS, _MOST))
        return at

    def give_back(self, ranges: Set) -> None:
        self._users[ranges] -= 1
        if not self._users[ranges]:
            del self._users[ranges]
            self._image.give_back(*self._places.pop(ranges))

    def forget(self) -> None:
        """The image has none of them any more, and nobody one."""
        self._places, self._users = {}, {}
