"""Changing a few prefixes of the firewall: they are made anew, then the words that lead to them."""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.firewall_entries import Entries
from lockgate.agent.firewall_keys import (
    Key,
    cut,
    filter_place,
    is_v4_key,
    monotonic_of,
    packed,
)
from lockgate.bpf import syscall
from lockgate.compile.firewall_layout import LENGTHS, NUMBER, filter_bit
from lockgate.compile.prefixes import high_mask, is_v4, low_mask

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
            tables.settle()
        for key, number in hash_put:
            raw = number.to_bytes(4, "little") + bytes(4)
            syscall.map_update(tables.maps.prefixes.fd, packed(key), raw, syscall.BPF_F_LOCK)
            if not is_v4_key(key):
                self._mark6(key)
        for first, words in slots:
            tables.maps.slots.view[first : first + len(words)] = words
        for (_, _, length), number in self._heads.items():
            if not length:
                tables.maps.state.view["root6"][0] = number
        following = tables.maps.entries.view["next"]
        for number, target in moved.items():
            tables.following[number] = target
            following[number] = target
        for key in hash_gone:
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
        top = len(tables.live)
        gone = set(self._old)
        moved: dict[int, int] = {}
        for key, number in self._heads.items():
            if not tables.may_have_inner(key):
                continue
            mine = self._before[key]
            was, outer = self._outer[key]
            leads = mine[0] if mine else was
            inner = np.flatnonzero((tables.following[:top] == leads) & tables.live)
            if not mine:
                mask_high, mask_low = high_mask[key[2]], low_mask[key[2]]
                inside = (
                    (tables.high[inner] & mask_high == key[0])
                    & (tables.low[inner] & mask_low == key[1])
                    & (tables.length[inner] > key[2])
                )
                inner = inner[inside]
                inner = inner[is_v4(tables.prefixes(inner.astype(np.uint32))) == is_v4_key(key)]
            for one in inner.tolist():
                if one not in gone:
                    moved[one] = number or outer
        return moved

    def _words(
        self,
    ) -> tuple[list[tuple[Key, int]], list[Key], list[tuple[int, U32]]]:
        """Elements of the hash to write and to delete; slots to write."""
        tables = self._tables
        put: list[tuple[Key, int]] = []
        gone: list[Key] = []
        slots: dict[int, U32] = {}
        for key, number in self._heads.items():  # the outer ones first
            _, low, length = key
            v4 = is_v4_key(key)
            if not v4 or length > 120:
                if number and length:
                    put.append((key, number))
                elif length and self._before[key]:
                    gone.append(key)
                if v4 and number:
                    at = (low & 0xFFFFFFFF) >> 8
                    words = self._slots(slots, at, 1)
                    words |= np.uint32(1 << (LENGTHS + 128 - length))
                continue
            words = self._slots(slots, (low & 0xFFFFFFFF) >> 8, 1 << (120 - length))
            led = words & NUMBER
            if self._before[key]:
                here = led == self._before[key][0]
                to = number or self._outer[key][1]
            else:
                here = tables.length[led] < length
                to = number
            words[here] = words[here] & np.uint32(0xFF000000) | np.uint32(to)
        return put, gone, list(slots.items())

    def _slots(self, slots: dict[int, U32], first: int, count: int) -> U32:
        """A copy of those words to change, within one that is there already."""
        for start, words in slots.items():
            if start <= first and first + count <= start + len(words):
                return words[first - start : first - start + count]
        slots[first] = self._tables.maps.slots.view[first : first + count].copy()
        return slots[first]

    def _mark6(self, key: Key) -> None:
        maps = self._tables.maps
        word, bit = filter_bit(key[2])
        if key[2] < 32:
            maps.state.view["short6"][0] |= np.uint64(bit)
        else:
            maps.filter6.view["length"][filter_place(key[0]), word] |= np.uint64(bit)
