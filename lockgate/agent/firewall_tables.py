"""The firewall's tables in the kernel: which entries there are, and changing them under traffic.

A packet reads, from the outside in, one word that leads to a chain of entries: of a slot, of an
element of the hash, `next` of an entry. A change writes entries that nothing leads to yet, then
these words; where one source would read two words that change, the entries between are made anew,
so that it reads one (docs/firewall.md, Each packet sees the old state or the new). Numbers, and
elements of the hash that went, are used again only after a grace period.

What there is, is known from columns by number; there is no other copy of it.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.firewall_maps import FirewallMaps
from lockgate.agent.firewall_rules import FirewallFull, Rules
from lockgate.bpf import syscall
from lockgate.bpf.btf import Schema
from lockgate.bpf.grace import wait_grace
from lockgate.compile.firewall import Rule
from lockgate.compile.firewall_layout import (
    LENGTHS,
    NUMBER,
    Layout,
    filter_bit,
    filter_index,
    lay_out,
)
from lockgate.compile.prefixes import NONE, Prefixes, high_mask, is_v4, low_mask

__all__ = ["Change", "FirewallFull", "FirewallTables"]

U32 = NDArray[np.uint32]
#: high, low, length.
Key = tuple[int, int, int]
#: Changed prefixes beyond which all is laid out anew: 20 µs each against a second for a million.
_FEW = 4096
_V4 = 0xFFFF
_RECORD = struct.Struct("<3I2H16s4Q")
_KEY = struct.Struct("<16sI")


class Change:
    """Entries that come and go, together. `added`: rule, prefixes, expiry (seconds since the
    epoch, 0 = never)."""

    def __init__(self) -> None:
        self.added: list[tuple[Rule, Prefixes, float]] = []
        self.removed: list[U32] = []

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


class FirewallTables:
    """Whoever has the maps is alone to change them, from one thread."""

    def __init__(
        self,
        maps: FirewallMaps,
        schema: Schema,
        reason: Callable[[Rule | None], int],
        candidates: Iterable[Rule] = (),
    ) -> None:
        """Takes over what is in the kernel; `candidates` are the rules that it may be of."""
        self.maps = maps
        self.rules = Rules(maps, schema, reason)
        room = len(maps.entries)
        self._high = np.zeros(room, np.uint64)
        self._low = np.zeros(room, np.uint64)
        self._length = np.zeros(room, np.uint8)
        self._next = np.zeros(room, np.uint32)
        self._rule = np.zeros(room, np.int32)  # as it was asked for, hidden or not
        self._expires = np.zeros(room, np.float64)
        self._live = np.zeros(room, np.bool_)
        #: Numbers from here on were never used; those given back come first.
        self._fresh = 1
        self._free: list[int] = []
        #: Numbers that nothing leads to any more, what came in their places (0 = nothing), and
        #: their counters when it came.
        self._retired: list[tuple[U32, U32, NDArray[np.uint64]]] = []
        self._deleted = False  # elements of the hash, since the last grace period
        self._memory = maps.entries.view.view(np.uint8).reshape(-1).data
        self._size = maps.entries.view.dtype.itemsize
        self._bare = np.zeros(1, maps.prefixes.value_dtype)
        self.next_expiry = 0.0
        self._take_over(candidates)

    def __len__(self) -> int:
        return int(self._live.sum())

    @property
    def room(self) -> int:
        """How many entries there may be."""
        return len(self._live) - 1

    # ---- What there is -------------------------------------------------------------

    def numbers_of(self, rule: Rule) -> U32:
        """The entries of a rule."""
        known = self.rules.numbers.get(rule)
        return self._numbers((self._rule == known) & self._live) if known else self._numbers(None)

    def prefixes(self, numbers: U32) -> Prefixes:
        return Prefixes(self._high[numbers], self._low[numbers], self._length[numbers])

    def expires(self, numbers: U32) -> NDArray[np.float64]:
        return self._expires[numbers]

    def rule_numbers(self, numbers: U32) -> NDArray[np.int32]:
        """Of the rule of each."""
        return self._rule[numbers]

    def all(self) -> U32:
        return self._numbers(self._live)

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
            return self._numbers(None)
        if len(prefixes) <= 64:
            found = []
            for key in _keys(prefixes):
                found += [n for n in self._node(key) if self._rule[n] == known]
            return np.array(found, np.uint32)
        numbers = self.numbers_of(rule)
        mine = self.prefixes(numbers)
        both = Prefixes.joined((mine, prefixes))
        order = np.lexsort((np.arange(len(both)), both.length, both.low, both.high))
        first = both.take(order).first()
        twice = ~np.append(first[1:], True)
        return numbers[order[twice & (order < len(mine))]]

    # ---- Changes -------------------------------------------------------------------

    def apply(self, change: Change) -> None:
        """Bring it in force. FirewallFull, and nothing is changed, if there is no room. What is
        there already of what comes gets its expiry, and is no other entry."""
        added = [(rule, self._without_known(rule, new, at), at) for rule, new, at in change.added]
        removed = np.unique(np.concatenate([self._numbers(None), *change.removed]))
        count = len(removed) + sum(len(new) for _, new, _ in added)
        if not count:
            return
        known = [(self.rules.number(rule), new, at) for rule, new, at in added if len(new)]
        if count > _FEW or self._hides_others(removed, known):
            self._replace(removed, known)
        else:
            self._patch(removed, known)
        for _, _, expires in change.added:
            self._expect(expires)

    def expire(self, now: float) -> int:
        """Take out what has expired; how many."""
        if not 0 < self.next_expiry <= now:
            return 0
        over = self._numbers(self._live & (self._expires > 0) & (self._expires <= now))
        change = Change()
        change.removed.append(over)
        self.apply(change)
        self.next_expiry = self._first_expiry()
        return len(over)

    def set_clock(self) -> None:
        """The time of day was set: lifetimes end by it."""
        numbers = self._numbers(self._live & (self._expires > 0))
        self.maps.entries.view["expires"][numbers] = _monotonic(self._expires[numbers])

    def settle(self) -> None:
        """Wait until no packet sees what was replaced, and make it free for others."""
        if not self._retired and not self._deleted:
            return
        wait_grace()
        self._deleted = False
        view = self.maps.entries.view
        for old, new, at in self._retired:
            kept = new != 0
            late = self.counters(old)[kept] - at[kept]
            view["packets_before"][new[kept]] += late[:, 0]
            view["bytes_before"][new[kept]] += late[:, 1]
        for old, _, _ in self._retired:
            view[old] = np.zeros(1, view.dtype)[0]
            self._free += old.tolist()
        self._retired = []
        self.rules.tidy()

    # ---- Everything at once ----------------------------------------------------------

    def _replace(self, removed: U32, added: Sequence[tuple[int, Prefixes, float]]) -> None:
        """Lay all out anew, beside what is in force, and lead to it."""
        stay = self._live.copy()
        stay[removed] = False
        old = self._numbers(stay)
        parts = [self.prefixes(old), *(new for _, new, _ in added)]
        prefixes = Prefixes.joined(parts)
        sizes = [len(new) for _, new, _ in added]
        rule = np.concatenate(
            (self._rule[old], np.repeat(np.array([r for r, _, _ in added], np.int32), sizes))
        )
        expires = np.concatenate(
            (self._expires[old], np.repeat(np.array([e for _, _, e in added], np.float64), sizes))
        )
        self._make_room(len(prefixes))
        # After _make_room(), which may have counted up what is kept.
        totals = np.zeros((len(prefixes), 2), np.uint64)
        totals[: len(old)] = self.counters(old)
        order, numbers = self._lay(prefixes, rule, expires, totals)
        kept = order < len(old)
        self._retire(old[order[kept]], numbers[kept])
        self._retire(removed, np.zeros(len(removed), np.uint32))

    def _lay(
        self,
        prefixes: Prefixes,
        rule: NDArray[np.int32],
        expires: NDArray[np.float64],
        totals: NDArray[np.uint64],
    ) -> tuple[NDArray[np.int64], U32]:
        """These entries and no others, with what they have counted; in which order they are, and
        their numbers. There is room."""
        rank, builtin = self._ranks()
        numbers = self._take(len(prefixes))
        layout = lay_out(prefixes, rank[rule], builtin[rule], numbers)
        order = layout.order
        self._write(layout, prefixes.take(order), rule[order], expires[order], totals[order])
        self._live[:] = False
        self._live[numbers] = True
        self.rules.count[:] = np.bincount(rule, minlength=len(self.rules.count))
        self._lead_to(layout)
        return order, numbers

    def copy(self, other: FirewallTables) -> tuple[U32, U32]:
        """All of other tables into these, which are empty; its numbers and ours of the same
        entries. FirewallFull."""
        theirs = other.all()
        number = np.zeros(len(other.rules.count), np.int32)
        for rule, old in other.rules.numbers.items():
            if other.rules.count[old]:
                number[old] = self.rules.number(rule)
        self._make_room(len(theirs))
        order, mine = self._lay(
            other.prefixes(theirs),
            number[other._rule[theirs]],
            other._expires[theirs],
            other.counters(theirs),
        )
        self.next_expiry = other.next_expiry
        return theirs[order], mine

    def count_up(self, numbers: U32, late: NDArray[np.uint64]) -> None:
        """Add what was counted elsewhere, to those that there still are."""
        live = self._live[numbers]
        view = self.maps.entries.view
        view["packets_before"][numbers[live]] += late[live, 0]
        view["bytes_before"][numbers[live]] += late[live, 1]

    def _write(
        self,
        layout: Layout,
        prefixes: Prefixes,
        rule: NDArray[np.int32],
        expires: NDArray[np.float64],
        totals: NDArray[np.uint64],
    ) -> None:
        """Records of entries that nothing leads to yet."""
        numbers = layout.numbers
        columns = (
            (self._high, prefixes.high),
            (self._low, prefixes.low),
            (self._length, prefixes.length),
            (self._next, layout.next),
            (self._rule, rule),
            (self._expires, expires),
        )
        for column, values in columns:
            column[numbers] = values
        in_force = rule.copy()
        hidden = layout.hidden != NONE
        in_force[hidden] = rule[layout.hidden[hidden]]
        records = np.zeros(len(numbers), self.maps.entries.view.dtype)
        records["next"], records["rule"], records["length"] = layout.next, in_force, prefixes.length
        records["own_rule"], records["expires"] = rule, _monotonic(expires)
        records["addr"] = (
            np.stack((prefixes.high, prefixes.low), axis=1).astype(">u8").view(np.uint8)
        )
        records["packets_before"], records["bytes_before"] = totals[:, 0], totals[:, 1]
        self.maps.entries.view[numbers] = records

    def _lead_to(self, layout: Layout) -> None:
        """From all addresses. Longer prefixes are there before a slot says so, and go after."""
        maps = self.maps
        hashed = layout.hashed()
        keys = _key_records(layout.nodes.take(hashed), maps.prefixes.key_dtype)
        values = np.zeros(len(keys), maps.prefixes.value_dtype)
        values["number"] = layout.head_numbers[hashed]
        before = maps.prefixes.keys()
        if self._deleted and len(keys):
            self.settle()
        if len(keys):
            maps.prefixes.update_many(keys, values, syscall.BPF_F_LOCK)
        bits, short6 = layout.filter6()
        filters = maps.filter6.view["length"]
        filters |= bits
        state = maps.state.view
        state["short6"][0] |= np.uint64(short6)
        state["root6"][0] = layout.root6()
        maps.slots.view[:] = layout.slots()
        over = before[~np.isin(_as_bytes(before), _as_bytes(keys))]
        if len(over):
            maps.prefixes.delete_many(over)
            self._deleted = True
        filters[:] = bits
        state["short6"][0] = short6

    # ---- A few ---------------------------------------------------------------------

    def _patch(self, removed: U32, added: Sequence[tuple[int, Prefixes, float]]) -> None:
        gone = set(removed.tolist())
        nodes: dict[Key, list[tuple[int, float]]] = {self._key(n): [] for n in gone}
        for rule, new, expires in added:
            for key in _keys(new):
                nodes.setdefault(key, []).append((rule, expires))
        before = {key: self._node(key) for key in nodes}
        if len(nodes) > 1:
            self._add_between(nodes, before)
        ordered = sorted(nodes, key=lambda key: key[2])
        total = sum(len(before[key]) + len(nodes[key]) for key in ordered)
        self._make_room(total)
        for number in gone:
            self.rules.count[self._rule[number]] -= 1
        patch = _Patch(self, before)
        for key in ordered:
            patch.rebuild(key, [n for n in before[key] if n not in gone], nodes[key])
        patch.lead()

    def _add_between(
        self, nodes: dict[Key, list[tuple[int, float]]], before: dict[Key, list[int]]
    ) -> None:
        """Prefixes between two that change: an address in the inner one would read two words."""
        for key in list(nodes):
            chain = self._around(key)
            path: list[tuple[Key, int]] = []
            while chain:
                outer = self._key(chain)
                path.append((outer, chain))
                chain = self._beyond(chain)
            changed = [at for at, (outer, _) in enumerate(path) if outer in nodes]
            for outer, _ in path[: changed[-1]] if changed else ():
                if outer not in nodes:
                    nodes[outer] = []
                    before[outer] = self._node(outer)

    # ---- Looking up ------------------------------------------------------------------

    def _key(self, number: int) -> Key:
        return int(self._high[number]), int(self._low[number]), int(self._length[number])

    def _node(self, key: Key) -> list[int]:
        """The entries of a prefix, in their order."""
        number = self._head(key)
        found = []
        while number and self._length[number] == key[2] and self._key(number) == key:
            found.append(number)
            number = int(self._next[number])
        return found

    def _beyond(self, number: int) -> int:
        """The first entry of the prefix around that of `number`."""
        length = self._length[number]
        while number and self._length[number] == length:
            number = int(self._next[number])
        return number

    def _head(self, key: Key) -> int:
        """The first entry of a prefix; 0 if there is none."""
        high, low, length = key
        if is_v4_key(key):
            if length > 120:
                return self._look_up(key)
            number = int(self.maps.slots.view[(low & 0xFFFFFFFF) >> 8]) & NUMBER
            while number and self._length[number] > length:
                number = int(self._next[number])
            return number if number and self._length[number] == length else 0
        return self._look_up(key) if length else int(self.maps.state.view["root6"][0])

    def _around(self, key: Key) -> int:
        """The first entry of the longest prefix around; 0 if there is none."""
        high, low, length = key
        if is_v4_key(key):
            word = int(self.maps.slots.view[(low & 0xFFFFFFFF) >> 8])
            for longer in range(length - 1, 120, -1):
                if word >> (LENGTHS + 128 - longer) & 1:
                    number = self._look_up(cut(key, longer))
                    if number:
                        return number
            number = word & NUMBER
            while number and self._length[number] >= length:
                number = int(self._next[number])
            return number
        for shorter in self._lengths6(high):
            if 0 < shorter < length:
                number = self._look_up(cut(key, shorter))
                if number:
                    return number
        return int(self.maps.state.view["root6"][0]) if length else 0

    def _lengths6(self, high: int) -> list[int]:
        """That may exist around or inside an IPv6 address, longest first."""
        words = self.maps.filter6.view["length"][_filter_place(high)]
        first = int(words[0])
        second = int(words[1]) | int(self.maps.state.view["short6"][0])
        found = [128 - bit for bit in range(64) if first >> bit & 1] if first else []
        return found + [64 - bit for bit in range(64) if second >> bit & 1]

    def _look_up(self, key: Key) -> int:
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
                return bool(int(self.maps.slots.view[first]) >> LENGTHS & (1 << (128 - length)) - 1)
            words = self.maps.slots.view[first : first + (1 << (120 - length))]
            return bool((words >> LENGTHS).any() or (self._length[words & NUMBER] > length).any())
        return length < 32 or any(inner > length for inner in self._lengths6(high))

    # ---- Numbers -------------------------------------------------------------------

    def _make_room(self, count: int) -> None:
        left = len(self._free) + len(self._live) - self._fresh
        if left < count and self._retired:
            self.settle()
            left = len(self._free) + len(self._live) - self._fresh
        if left < count:
            raise FirewallFull(f"{count} entries do not fit: of {self.room} places {left} are free")

    def _take(self, count: int) -> U32:
        """As many numbers, of which there are enough."""
        again = min(count, len(self._free))
        numbers = self._free[len(self._free) - again :]
        del self._free[len(self._free) - again :]
        numbers += range(self._fresh, self._fresh + count - again)
        self._fresh += count - again
        return np.array(numbers, np.uint32)

    def _retire(self, old: U32, new: U32) -> None:
        self._live[old] = False
        if len(old):
            # What is counted from now on follows when no program counts there any more.
            at = np.zeros((len(old), 2), np.uint64)
            kept = new != 0
            view = self.maps.entries.view
            at[kept, 0] = view["packets_before"][new[kept]]
            at[kept, 1] = view["bytes_before"][new[kept]]
            self._retired.append((old, new, at))

    def _numbers(self, mask: NDArray[np.bool_] | None) -> U32:
        return (
            np.flatnonzero(mask).astype(np.uint32) if mask is not None else np.zeros(0, np.uint32)
        )

    def _expect(self, expires: float) -> None:
        if expires and not 0 < self.next_expiry <= expires:
            self.next_expiry = expires

    def _first_expiry(self) -> float:
        timed = self._expires[self._live & (self._expires > 0)]
        return float(timed.min()) if len(timed) else 0.0

    def _ranks(self) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
        """By number of rule: its place among all, and whether it is built in."""
        rank = np.zeros(len(self.rules.count), np.int64)
        builtin = np.zeros(len(self.rules.count), np.bool_)
        ordered = sorted(self.rules.rules, key=lambda n: self.rules.rules[n].order)
        for place, number in enumerate(ordered):
            rank[number] = place
            builtin[number] = self.rules.rules[number].source == "builtin"
        return rank, builtin

    def _without_known(self, rule: Rule, new: Prefixes, expires: float) -> Prefixes:
        """What is not there yet; what is gets its expiry."""
        there = self.find(new, rule)
        if not len(there):
            return new
        self._expires[there] = expires
        self.maps.entries.view["expires"][there] = _monotonic(np.full(len(there), expires))
        return new.missing_in(self.prefixes(there).unique())

    def _hides_others(self, removed: U32, added: Sequence[tuple[int, Prefixes, float]]) -> bool:
        """Is a built-in prefix among them, with others inside?"""
        builtin = {n for n, rule in self.rules.rules.items() if rule.source == "builtin"}
        keys = [self._key(n) for n in removed.tolist() if int(self._rule[n]) in builtin]
        keys += [key for rule, new, _ in added if rule in builtin for key in _keys(new)]
        return any(self.may_have_inner(key) for key in keys)

    # ---- Taking over ---------------------------------------------------------------

    def _take_over(self, candidates: Iterable[Rule]) -> None:
        view = self.maps.entries.view
        reached = np.zeros(len(self._live), np.bool_)
        reached[self.maps.slots.view & NUMBER] = True
        keys, values = self.maps.prefixes.items()
        reached[values["number"]] = True
        reached[self.maps.state.view["root6"][0]] = True
        left = np.flatnonzero(reached)
        while len(left):
            left = np.unique(view["next"][left])
            left = left[~reached[left]]
            reached[left] = True
        reached[0] = False
        numbers = self._numbers(reached)
        if not len(numbers):
            if len(keys):
                self.maps.prefixes.delete_many(keys)
            return
        self._live[:] = reached
        self._fresh = len(self._live)
        self._free = np.flatnonzero(~reached)[:0:-1].tolist()
        address = np.ascontiguousarray(view["addr"][numbers]).view(np.uint8).reshape(-1, 16)
        words = address.copy().view(">u8").astype(np.uint64)
        self._high[numbers], self._low[numbers] = words[:, 0], words[:, 1]
        self._length[numbers] = view["length"][numbers]
        self._next[:] = view["next"]
        self._rule[numbers] = view["own_rule"][numbers]
        self._expires[numbers] = _wall(view["expires"][numbers])
        used = np.bincount(view["own_rule"][numbers], minlength=len(self.rules.count))
        self.rules.count[:] = used[: len(self.rules.count)]
        self.rules.adopt(candidates, np.flatnonzero(self.rules.count).tolist())
        self.next_expiry = self._first_expiry()
        if not self._is_whole(numbers):
            self._replace(self._numbers(None), ())

    def _is_whole(self, numbers: U32) -> bool:
        """Is all as a change leaves it, when it was not broken off?"""
        rank, builtin = self._ranks()
        rule = self._rule[numbers]
        prefixes = self.prefixes(numbers)
        order = np.lexsort((rank[rule], prefixes.length, prefixes.low, prefixes.high))
        layout = lay_out(prefixes, rank[rule], builtin[rule], numbers[order])
        ordered = rule[order]
        hidden = layout.hidden != NONE
        ordered[hidden] = ordered[layout.hidden[hidden]]
        in_force = self.maps.entries.view["rule"][layout.numbers]
        if not np.array_equal(self._next[layout.numbers], layout.next):
            return False
        if not np.array_equal(in_force, ordered):
            return False
        slots = self.maps.slots.view
        wanted = layout.slots()
        if ((slots ^ wanted) & NUMBER).any() or (wanted & ~slots).any():
            return False
        bits, short6 = layout.filter6()
        if (bits & ~self.maps.filter6.view["length"]).any():
            return False
        state = self.maps.state.view
        if short6 & ~int(state["short6"][0]) or layout.root6() != int(state["root6"][0]):
            return False
        hashed = layout.hashed()
        keys = _key_records(layout.nodes.take(hashed), self.maps.prefixes.key_dtype)
        there, values = self.maps.prefixes.items()
        mine = np.argsort(_as_bytes(keys))
        theirs = np.argsort(_as_bytes(there))
        return np.array_equal(_as_bytes(keys)[mine], _as_bytes(there)[theirs]) and np.array_equal(
            layout.head_numbers[hashed][mine], values["number"][theirs]
        )


class _Patch:
    """Some prefixes made anew, then the words that lead to them."""

    def __init__(self, tables: FirewallTables, before: dict[Key, list[int]]) -> None:
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
        was = tables._around(key)
        outer = self._now_around(key, was)
        self._outer[key] = was, outer
        wanted = [
            (rules[int(tables._rule[n])].order, int(tables._rule[n]), float(tables._expires[n]), n)
            for n in stay
        ]
        wanted += [(rules[rule].order, rule, expires, 0) for rule, expires in come]
        wanted.sort()
        numbers = tables._take(len(wanted)).tolist()
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
        if hash_put and tables._deleted:
            tables.settle()
        for key, number in hash_put:
            raw = number.to_bytes(4, "little") + bytes(4)
            syscall.map_update(tables.maps.prefixes.fd, packed(key), raw, syscall.BPF_F_LOCK)
            if not is_v4_key(key):
                self._mark6(key)
        for first, words in slots:
            tables.maps.slots.view[first : first + len(words)] = words
        for (high, low, length), number in self._heads.items():
            if not length:
                tables.maps.state.view["root6"][0] = number
        following = tables.maps.entries.view["next"]
        for number, target in moved.items():
            tables._next[number] = target
            following[number] = target
        for key in hash_gone:
            syscall.map_delete(tables.maps.prefixes.fd, packed(key), "fw_prefixes")
            tables._deleted = True
        tables._retire(np.array(self._old, np.uint32), np.array(self._new, np.uint32))

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
        tables._high[number], tables._low[number], tables._length[number] = key
        tables._next[number], tables._rule[number] = following, rule
        tables._expires[number], tables._live[number] = expires, True
        ends = int(_monotonic(np.array([expires]))[0]) if expires else 0
        address = (key[0] << 64 | key[1]).to_bytes(16, "big")
        raw = _RECORD.pack(following, in_force, ends, key[2], rule, address, 0, 0, packets, bytes_)
        start = number * tables._size
        tables._memory[start : start + len(raw)] = raw

    def _now_around(self, key: Key, was: int) -> int:
        """The first entry of the longest prefix around, as it will be."""
        tables = self._tables
        found, length = 0, -1
        while was:
            outer = tables._key(was)
            now = self._heads.get(outer)
            if now is None or now:
                found, length = now or was, outer[2]
                break
            was = tables._beyond(was)
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
        top = len(tables._live)
        gone = set(self._old)
        moved: dict[int, int] = {}
        for key, number in self._heads.items():
            if not tables.may_have_inner(key):
                continue
            mine = self._before[key]
            was, outer = self._outer[key]
            leads = mine[0] if mine else was
            inner = np.flatnonzero((tables._next[:top] == leads) & tables._live)
            if not mine:
                mask_high, mask_low = high_mask[key[2]], low_mask[key[2]]
                inside = (
                    (tables._high[inner] & mask_high == key[0])
                    & (tables._low[inner] & mask_low == key[1])
                    & (tables._length[inner] > key[2])
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
            high, low, length = key
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
                here = tables._length[led] < length
                to = number
            words[here] = words[here] & np.uint32(0xFF000000) | np.uint32(to)
        return put, gone, [(first, words) for first, words in slots.items()]

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
            maps.filter6.view["length"][_filter_place(key[0]), word] |= np.uint64(bit)


# ---- Keys ----------------------------------------------------------------------


def is_v4_key(key: Key) -> bool:
    return key[0] == 0 and key[1] >> 32 == _V4 and key[2] >= 96


def cut(key: Key, length: int) -> Key:
    return key[0] & int(high_mask[length]), key[1] & int(low_mask[length]), length


def packed(key: Key) -> bytes:
    """As `struct fw_key`."""
    return _KEY.pack((key[0] << 64 | key[1]).to_bytes(16, "big"), key[2])


def _keys(prefixes: Prefixes) -> Iterable[Key]:
    return zip(prefixes.high.tolist(), prefixes.low.tolist(), prefixes.length.tolist(), strict=True)


def _key_records(prefixes: Prefixes, dtype: np.dtype[np.void]) -> NDArray[np.void]:
    made = np.zeros(len(prefixes), dtype)
    made["addr"] = np.stack((prefixes.high, prefixes.low), axis=1).astype(">u8").view(np.uint8)
    made["length"] = prefixes.length
    return made


def _as_bytes(keys: NDArray[np.void]) -> NDArray[np.void]:
    return np.ascontiguousarray(keys).view(f"V{keys.dtype.itemsize}").reshape(-1)


def _filter_place(high: int) -> int:
    return int(filter_index(np.array([high], np.uint64))[0])


def _monotonic(expires: NDArray[np.float64]) -> U32:
    """Seconds of the kernel's clock, rounded up; 0 stays 0."""
    offset = time.time() - time.monotonic()
    return np.where(expires > 0, np.maximum(np.ceil(expires - offset), 1), 0).astype(np.uint32)


def _wall(expires: U32) -> NDArray[np.float64]:
    offset = time.time() - time.monotonic()
    return np.where(expires > 0, expires + offset, 0.0)
