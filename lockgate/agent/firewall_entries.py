"""The firewall's entries in the kernel: columns by number, and finding them as packets do.

There is no other copy of what there is. Numbers are given again, and elements of the hash replaced,
only after a grace period (docs/firewall.md, Each packet sees the old state or the new).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.firewall_keys import (
    Key,
    cut,
    filter_place,
    holds,
    is_v4_key,
    keys_of,
    packed,
)
from lockgate.agent.firewall_maps import FirewallMaps
from lockgate.agent.firewall_rules import FirewallFull, Rules
from lockgate.bpf import syscall
from lockgate.bpf.btf import Schema
from lockgate.bpf.grace import wait_grace
from lockgate.compile.firewall import Rule
from lockgate.compile.firewall_layout import LENGTHS, NUMBER
from lockgate.compile.prefixes import Prefixes, high_mask, is_v4, low_mask

__all__ = ["Entries"]

U32 = NDArray[np.uint32]
_ONES = 0xFFFF_FFFF_FFFF_FFFF
#: Numbers that are looked through one by one, as it were.
_MANY = 4096


class Entries:
    """Whoever has the maps is alone to change them, from one thread."""

    def __init__(
        self,
        maps: FirewallMaps,
        schema: Schema,
        reason: Callable[[Rule | None], int],
    ) -> None:
        """`reason`: the journal's id of a rule; None is the default."""
        self.maps = maps
        self.rules = Rules(maps, schema, reason)
        room = len(maps.entries)
        self.high = np.zeros(room, np.uint64)
        self.low = np.zeros(room, np.uint64)
        self.length = np.zeros(room, np.uint8)
        self.following = np.zeros(room, np.uint32)
        self.own_rule = np.zeros(room, np.int32)  # as it was asked for, hidden or not
        self.ends = np.zeros(room, np.float64)
        self.live = np.zeros(room, np.bool_)
        #: Numbers from here on were never used; those given back come first.
        self.fresh = 1
        self.free: list[int] = []
        #: Numbers that nothing leads to any more, what came in their places (0 = nothing), and
        #: their counters when it came.
        self.retired: list[tuple[U32, U32, NDArray[np.uint64]]] = []
        maps.state.view["bloom_mask"][0] = len(maps.bloom) - 1
        self.deleted = False  # elements of the hash, since the last grace period
        #: Numbers by prefix, as they were when that was known last, and those given out since.
        self._index = np.zeros(0, np.uint32)
        self._index_of = np.zeros(0, np.uint64), np.zeros(0, np.uint64)
        self._since: list[int] = []
        self.memory = maps.entries.view.view(np.uint8).reshape(-1).data
        self.record_size = maps.entries.view.dtype.itemsize

    def __len__(self) -> int:
        return int(self.live.sum())

    @property
    def room(self) -> int:
        """How many entries there may be."""
        return len(self.live) - 1

    # ---- What there is -------------------------------------------------------------

    def numbers_of(self, rule: Rule) -> U32:
        """The entries of a rule."""
        known = self.rules.numbers.get(rule)
        return self.places((self.own_rule == known) & self.live) if known else self.places(None)

    def prefixes(self, numbers: U32) -> Prefixes:
        return Prefixes(self.high[numbers], self.low[numbers], self.length[numbers])

    def expires(self, numbers: U32) -> NDArray[np.float64]:
        return self.ends[numbers]

    def rule_numbers(self, numbers: U32) -> NDArray[np.int32]:
        """Of the rule of each."""
        return self.own_rule[numbers]

    def all(self) -> U32:
        return self.places(self.live)

    def counters(self, numbers: U32) -> NDArray[np.uint64]:
        """Packets and bytes of each."""
        view = self.maps.entries.view
        return np.stack(
            (
                view["packets"][numbers] + view["packets_before"][numbers],
                view["bytes"][numbers] + view["bytes_before"][numbers],
            ),
            axis=1,
        )

    def find(self, prefixes: Prefixes, rule: Rule) -> U32:
        """The entries of a rule with these prefixes, of those that it has."""
        known = self.rules.numbers.get(rule)
        if known is None or not len(prefixes):
            return self.places(None)
        if len(prefixes) <= 64:
            found = []
            for key in keys_of(prefixes):
                found += [n for n in self.node(key) if self.own_rule[n] == known]
            return np.array(found, np.uint32)
        numbers = self.numbers_of(rule)
        mine = self.prefixes(numbers)
        both = Prefixes.joined((mine, prefixes))
        order = np.lexsort((np.arange(len(both)), both.length, both.low, both.high))
        first = both.take(order).first()
        twice = ~np.append(first[1:], True)
        return numbers[order[twice & (order < len(mine))]]

    # ---- Looking up ------------------------------------------------------------------

    def key(self, number: int) -> Key:
        return int(self.high[number]), int(self.low[number]), int(self.length[number])

    def node(self, key: Key) -> list[int]:
        """The entries of a prefix, in their order."""
        number = self.head(key)
        found = []
        while number and self.length[number] == key[2] and self.key(number) == key:
            found.append(number)
            number = int(self.following[number])
        return found

    def beyond(self, number: int) -> int:
        """The first entry of the prefix around that of `number`."""
        length = self.length[number]
        while number and self.length[number] == length:
            number = int(self.following[number])
        return number

    def head(self, key: Key) -> int:
        """The first entry of a prefix; 0 if there is none."""
        _, low, length = key
        if not is_v4_key(key):
            return self.look_up(key) if length else int(self.maps.state.view["root6"][0])
        word = int(self.maps.slots.view[(low & 0xFFFFFFFF) >> 8])
        if length > 120 and word >> LENGTHS:
            return self.look_up(key)
        number = word & NUMBER
        while number and self.length[number] > length:
            number = int(self.following[number])
        return number if number and self.key(number) == key else 0

    def around(self, key: Key) -> int:
        """The first entry of the longest prefix around; 0 if there is none."""
        high, low, length = key
        if is_v4_key(key):
            word = int(self.maps.slots.view[(low & 0xFFFFFFFF) >> 8])
            if word >> LENGTHS:
                for longer in range(length - 1, 120, -1):
                    number = self.look_up(cut(key, longer))
                    if number:
                        return number
            number = word & NUMBER
            while number and not holds(self.key(number), key):
                number = int(self.following[number])
            return number
        for shorter in self.lengths6(high):
            if 0 < shorter < length:
                number = self.look_up(cut(key, shorter))
                if number:
                    return number
        return int(self.maps.state.view["root6"][0]) if length else 0

    def lengths6(self, high: int) -> list[int]:
        """That may exist around or inside an IPv6 address, longest first."""
        words = self.maps.filter6.view["length"][filter_place(high)]
        first = int(words[0])
        second = int(words[1]) | int(self.maps.state.view["short6"][0])
        found = [128 - bit for bit in range(64) if first >> bit & 1] if first else []
        return found + [64 - bit for bit in range(64) if second >> bit & 1]

    def look_up(self, key: Key) -> int:
        raw = syscall.map_lookup(self.maps.prefixes.fd, packed(key), 8, "fw_prefixes")
        return int.from_bytes(raw[:4], "little") if raw else 0

    def may_have_inner(self, key: Key) -> bool:
        """Can there be longer prefixes inside?"""
        high, low, length = key
        if length == 128:
            return False
        if is_v4_key(key):
            first = (low & 0xFFFFFFFF) >> 8
            if length > 120:
                word = int(self.maps.slots.view[first])
                if word >> LENGTHS:
                    return bool(word >> LENGTHS & (1 << (128 - length)) - 1)
                return bool(self.length[word & NUMBER] > length)
            words = self.maps.slots.view[first : first + (1 << (120 - length))]
            return bool((words >> LENGTHS).any() or (self.length[words & NUMBER] > length).any())
        return length < 32 or any(inner > length for inner in self.lengths6(high))

    def inner(self, key: Key) -> U32:
        """The entries of all longer prefixes inside."""
        first = key[0], key[1]
        last = key[0] | ~int(high_mask[key[2]]) & _ONES, key[1] | ~int(low_mask[key[2]]) & _ONES
        high, low = self._index_of
        begin = int(np.searchsorted(high, np.uint64(first[0]), "left"))
        end = int(np.searchsorted(high, np.uint64(last[0]), "right"))
        if first[0] == last[0]:
            part = low[begin:end]
            end = begin + int(np.searchsorted(part, np.uint64(last[1]), "right"))
            begin += int(np.searchsorted(part, np.uint64(first[1]), "left"))
        found = np.concatenate((self._index[begin:end], np.array(self._since, np.uint32)))
        # Numbers may be other prefixes' by now.
        there = self.live[found] & (self.length[found] > key[2])
        there &= self.high[found] & high_mask[key[2]] == np.uint64(key[0])
        there &= self.low[found] & low_mask[key[2]] == np.uint64(key[1])
        found = np.unique(found[there])
        of_family: U32 = found[is_v4(self.prefixes(found)) == is_v4_key(key)]
        return of_family

    def sort(self, numbers: U32 | None = None) -> None:
        """Know all by prefix; `numbers`: all of them, in that order."""
        if numbers is None:
            all_ = self.all()
            numbers = all_[np.lexsort((self.low[all_], self.high[all_]))]
        self._index, self._since = numbers.copy(), []
        self._index_of = self.high[numbers], self.low[numbers]

    # ---- Numbers -------------------------------------------------------------------

    def make_room(self, count: int) -> None:
        left = len(self.free) + len(self.live) - self.fresh
        if left < count and self.retired:
            self.reclaim()
            left = len(self.free) + len(self.live) - self.fresh
        if left < count:
            raise FirewallFull(f"{count} entries do not fit: of {self.room} places {left} are free")

    def take(self, count: int) -> U32:
        """As many numbers, of which there are enough."""
        again = min(count, len(self.free))
        numbers = self.free[len(self.free) - again :]
        del self.free[len(self.free) - again :]
        numbers += range(self.fresh, self.fresh + count - again)
        self.fresh += count - again
        self._since += numbers
        return np.array(numbers, np.uint32)

    def retire(self, old: U32, new: U32) -> None:
        self.live[old] = False
        if len(old):
            # What is counted from now on follows when no program counts there any more.
            at = np.zeros((len(old), 2), np.uint64)
            kept = new != 0
            view = self.maps.entries.view
            at[kept, 0] = view["packets_before"][new[kept]]
            at[kept, 1] = view["bytes_before"][new[kept]]
            self.retired.append((old, new, at))

    def places(self, mask: NDArray[np.bool_] | None) -> U32:
        return (
            np.flatnonzero(mask).astype(np.uint32) if mask is not None else np.zeros(0, np.uint32)
        )

    def settle(self) -> None:
        """Wait until no packet sees what was replaced, and make it free for others."""
        if len(self._since) > _MANY:
            self.sort()
        if self.retired or self.deleted:
            self.reclaim()
            # Not in the middle of a change: rules without entries may be in force still.
            self.rules.tidy()

    def reclaim(self) -> None:
        """Wait until no packet sees the entries that were replaced, and make them free."""
        wait_grace()
        self.deleted = False
        view = self.maps.entries.view
        for old, new, at in self.retired:
            kept = new != 0
            late = self.counters(old)[kept] - at[kept]
            view["packets_before"][new[kept]] += late[:, 0]
            view["bytes_before"][new[kept]] += late[:, 1]
        for old, _, _ in self.retired:
            view[old] = np.zeros(1, view.dtype)[0]
            self.free += old.tolist()
        self.retired = []
