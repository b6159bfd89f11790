"""Which backend serves which client outside: the tables of slots, by rendezvous hashing.

Every owner has a score for every slot (Thaler and Ravishankar 1998, weighted as by Schindelhauer
and Schomaker 2005): the highest are the slot's owners, in that order (docs/services.md). A score
depends on slot, address, port and weight of the one owner and on nothing else. All arithmetic is of
integers: each node comes to the same table, whatever its processor's logarithm says.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lockgate.compile.tables import NO_OWNER, OWNERS, Words

__all__ = ["Owner", "Table", "flow_hash", "patch", "slot_bits", "table", "tables"]

_MULTIPLIER = 0x9E3779B97F4A7C15  # HASH_MULTIPLIER of bpf/balance.h
_MASK = 0xFFFF_FFFF_FFFF_FFFF
#: Elements that one pass works on: what fits a processor's cache.
_PASS = 1 << 13

Numbers = NDArray[np.uint64]


class Owner(NamedTuple):
    """Address (16 bytes) and port of a backend; whether it ends, and its weight, a whole number
    from 1 to 100."""

    address: bytes
    port: int
    ends: bool = False
    weight: int = 100


class Table(NamedTuple):
    """Owners, and a word for each slot: the numbers of its first OWNERS owners."""

    owners: Sequence[Owner]
    words: Words


def flow_hash(client: bytes, frontend: bytes, sport: int, dport: int, protocol: int) -> int:
    """What bpf/balance.h makes of a packet's tuple: addresses of 16 bytes, ports as numbers."""
    ports = sport.to_bytes(2, "big") + dport.to_bytes(2, "big")
    wire = client + frontend + ports + bytes((protocol, 0, 0, 0))
    found = 0
    for at in range(0, len(wire), 8):
        word = int.from_bytes(wire[at : at + 8], "little")
        found = (found ^ found >> 32 ^ word) * _MULTIPLIER & _MASK
    return found >> 32


def slot_bits(owners: int) -> int:
    """The table of so many owners has 1 << slot_bits slots. One owner has them all."""
    for most, bits in ((1, 0), (16, 9), (256, 14)):
        if owners <= most:
            return bits
    return 16


def table(owners: Sequence[Owner]) -> Words:
    """The words of one table. At most NO_OWNER owners, each address and port once."""
    return tables([owners])[0]


