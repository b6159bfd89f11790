"""Do two views say the same, laid out otherwise?

Numbers of classes and places in the image depend on how tables came to be. Whoever looks something
up does not see them: only verdicts, reasons, endpoints, ways and backends. So all that a packet
could look up is looked up in both, many at a time, and compared.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.encode import Bytes, Table
from lockgate.compile.tables import (
    BACKEND_WORDS,
    CIDR_NEXT,
    CIDR_STRIDE,
    CIDR_STRIDE_SHIFT,
    CIDR_WORD,
    IMAGE_CIDRS,
    IMAGE_PORT_WORDS,
    IMAGE_PORTS,
    ISOLATED_EGRESS,
    ISOLATED_INGRESS,
    NO_CLASS,
    OWNERS,
    SVC_RANGES,
    Words,
)

__all__ = ["View", "alike"]

#: What one view calls something and what the other does, in a column each.
Pairs = NDArray[np.uint64]
_LOW = np.uint64(0xFFFF_FFFF)
_HALF = np.uint64(32)
#: Words that are compared at once: a table may have 65,536.
_TOGETHER = 1 << 18


@dataclass(frozen=True, slots=True)
class View:
    """All that packets find in one view. Tables are sorted by key; records are structs of
    bpf/types.h: `peer_view`, `service_view`, and by slot `endpoint_view`."""

    image: Words
    peers: tuple[Bytes, NDArray[Any]]
    services: tuple[Bytes, NDArray[Any]]
    backends: Table
    endpoints: NDArray[Any]


class _Different(Exception):
    """The two views say different things, or one points beyond its image."""


def alike(wanted: View, live: View) -> bool:
    """Is every look-up in `live` what it is in `wanted`? `wanted` is what a compiler made; what
    `live` holds may be anything at all. True is certain; False may be another trie's shape."""
    try:
        classes = [_peers(wanted, live), _own(wanted, live)]
        classes += _tries(wanted.image[IMAGE_CIDRS:], live.image[IMAGE_CIDRS:])
        _cells(wanted, live, _unique(classes), _ports(wanted.image, live.image))
        _services(wanted, live)
        _same(wanted.backends[0], live.backends[0])
        _same(wanted.backends[1], live.backends[1])
    except _Different:
        return False
    return True


# ---- Classes ---------------------------------------------------------------------


def _peers(wanted: View, live: View) -> Pairs:
    """What the classes of the peers are called; all else of them is the same."""
    (keys, mine), (other_keys, theirs) = wanted.peers, live.peers
    _same(keys, other_keys)
    _same_but(mine, theirs, "class")
    return _pairs(mine["class"], theirs["class"])


def _own(wanted: View, live: View) -> Pairs:
    """What local pods say of their own addresses."""
    found = []
    for name in ("class4", "class6"):
        mine, theirs = wanted.endpoints[name], live.endpoints[name]
        _same(mine == NO_CLASS, theirs == NO_CLASS)
        found.append(_pairs(mine[mine != NO_CLASS], theirs[mine != NO_CLASS]))
    return _unique(found)


def _tries(
    wanted: Words, live: Words, roots: tuple[int, int] = (IMAGE_CIDRS, IMAGE_CIDRS)
) -> list[Pairs]:
    """What the classes of all addresses are called, by tries with these roots. Both have one
    shape, which follows from the CIDR blocks. `wanted` and `live` begin at IMAGE_CIDRS."""
    mine, theirs = wanted.view("<u4"), live.view("<u4")
    found: list[Pairs] = []
    at, other = (2 * (root - IMAGE_CIDRS) for root in roots)
    ways = [_pairs(_part(mine, at, 2), _part(theirs, other, 2))]
    while ways:
        pairs = _unique([ways.pop()])
        further = pairs & np.uint64(CIDR_NEXT) != 0
        _same(further[:, 0], further[:, 1])
        found.append(pairs[~further[:, 0]])
        for way in pairs[further[:, 0]].tolist():
            ways.append(_below(mine, theirs, *way))
    return found


def _below(mine: NDArray[np.uint32], theirs: NDArray[np.uint32], one: int, other: int) -> Pairs:
    """The slots of two blocks of the trie that stand for the same addresses."""
    if one & CIDR_STRIDE != other & CIDR_STRIDE:
        raise _Different
    stride = (one & CIDR_STRIDE) >> CIDR_STRIDE_SHIFT
    count = 1 << stride if stride else 4
    a = _part(mine, 2 * (one & CIDR_WORD), count)
    b = _part(theirs, 2 * (other & CIDR_WORD), count)
    if not stride:  # two slots are the bits that are compared
        _same(a[:2], b[:2])
        a, b = a[2:], b[2:]
    return _pairs(a, b)


# ---- Ports, cells, services ------------------------------------------------------


