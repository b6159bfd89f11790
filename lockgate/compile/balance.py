"""Which backend serves which client outside: the tables of slots, by rendezvous hashing.

Every owner has a score for every slot (Thaler and Ravishankar 1998, weighted as by Schindelhauer
and Schomaker 2005): the highest are the slot's owners, in that order (docs/services.md). A score
depends on slot, address, port and weight of the one owner and on nothing else. All arithmetic is of
integers: each node comes to the same table, whatever its processor's logarithm says.

A slot is OWNERS numbers of owners, the first in the lowest bits, each of as many bits as the count
of owners needs (`number_bits`): so a table is small where there are few, as mostly, and yet has as
many slots as any other. A flow's slot must not depend on how many owners there are.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from lockgate.compile.tables import OWNERS, Words
from lockgate.objects.model import SLOT_BITS

__all__ = [
    "Owner",
    "Table",
    "flow_hash",
    "number_bits",
    "numbers_of",
    "patch",
    "slot_bits",
    "table",
    "table_words",
    "tables",
]

_MULTIPLIER = 0x9E3779B97F4A7C15  # HASH_MULTIPLIER of bpf/balance.h
_MASK = 0xFFFF_FFFF_FFFF_FFFF
#: Elements that one pass works on: what fits a processor's cache.
_PASS = 1 << 14
#: So many owners have room in the low bits of a score of 32 bits.
_FEW = 16
#: What tells that a rank has no owner. Numbers are less, as there are at most 65,535.
_NONE = 0xFFFF

Numbers = NDArray[np.uint64]


class Owner(NamedTuple):
    """Address (16 bytes) and port of a backend; whether it ends, and its weight, a whole number
    from 1 to 100."""

    address: bytes
    port: int
    ends: bool = False
    weight: int = 100


class Table(NamedTuple):
    """Owners, how many bits of a flow's hash say its slot, and the words of the slots."""

    owners: Sequence[Owner]
    bits: int
    words: Words


def flow_hash(client: bytes, frontend: bytes, sport: int, dport: int, protocol: int) -> int:
    """What bpf/balance.h makes of a packet's tuple: addresses of 16 bytes, ports as numbers."""
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    wire = client + frontend + ports + bytes((protocol, 0, 0, 0))
    words = struct.unpack("<5Q", wire)

    def product(word: int) -> int:
        found = word * _MULTIPLIER & _MASK
        return found ^ found >> 32

    of_client = product(product(words[0]) ^ words[1])
    of_frontend = product(product(words[2]) ^ words[3])
    return (product(of_client ^ words[4]) ^ of_frontend) * _MULTIPLIER >> 32 & 0xFFFFFFFF


def slot_bits(owners: int, wanted: int = SLOT_BITS) -> int:
    """The table of so many owners has 1 << slot_bits slots: as many as its service wants, however
    many owners there are. One owner has them all."""
    return wanted if owners > 1 else 0


def number_bits(owners: int) -> int:
    """How long an owner's number is in a slot of that many. Where a rank has no owner it is all
    ones, which is no owner's number: from OWNERS on, every rank has one."""
    for bits in (2, 4, 8):
        if owners <= 1 << bits:
            return bits
    return 16