def tables(many: Sequence[Sequence[Owner]]) -> list[Words]:
    """Those of many: those with equally many owners are worked out together."""
    found: list[Words] = [np.zeros(0, np.uint64)] * len(many)

    def shape(number: int) -> tuple[int, bool]:
        return len(many[number]), _weighted(many[number])

    for (count, _), group in groupby(sorted(range(len(many)), key=shape), shape):
        numbers = list(group)
        slots = np.arange(1 << slot_bits(count), dtype=np.uint64)
        together = max(1, _PASS // len(slots))
        for first in range(0, len(numbers), together):
            part = numbers[first : first + together]
            for start in range(0, len(slots), _PASS):
                words = _words([many[number] for number in part], slots[start : start + _PASS])
                for number, row in zip(part, words, strict=True):
                    found[number] = np.concatenate((found[number], row)) if start else row
    return found


def patch(before: Table, owners: Sequence[Owner]) -> Words:
    """`table(owners)`, by working out only the slots where it can differ from `before`: of N
    owners one that is another costs a pass over all slots and N scores for some of them."""
    bits = slot_bits(len(owners))
    all_end = all(owner.ends for owner in owners), all(owner.ends for owner in before.owners)
    if bits == 0 or bits != slot_bits(len(before.owners)) or all_end[0] != all_end[1]:
        return table(owners)
    places = {owner[:2]: number for number, owner in enumerate(owners)}
    now = np.array(
        [places.get(owner[:2], NO_OWNER) for owner in before.owners] + [NO_OWNER], np.uint64
    )
    old = _split(before.words, len(before.owners))
    kept = now[old]
    known = {owner[:2]: owner for owner in before.owners}
    differ = [owner for owner in owners if known.get(owner[:2]) != owner]
    # Those that went, or are others, where they were.
    due = ((kept == NO_OWNER) & (old < len(before.owners))).any(axis=0)
    others = np.array([places[owner[:2]] for owner in differ], np.uint64)
    due |= np.isin(kept, others).any(axis=0)
    if len(differ) * 4 > len(owners) or due.sum() * 2 > len(due):
        return table(owners)
    # Those that are others, where they come before the last of the four, or there are fewer.
    slots = np.arange(len(before.words), dtype=np.uint64)
    weighted = _weighted(owners)
    seeds = _seeds([owners])[0]
    weights = _weights([owners])[0]
    last = np.full(len(slots), _MASK, np.uint64)
    for row in kept:
        there = np.minimum(row, np.uint64(len(owners) - 1)).astype(np.intp)
        scores = _scores(seeds[there], weights[there] if weighted else None, slots, row)
        last = np.minimum(last, np.where(row == NO_OWNER, np.uint64(0), scores))
    for number in others:
        weight = weights[number] if weighted else None
        due |= _scores(seeds[number], weight, slots, number) > last
    words = _join(kept)
    at = np.flatnonzero(due)
    together = max(1, 8 * _PASS // len(owners))
    for start in range(0, len(at), together):
        part = at[start : start + together]
        words[part] = _few(owners, slots[part])
    return words


# ---- Scores ----------------------------------------------------------------------


def _words(many: Sequence[Sequence[Owner]], slots: Numbers) -> Words:
    """The words of these slots, a row for each of several lists of equally many owners."""
    seeds, weights = _seeds(many), _weights(many)
    ends = np.array([[owner.ends for owner in owners] for owners in many], bool)
    ends = ends.reshape(len(many), -1)
    weighted = any(_weighted(owners) for owners in many)
    shape = len(many), len(slots)
    # The best OWNERS of all, and the best of those that do not end, as scores with numbers.
    best = [np.zeros(shape, np.uint64) for _ in range(OWNERS)]
    taking = np.zeros(shape, np.uint64)
    for number in range(seeds.shape[1]):
        weight = weights[:, number, None] if weighted else None
        score = _scores(seeds[:, number, None], weight, slots, np.uint64(number))
        if ends.any():
            np.maximum(taking, np.where(ends[:, number, None], np.uint64(0), score), out=taking)
        for rank in best:
            lower = np.minimum(rank, score)
            np.maximum(rank, score, out=rank)
            score = lower
    if ends.any():
        best = _taking_first(best, taking)
    return _join(np.stack([_number(rank) for rank in best]))


def _few(owners: Sequence[Owner], slots: Numbers) -> Words:
    """The same for few slots and many owners: all scores at once."""
    seeds, weights = _seeds([owners])[0], _weights([owners])[0]
    numbers = np.arange(len(owners), dtype=np.uint64)
    weight = weights if _weighted(owners) else None
    scores = _scores(seeds, weight, slots[:, None], numbers)
    ends = np.array([owner.ends for owner in owners])
    taking = np.where(ends, np.uint64(0), scores).max(axis=1)
    if len(owners) > OWNERS:
        scores = np.partition(scores, len(owners) - OWNERS, axis=1)[:, -OWNERS:]
    scores = np.sort(scores, axis=1)[:, ::-1]
    best = [np.ascontiguousarray(row) for row in scores.T]
    best += [np.zeros(len(slots), np.uint64)] * (OWNERS - len(best))
    return _join(np.stack([_number(rank) for rank in _taking_first(best, taking)]))


def _taking_first(best: list[Numbers], taking: Numbers) -> list[Numbers]:
    """The best that does not end comes first, if there is one; the others keep their order."""
    first = np.where(taking == 0, best[0], taking)
    rows, passed = [first], np.zeros(first.shape, bool)
    for rank, following in pairwise(best):
        passed |= rank == first
        rows.append(np.where(passed, following, rank))
    return rows


def _scores(
    seed: Numbers, weight: Numbers | None, slots: Numbers, number: Numbers | np.uint64
) -> Numbers:
    """Score in the upper 48 bits, never 0, and below it what tells equal ones apart."""
    found = seed + slots * np.uint64(_MULTIPLIER)
    for shift in (32, 29):
        found ^= found >> np.uint64(shift)
        found *= np.uint64(_MULTIPLIER)
    found >>= np.uint64(32)
    if weight is not None:
        found = np.uint64((1 << 48) - 1) - _logarithm(found) // weight
    else:
        found += np.uint64(1)
    return found << np.uint64(16) | np.uint64(NO_OWNER - 1) - number


def _number(scores: Numbers) -> Numbers:
    """Whose score it is."""
    low: Numbers = np.uint64(NO_OWNER - 1) - (scores & np.uint64(0xFFFF))
    low[scores == 0] = NO_OWNER
    return low


def _seeds(many: Sequence[Sequence[Owner]]) -> Numbers:
    """A number for each address and port."""
    wire = b"".join(
        owner.address + owner.port.to_bytes(8, "little") for owners in many for owner in owners
    )
    words = np.frombuffer(wire, "<u8").astype(np.uint64).reshape(len(many), -1, 3)
    found: Numbers = np.zeros(words.shape[:2], np.uint64)
    for at in range(3):
        found = (found ^ found >> np.uint64(32) ^ words[:, :, at]) * np.uint64(_MULTIPLIER)
    return found ^ found >> np.uint64(32)


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


def _logarithm(hashes: Numbers) -> Numbers:
    """-log2((hash + 1) / 2^32) in units of 2^-40: at most 2^45, and for each hash another one.
    Straight between 257 points, which moves no share by more than some millionths."""
    value = hashes + np.uint64(1)
    # Exact up to 2^53: the exponent and the fraction, as whole numbers.
    raw = value.astype(np.float64).view(np.uint64)
    exponent = (raw >> np.uint64(52)) - np.uint64(1023)
    fraction = raw & np.uint64((1 << 52) - 1)
    point = (fraction >> np.uint64(44)).astype(np.intp)
    rest = fraction >> np.uint64(20) & np.uint64((1 << 24) - 1)
    low = _LOG2[point]
    low = low + ((_LOG2[point + 1] - low) * rest >> np.uint64(24))
    return (np.uint64(32) << np.uint64(40)) - ((exponent << np.uint64(40)) + low)


# ---- Words of four numbers -------------------------------------------------------


def _join(numbers: Numbers) -> Words:
    """A row for each rank → words, the first in the lowest bits."""
    found: Words = numbers[0].copy()
    for rank in range(1, OWNERS):
        found |= numbers[rank] << np.uint64(16 * rank)
    return found


def _split(words: Words, none: int) -> NDArray[np.intp]:
    """A row for each rank; `none` where there are no more."""
    rows = np.stack([words >> np.uint64(16 * n) & np.uint64(0xFFFF) for n in range(OWNERS)])
    return np.where(rows == NO_OWNER, none, rows).astype(np.intp)