def _ports(wanted: Words, live: Words) -> Pairs:
    """What the port classes are called; class 0 is also that of protocols without ports."""
    mine, theirs = (
        _part(image, IMAGE_PORTS, IMAGE_PORT_WORDS).view("<u2") for image in (wanted, live)
    )
    # There are few runs of ports, and np.unique would sort all of them.
    starts = np.flatnonzero((np.diff(mine) != 0) | (np.diff(theirs) != 0)) + 1
    starts = np.concatenate(([0], starts))
    return _unique([_pairs(mine[starts], theirs[starts]), np.zeros((1, 2), np.uint64)])


def _cells(wanted: View, live: View, classes: Pairs, ports: Pairs) -> None:
    """Every local pod's verdicts, of both directions, for all classes and ports."""
    mine, theirs = wanted.endpoints, live.endpoints
    _same_but(mine, theirs, "rows", "cols", "class4", "class6")
    columns = (mine["isolated"], mine["rows"], theirs["rows"], mine["cols"], theirs["cols"])
    sets = {key for key in zip(*(c.tolist() for c in columns), strict=True) if key[0]}
    for isolated, *starts in sets:
        rows = _words(wanted, live, classes + np.array(starts[:2], np.uint64))
        cols = _words(wanted, live, ports + np.array(starts[2:], np.uint64))
        for bit, shift in ((ISOLATED_INGRESS, np.uint64(0)), (ISOLATED_EGRESS, _HALF)):
            if isolated & bit:
                some, others = (_unique([words >> shift & _LOW]) for words in (rows, cols))
                cells = (some[:, None, :] + others[None, :, :]).reshape(-1, 2)
                found = _words(wanted, live, cells)
                _same(found[:, 0], found[:, 1])


def _services(wanted: View, live: View) -> None:
    (keys, mine), (other_keys, theirs) = wanted.services, live.services
    _same(keys, other_keys)
    _same_but(mine, theirs, "backends", "table", "owners", "ranges")
    # What a list has of words is now known to be what the wanted one has.
    shapes = np.stack([mine[n].astype(np.intp) for n in ("slot_bits", "number_bits")])
    slots = np.where(
        mine["owner_count"] > 0, np.maximum(1, (OWNERS * shapes[1] << shapes[0]) // 64), 0
    )
    for name, sizes in (
        ("backends", mine["count"].astype(np.intp) * BACKEND_WORDS),
        ("owners", mine["owner_count"].astype(np.intp) * BACKEND_WORDS),
        ("table", slots),
    ):
        _lists(wanted, live, _pairs(mine[name], theirs[name]), sizes)
    ranged = mine["flags"] & SVC_RANGES != 0
    places = _pairs(mine["ranges"][ranged], theirs["ranges"][ranged])
    for one, other in np.unique(places, axis=0).tolist():
        for pairs in _tries(wanted.image[IMAGE_CIDRS:], live.image[IMAGE_CIDRS:], (one, other)):
            _same(pairs[:, 0], pairs[:, 1])


def _lists(wanted: View, live: View, places: Pairs, sizes: NDArray[np.intp]) -> None:
    """Lists of these places and sizes, many of them shared, are word by word the same."""
    every = np.unique(np.column_stack((places, sizes.astype(np.uint64))), axis=0)
    sizes = every[:, 2].astype(np.intp)
    ends = np.cumsum(sizes)
    first = 0
    while first < len(every):
        # As many as fit, and at least one.
        last = max(first + 1, int(np.searchsorted(ends, ends[first] + _TOGETHER)))
        some = sizes[first:last]
        within = np.arange(some.sum()) - np.repeat(np.cumsum(some) - some, some)
        words = np.repeat(every[first:last, :2], some, axis=0) + within.astype(np.uint64)[:, None]
        found = _words(wanted, live, words)
        _same(found[:, 0], found[:, 1])
        first = last


# ---- Arrays ----------------------------------------------------------------------


def _words(wanted: View, live: View, places: Pairs) -> Pairs:
    """The words at these places of the two images."""
    found = np.empty_like(places)
    for column, image in enumerate((wanted.image, live.image)):
        if len(places) and int(places[:, column].max()) >= len(image):
            raise _Different
        found[:, column] = image[places[:, column]]
    return found


def _part(array: NDArray[Any], at: int, count: int) -> NDArray[Any]:
    if not 0 <= at <= at + count <= len(array):
        raise _Different
    return array[at : at + count]


def _pairs(one: NDArray[Any], other: NDArray[Any]) -> Pairs:
    return np.stack((one, other), axis=1).astype(np.uint64)


def _unique(pairs: Iterable[Pairs]) -> Pairs:
    """Each pair once. Both numbers are below 2^32."""
    every = np.concatenate(list(pairs))
    single = np.unique(every[:, 0] << _HALF | every[:, 1])
    return np.stack((single >> _HALF, single & _LOW), axis=1)


def _same_but(one: NDArray[Any], other: NDArray[Any], *layout: str) -> None:
    """All fields are the same, but those that say how it is laid out."""
    for name in one.dtype.names or ():
        if name not in layout:
            _same(one[name], other[name])


def _same(one: NDArray[Any], other: NDArray[Any]) -> None:
    if not np.array_equal(one, other):
        raise _Different