def table_words(bits: int, width: int) -> int:
    """How many words of the image a table of 1 << bits slots takes, with numbers that long."""
    return max(1, (OWNERS * width << bits) // 64)


def numbers_of(words: Words, bits: int, width: int) -> NDArray[np.intp]:
    """The owners of each slot: a row for each rank, all ones where there are no more."""
    slots = words.view(f"<u{OWNERS * width // 8}")[: 1 << bits]
    mask = (1 << width) - 1
    rows = np.stack([slots >> slots.dtype.type(width * rank) & mask for rank in range(OWNERS)])
    return rows.astype(np.intp)


def table(owners: Sequence[Owner], wanted: int = SLOT_BITS) -> Words:
    """The words of one table. At most 65,535 owners, each address and port once."""
    return tables([(owners, wanted)])[0]


def tables(many: Sequence[tuple[Sequence[Owner], int]]) -> list[Words]:
    """Those of many, each with the bits that it wants: those of one shape are worked out
    together."""
    found: list[Words] = [np.zeros(0, np.uint64)] * len(many)

    def shape(number: int) -> tuple[int, int, bool]:
        owners, wanted = many[number]
        return len(owners), slot_bits(len(owners), wanted), _weighted(owners)

    for (_, bits, _), group in groupby(sorted(range(len(many)), key=shape), shape):
        numbers = list(group)
        slots = np.arange(1 << bits, dtype=np.uint32)
        together = max(1, _PASS // len(slots))
        for first in range(0, len(numbers), together):
            part = numbers[first : first + together]
            owners = [many[number][0] for number in part]
            passes = [
                _slots(owners, slots[start : start + _PASS])
                for start in range(0, len(slots), _PASS)
            ]
            rows = np.concatenate(passes, axis=1) if len(passes) > 1 else passes[0]
            for number, row in zip(part, rows, strict=True):
                found[number] = _as_words(row)
    return found


def patch(before: Table, owners: Sequence[Owner], wanted: int = SLOT_BITS) -> Words:
    """`table(owners, wanted)`, by working out only the slots where it can differ from `before`: of
    N owners one that is another costs a pass over all slots and N scores for some of them."""
    bits = slot_bits(len(owners), wanted)
    all_end = all(owner.ends for owner in owners), all(owner.ends for owner in before.owners)
    if bits == 0 or bits != before.bits or all_end[0] != all_end[1]:
        return table(owners, wanted)
    places = {owner[:2]: number for number, owner in enumerate(owners)}
    now = np.array([places.get(owner[:2], _NONE) for owner in before.owners] + [_NONE], np.uint64)
    old = numbers_of(before.words, bits, number_bits(len(before.owners)))
    old = np.minimum(old, len(before.owners))
    kept = now[old]
    known = {owner[:2]: owner for owner in before.owners}
    differ = [owner for owner in owners if known.get(owner[:2]) != owner]
    # Those that went, or are others, where they were.
    due = ((kept == _NONE) & (old < len(before.owners))).any(axis=0)
    others = np.array([places[owner[:2]] for owner in differ], np.uint64)
    due |= np.isin(kept, others).any(axis=0)
    if len(differ) * 4 > len(owners) or due.sum() * 2 > len(due):
        return table(owners, wanted)
    # Those that are others, where they come before the last of the four, or there are fewer.
    slots = np.arange(1 << bits, dtype=np.uint32)
    weighted = _weighted(owners)
    low, high = (half[0] for half in _seeds([owners]))
    weights = _weights([owners])[0]
    last = np.full(len(slots), _MASK, np.uint64)
    for row in kept:
        there = np.minimum(row, np.uint64(len(owners) - 1)).astype(np.intp)
        hashes = _hashes(low[there], high[there], slots)
        scores = _scores(hashes, weights[there] if weighted else None, row)
        last = np.minimum(last, np.where(row == _NONE, np.uint64(0), scores))
    for number in others:
        hashes = _hashes(low[number], high[number], slots)
        due |= _scores(hashes, weights[number] if weighted else None, number) > last
    found = _join(
        list(np.minimum(kept, np.uint64((1 << number_bits(len(owners))) - 1))), len(owners)
    )
    at = np.flatnonzero(due)
    together = max(1, 8 * _PASS // len(owners))
    for start in range(0, len(at), together):
        part = at[start : start + together]
        found[part] = _few_slots(owners, slots[part])
    return _as_words(found)


# ---- Scores ----------------------------------------------------------------------


def _slots(many: Sequence[Sequence[Owner]], slots: NDArray[np.uint32]) -> NDArray[Any]:
    """These slots, a row for each of several lists of equally many owners."""
    low, high = _seeds(many)
    weights = _weights(many)
    ends = np.array([[owner.ends for owner in owners] for owners in many], bool)
    ends = ends.reshape(len(many), -1)
    count = low.shape[1]
    weighted = any(_weighted(owners) for owners in many)
    # Half as wide, and four times as fast, where it has room for the numbers.
    kind: type[np.unsignedinteger[Any]] = np.uint64
    if count <= _FEW and not weighted:
        kind = np.uint32
    shape = len(many), len(slots)
    # The best OWNERS of all, and the best of those that do not end, as scores with numbers.
    best: list[NDArray[Any]] = [np.zeros(shape, kind) for _ in range(OWNERS)]
    taking: NDArray[Any] = np.zeros(shape, kind)
    for number in range(count):
        hashes = _hashes(low[:, number, None], high[:, number, None], slots)
        if kind is np.uint32:
            score = hashes & np.uint32(_MASK - _FEW + 1 & 0xFFFFFFFF) | np.uint32(_FEW - 1 - number)
        else:
            weight = weights[:, number, None] if weighted else None
            score = _scores(hashes, weight, np.uint64(number))
        if ends.any():
            np.maximum(taking, np.where(ends[:, number, None], kind(0), score), out=taking)
        for rank in best[: number + 1]:
            lower = np.minimum(rank, score)
            np.maximum(rank, score, out=rank)
            score = lower
    if ends.any():
        best = _taking_first(best, taking)
    return _join([_number(rank) for rank in best], count)


def _few_slots(owners: Sequence[Owner], slots: NDArray[np.uint32]) -> NDArray[Any]:
    """The same for few slots and many owners: all scores at once."""
    low, high = (half[0] for half in _seeds([owners]))
    weight = _weights([owners])[0] if _weighted(owners) else None
    numbers = np.arange(len(owners), dtype=np.uint64)
    scores = _scores(_hashes(low, high, slots[:, None]), weight, numbers)
    ends = np.array([owner.ends for owner in owners])
    taking = np.where(ends, np.uint64(0), scores).max(axis=1)
    if len(owners) > OWNERS:
        scores = np.partition(scores, len(owners) - OWNERS, axis=1)[:, -OWNERS:]
    scores = np.sort(scores, axis=1)[:, ::-1]
    best = _taking_first([np.ascontiguousarray(row) for row in scores.T], taking)
    return _join([_number(rank) for rank in best], len(owners))


def _taking_first(best: list[NDArray[Any]], taking: NDArray[Any]) -> list[NDArray[Any]]:
    """The best that does not end comes first, if there is one; the others keep their order."""
    first = np.where(taking == 0, best[0], taking)
    rows, passed = [first], np.zeros(first.shape, bool)
    for rank, following in pairwise(best):
        passed |= rank == first
        rows.append(np.where(passed, following, rank))
    return rows


def _hashes(
    low: NDArray[np.uint32], high: NDArray[np.uint32], slots: NDArray[np.uint32]
) -> NDArray[np.uint32]:
    """Of a slot and an owner's seed, in the upper 28 bits, never 0; below them nothing of use."""
    found = slots * np.uint32(0x9E3779B1) + low
    found ^= found >> np.uint32(16)
    found *= np.uint32(0x85EBCA6B)
    found ^= high
    found ^= found >> np.uint32(13)
    found *= np.uint32(0xC2B2AE35)
    found ^= found >> np.uint32(16)
    found |= np.uint32(_FEW)
    return found


def _scores(
    hashes: NDArray[np.uint32], weight: Numbers | None, number: Numbers | np.uint64
) -> Numbers:
    """Score in the upper 48 bits, never 0, and below it what tells equal ones apart."""
    if weight is None:
        found = hashes.astype(np.uint64) >> np.uint64(4)
    else:
        found = np.uint64((1 << 48) - 1) - _logarithm(hashes | np.uint32(_FEW - 1)) // weight
    return found << np.uint64(16) | np.uint64(_NONE - 1) - number


def _number(scores: NDArray[Any]) -> NDArray[Any]:
    """Whose score it is."""
    kind = scores.dtype.type
    most, low = (_FEW - 1, _FEW - 1) if kind is np.uint32 else (_NONE - 1, _NONE)
    found: NDArray[Any] = kind(most) - (scores & kind(low))
    return found


def _seeds(
    many: Sequence[Sequence[Owner]],
) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Two numbers for each address and port."""
    wire = b"".join(
        owner.address + owner.port.to_bytes(8, "little") for owners in many for owner in owners
    )
    words = np.frombuffer(wire, "<u8").astype(np.uint64).reshape(len(many), -1, 3)
    found: Numbers = np.zeros(words.shape[:2], np.uint64)
    for at in range(3):
        found = (found ^ found >> np.uint64(32) ^ words[:, :, at]) * np.uint64(_MULTIPLIER)
    found ^= found >> np.uint64(32)
    return found.astype(np.uint32), (found >> np.uint64(32)).astype(np.uint32)


def _weights(many: Sequence[Sequence[Owner]]) -> Numbers:
    return np.array([[owner.weight for owner in owners] for owners in many], np.uint64)


def _weighted(owners: Sequence[Owner]) -> bool:
    """Where all weigh the same, the order is that of the hashes."""
    return any(owner.weight != owners[0].weight for owner in owners)


def _logarithms() -> Iterator[int]:
    """log2(1 + n/256) for n from 0 to 256, in units of 2^-40, by squaring."""
    for n in range(256):
        value, found = (256 + n) << 56, 0
        for _ in range(40):
            value = value * value >> 64
            found = found << 1 | value >> 65
            value >>= value >> 65
        yield found
    yield 1 << 40


_LOG2: Numbers = np.array(list(_logarithms()), np.uint64)


def _logarithm(hashes: NDArray[Any]) -> Numbers:
    """-log2((hash + 1) / 2^32) in units of 2^-40: at most 2^45, and for each hash another one.
    Straight between 257 points, which moves no share by more than some millionths."""
    value = hashes.astype(np.uint64) + np.uint64(1)
    # Exact up to 2^53: the exponent and the fraction, as whole numbers.
    raw = value.astype(np.float64).view(np.uint64)
    exponent = (raw >> np.uint64(52)) - np.uint64(1023)
    fraction = raw & np.uint64((1 << 52) - 1)
    point = (fraction >> np.uint64(44)).astype(np.intp)
    rest = fraction >> np.uint64(20) & np.uint64((1 << 24) - 1)
    low = _LOG2[point]
    low = low + ((_LOG2[point + 1] - low) * rest >> np.uint64(24))
    return (np.uint64(32) << np.uint64(40)) - ((exponent << np.uint64(40)) + low)


# ---- Slots of four numbers -------------------------------------------------------


def _join(ranks: Sequence[NDArray[Any]], owners: int) -> NDArray[Any]:
    """Numbers for each rank → slots, the first in the lowest bits."""
    kind, width = ranks[0].dtype.type, number_bits(owners)
    found = np.zeros_like(ranks[0])
    for rank, numbers in enumerate(ranks[:owners]):
        found |= numbers << kind(width * rank)
    if owners < OWNERS:
        found |= kind((1 << OWNERS * width) - (1 << owners * width))
    slots: NDArray[Any] = found.astype(f"<u{OWNERS * width // 8}")
    return slots


def _as_words(slots: NDArray[Any]) -> Words:
    """Slots of any width, one after the other; a single one has its word for itself."""
    if slots.nbytes < 8:
        slots = np.resize(slots, 8 // slots.itemsize)
    return np.ascontiguousarray(slots).view(np.uint64)
