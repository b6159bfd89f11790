"""Changing a few prefixes of the firewall: they are made anew, then the words that lead to them."""

from __future__ import annotations

import struct
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.firewall_entries import Entries
from lockgate.agent.firewall_keys import (
    Key,
    cut,
    filter_place,
    holds,
    is_v4_key,
    monotonic_of,
    packed,
)
from lockgate.bpf import syscall
from lockgate.compile.firewall_layout import LENGTHS, NUMBER, bloom_bits, filter_bit, slots_used

__all__ = ["Patch"]

U32 = NDArray[np.uint32]
#: `struct fw_entry`
_RECORD = struct.Struct("<3I2H16s4Q")


class Patch:
    """Some prefixes made anew, then the words that lead to them."""

    def __init__(self, tables: Entries, before: dict[Key, list[int]]) -> None:
        self._tables, self._before = tables, before
        self._heads: dict[Key, int] = {}  # 0: the prefix is no more
        self._outer: dict[Key, tuple[int, int]] = {}  # what was around and what will be
        self._new_lengths = sorted(
            {key[2] for key, numbers in before.items() if not numbers}, reverse=True
        )
        self._old: list[int] = []
        self._new: list[int] = []

    def rebuild(self, key: Key, stay: list[int], come: list[tuple[int, float]]) -> None:
        """Shorter prefixes come first. `stay`: entries that it had and keeps."""
        tables = self._tables
        rules = tables.rules.rules
        was = tables.around(key)
        outer = self._now_around(key, was)
        self._outer[key] = was, outer
        wanted = [
            (
                rules[int(tables.own_rule[n])].order,
                int(tables.own_rule[n]),
                float(tables.ends[n]),
                n,
            )
            for n in stay
        ]
        wanted += [(rules[rule].order, rule, expires, 0) for rule, expires in come]
        wanted.sort()
        numbers = tables.take(len(wanted)).tolist()
        hider = self._hider(outer)
        following = outer
        for number, (_, rule, expires, old) in zip(
            reversed(numbers), reversed(wanted), strict=True
        ):
            hidden = hider and rules[rule].source != "builtin"
            self._write(number, key, following, rule, hider if hidden else rule, expires, old)
            following = number
        self._heads[key] = numbers[0] if numbers else 0
        self._old += self._before[key]
        place = {old: number for number, (_, _, _, old) in zip(numbers, wanted, strict=True) if old}
        self._new += [place.get(old, 0) for old in self._before[key]]

    def lead(self) -> None:
        tables = self._tables
        moved = self._inner()
        hash_put, hash_gone, slots = self._words()
        if hash_put and tables.deleted:
            tables.reclaim()
        # The longest first: what an address in one of them finds until then is as it was.
        for key, number in sorted(hash_put, key=lambda one: -one[0][2]):
            self._mark(key)
            raw = number.to_bytes(4, "little") + bytes(4)
            syscall.map_update(tables.maps.prefixes.fd, packed(key), raw, syscall.BPF_F_LOCK)
        for first, words in slots:
            tables.maps.slots.view[first : first + len(words)] = words
            self._mark_slots(first, len(words))
        for (_, _, length), number in self._heads.items():
            if not length:
                tables.maps.state.view["root6"][0] = number
        following = tables.maps.entries.view["next"]
        for number, target in moved.items():
            tables.following[number] = target
            following[number] = target
        # The shortest first, likewise.
        for key in sorted(hash_gone, key=lambda one: one[2]):
            syscall.map_delete(tables.maps.prefixes.fd, packed(key), "fw_prefixes")
            tables.deleted = True
        tables.retire(np.array(self._old, np.uint32), np.array(self._new, np.uint32))

    # ---- Inside --------------------------------------------------------------------

    def _write(
        self,
        number: int,
        key: Key,
        following: int,
        rule: int,
        in_force: int,
        expires: float,
        old: int,
    ) -> None:
        tables = self._tables
        packets = bytes_ = 0
        if old:
            packets, bytes_ = tables.counters(np.array([old], np.uint32))[0].tolist()
            tables.rules.count[rule] -= 1
        tables.rules.count[rule] += 1
        tables.high[number], tables.low[number], tables.length[number] = key
        tables.following[number], tables.own_rule[number] = following, rule
        tables.ends[number], tables.live[number] = expires, True
        ends = int(monotonic_of(np.array([expires]))[0]) if expires else 0
        address = (key[0] << 64 | key[1]).to_bytes(16, "big")
        raw = _RECORD.pack(following, in_force, ends, key[2], rule, address, 0, 0, packets, bytes_)
        start = number * tables.record_size
        tables.memory[start : start + len(raw)] = raw

    def _now_around(self, key: Key, was: int) -> int:
        """The first entry of the longest prefix around, as it will be."""
        tables = self._tables
        found, length = 0, -1
        while was:
            outer = tables.key(was)
            now = self._heads.get(outer)
            if now is None or now:
                found, length = now or was, outer[2]
                break
            was = tables.beyond(was)
        for shorter in self._new_lengths:
            if length < shorter < key[2] and not (is_v4_key(key) and shorter < 96):
                outer = cut(key, shorter)
                number = self._heads.get(outer) if is_v4_key(outer) == is_v4_key(key) else None
                if number:
                    return number
        return found

    def _hider(self, outer: int) -> int:
        """The built-in rule that hides what is inside `outer`; 0 = none."""
        tables = self._tables
        if not outer:
            return 0
        in_force = int(tables.maps.entries.view["rule"][outer])
        return in_force if tables.rules.rules[in_force].source == "builtin" else 0

    def _inner(self) -> dict[int, int]:
        """Entries that lead out of prefixes inside ours, which are not made anew: to what."""
        tables = self._tables
        gone = set(self._old)
        moved: dict[int, int] = {}
        for key, number in self._heads.items():
            if not tables.may_have_inner(key):
                continue
            mine = self._before[key]
            was, outer = self._outer[key]
            leads = mine[0] if mine else was
            inner = tables.inner(key)
            inner = inner[tables.following[inner] == leads]
            for one in inner.tolist():
                if one not in gone:
                    moved[one] = number or outer
        return moved

    def _words(
        self,
    ) -> tuple[list[tuple[Key, int]], list[Key], list[tuple[int, U32]]]:
        """Elements of the hash to write and to delete; slots to write."""
        put: list[tuple[Key, int]] = []
        gone: list[Key] = []
        slots: dict[int, _Slots] = {}
        long4: dict[int, list[Key]] = {}
        for key, number in self._heads.items():  # the outer ones first
            _, low, length = key
            first = (low & 0xFFFFFFFF) >> 8
            if not is_v4_key(key):
                if number and length:
                    put.append((key, number))
                elif length and self._before[key]:
                    gone.append(key)
            elif length > 120:
                long4.setdefault(first, []).append(key)
            else:
                self._lead_short(key, number, self._slots(slots, first, 1 << (120 - length))[0])
        for first, keys in long4.items():
            words, at = self._slots(slots, first, 1)[0], first
            before = int(self._tables.maps.slots.view[at])
            if before >> LENGTHS:
                put += [(key, self._heads[key]) for key in keys if self._heads[key]]
                gone += [key for key in keys if not self._heads[key] and self._before[key]]
                bits = sum({_bit(key) for key in keys if self._heads[key]})
                words |= np.uint32(bits)
            else:
                put += self._lead_long(keys, before & NUMBER, words)
            self._slots(slots, first, 1)[1][:] = 0
        return put, gone, [(first, one.words()) for first, one in slots.items()]

    def _lead_short(self, key: Key, number: int, words: U32) -> None:
        led = words & NUMBER
        if self._before[key]:
            here = led == self._before[key][0]
            to = number or self._outer[key][1]
        else:
            here = self._tables.length[led] < key[2]
            to = number
        words[here] = words[here] & np.uint32(0xFF000000) | np.uint32(to)

    def _lead_long(self, keys: list[Key], tip: int, words: U32) -> list[tuple[Key, int]]:
        """A slot that leads to its longer prefixes by itself, as long as they lie in one another;
        else what is to be put into the hash."""
        tables = self._tables
        there: dict[Key, int] = {}
        while tip and tables.length[tip] > 120:
            there.setdefault(tables.key(tip), tip)
            tip = int(tables.following[tip])
        there |= {key: self._heads[key] for key in keys}
        left = sorted((key for key, number in there.items() if number), key=lambda one: one[2])
        if all(holds(outer, inner) for outer, inner in pairwise(left)):
            if left:
                words[0] = there[left[-1]]
            return []
        words |= np.uint32(sum({_bit(key) for key in left}))
        return [(key, there[key]) for key in left]

    def _slots(self, slots: dict[int, _Slots], first: int, count: int) -> tuple[U32, U32]:
        """Those slots to change, within some that are there already."""
        for start, one in slots.items():
            if start <= first and first + count <= start + len(one.short):
                break
        else:
            start, one = first, _Slots(self._tables, first, count)
            slots[first] = one
        part = slice(first - start, first - start + count)
        return one.short[part], one.tips[part]

    def _mark(self, key: Key) -> None:
        """In the filters, which must have it before it is there."""
        bloom = self._tables.maps.bloom.view
        high, low, length = (np.array([part], np.uint64) for part in key)
        at, bits = bloom_bits(high, low, length.astype(np.uint8), len(bloom))
        bloom[at[0]] |= bits[0]
        if not is_v4_key(key):
            self._mark6(key)

    def _mark_slots(self, first: int, count: int) -> None:
        """Which of them are used; those beside them are as they are."""
        maps = self._tables.maps
        if count == 1:
            if maps.slots.view[first]:
                maps.used.view[first >> 6] |= np.uint64(1 << (first & 63))
            return
        start, end = first & ~63, (first + count + 63) & ~63
        maps.used.view[start >> 6 : end >> 6] = slots_used(maps.slots.view[start:end])

    def _mark6(self, key: Key) -> None:
        maps = self._tables.maps
        word, bit = filter_bit(key[2])
        if key[2] < 32:
            maps.state.view["short6"][0] |= np.uint64(bit)
        else:
            maps.filter6.view["length"][filter_place(key[0]), word] |= np.uint64(bit)


class _Slots:
    """Words of slots: by their prefixes up to /24, and the longer ones that they lead to."""

    def __init__(self, tables: Entries, first: int, count: int) -> None:
        self.short = tables.maps.slots.view[first : first + count].copy()
        led = self.short & NUMBER
        long4 = tables.length[led] > 120
        self.tips = np.where(long4, led, 0).astype(np.uint32)
        while long4.any():
            led[long4] = tables.following[led[long4]]
            long4 = tables.length[led] > 120
        self.short = self.short & np.uint32(0xFF000000) | led

    def words(self) -> U32:
        return np.where(self.tips != 0, self.tips, self.short).astype(np.uint32)


def _bit(key: Key) -> int:
    return 1 << (LENGTHS + 128 - key[2])
