"""Changing the firewall's tables under traffic, and taking over those of another agent.

A packet reads, from the outside in, one word that leads to a chain of entries: of a slot, of an
element of the hash, `next` of an entry. A change writes entries that nothing leads to yet, then
these words; where one source would read two words that change, the entries between are made anew,
so that it reads one (docs/firewall.md, Each packet sees the old state or the new).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.firewall_entries import Entries
from lockgate.agent.firewall_keys import (
    Key,
    as_bytes,
    cut,
    is_v4_key,
    key_records,
    keys_of,
    monotonic_of,
    wall_of,
)
from lockgate.agent.firewall_maps import FirewallMaps
from lockgate.agent.firewall_patch import Patch
from lockgate.agent.firewall_rules import FirewallFull
from lockgate.bpf import syscall
from lockgate.bpf.btf import Schema
from lockgate.compile.firewall import Rule
from lockgate.compile.firewall_layout import LENGTHS, NUMBER, Layout, lay_out, slots_used
from lockgate.compile.prefixes import NONE, Prefixes

__all__ = ["Change", "FirewallFull", "FirewallTables"]

U32 = NDArray[np.uint32]
#: Changed prefixes beyond which all is laid out anew: 50 µs each against a second for a million.
_FEW = 4096


class Change:
    """Entries that come and go, together. `added`: rule, prefixes, expiry (seconds since the
    epoch, 0 = never)."""

    def __init__(self) -> None:
        self.added: list[tuple[Rule, Prefixes, float]] = []
        self.removed: list[U32] = []

    def __bool__(self) -> bool:
        return bool(self.added or self.removed)


class FirewallTables(Entries):
    """All that can be done with them."""

    def __init__(
        self,
        maps: FirewallMaps,
        schema: Schema,
        reason: Callable[[Rule | None], int],
        candidates: Iterable[Rule] = (),
    ) -> None:
        """Takes over what is in the kernel; `candidates` are the rules that it may be of."""
        super().__init__(maps, schema, reason)
        self.next_expiry = 0.0
        self._take_over(candidates)

    # ---- Changes -------------------------------------------------------------------

    def apply(self, change: Change) -> None:
        """Bring it in force. FirewallFull, and nothing is changed, if there is no room. What is
        there already of what comes gets its expiry, and is no other entry."""
        removed, new = self._of(change)
        count = len(removed) + sum(len(prefixes) for _, prefixes, _ in new)
        if not count:
            return
        added = [(self.rules.number(rule), one, at) for rule, one, at in new if len(one)]
        if count > _FEW or self._hides_others(removed, added):
            self._replace(removed, added)
        else:
            self._patch(removed, added)
        for _, _, expires in change.added:
            self._expect(expires)

    def expire(self, now: float) -> int:
        """Take out what has expired; how many."""
        if not 0 < self.next_expiry <= now:
            return 0
        over = self.places(self.live & (self.ends > 0) & (self.ends <= now))
        change = Change()
        change.removed.append(over)
        self.apply(change)
        self.next_expiry = self._first_expiry()
        return len(over)

    def set_clock(self) -> None:
        """The time of day was set: lifetimes end by it."""
        numbers = self.places(self.live & (self.ends > 0))
        self.maps.entries.view["expires"][numbers] = monotonic_of(self.ends[numbers])

    # ---- Everything at once ----------------------------------------------------------

    def _replace(self, removed: U32, added: Sequence[tuple[int, Prefixes, float]]) -> None:
        """Lay all out anew, beside what is in force, and lead to it."""
        stay = self._but(removed)
        self.make_room(len(stay) + sum(len(new) for _, new, _ in added))
        # After make_room(), which may have counted up what is kept.
        old, numbers, _ = self._join(self, stay, self.own_rule[stay], added)
        self.retire(old, numbers)
        self.retire(removed, np.zeros(len(removed), np.uint32))

    def _join(
        self,
        other: FirewallTables,
        stay: U32,
        rule: NDArray[np.int32],
        added: Sequence[tuple[int, Prefixes, float]],
    ) -> tuple[U32, U32, NDArray[np.uint64]]:
        """These entries of `other`, whose rules here are `rule`, and what is added, and no others.
        As which numbers they are here, and what they had counted. There is room."""
        sizes = [len(new) for _, new, _ in added]
        rules, ends = [r for r, _, _ in added], [e for _, _, e in added]
        prefixes = Prefixes.joined([other.prefixes(stay), *(new for _, new, _ in added)])
        rule = np.concatenate((rule, np.repeat(np.array(rules, np.int32), sizes)))
        expires = np.concatenate((other.ends[stay], np.repeat(np.array(ends, np.float64), sizes)))
        totals = np.zeros((len(prefixes), 2), np.uint64)
        totals[: len(stay)] = counted = other.counters(stay)
        order, numbers = self._lay(prefixes, rule, expires, totals)
        kept = order < len(stay)
        return stay[order[kept]], numbers[kept], counted[order[kept]]

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
        numbers = self.take(len(prefixes))
        layout = lay_out(prefixes, rank[rule], builtin[rule], numbers)
        order = layout.order
        self._write(layout, prefixes.take(order), rule[order], expires[order], totals[order])
        self.live[:] = False
        self.live[numbers] = True
        self.sort(numbers)
        self.rules.count[:] = np.bincount(rule, minlength=len(self.rules.count))
        self._lead_to(layout)
        return order, numbers

    def copy(self, other: FirewallTables, change: Change) -> tuple[U32, U32, NDArray[np.uint64]]:
        """All of other tables, as a change of theirs leaves it, into these, which are empty. The
        numbers there and here of the same entries, and what they had counted. FirewallFull."""
        removed, new = other._of(change)
        stay = other._but(removed)
        self.make_room(len(stay) + sum(len(prefixes) for _, prefixes, _ in new))
        rule = np.zeros(len(other.rules.count), np.int32)
        for one, old in other.rules.numbers.items():
            if other.rules.count[old]:
                rule[old] = self.rules.number(one)
        added = [(self.rules.number(one), prefixes, at) for one, prefixes, at in new]
        told = self._join(other, stay, rule[other.own_rule[stay]], added)
        self.next_expiry = other.next_expiry
        for _, _, expires in new:
            self._expect(expires)
        return told

    def count_up(self, numbers: U32, late: NDArray[np.uint64]) -> None:
        """Add what was counted elsewhere, to those that there still are."""
        live = self.live[numbers]
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
            (self.high, prefixes.high),
            (self.low, prefixes.low),
            (self.length, prefixes.length),
            (self.following, layout.next),
            (self.own_rule, rule),
            (self.ends, expires),
        )
        for column, values in columns:
            column[numbers] = values
        in_force = rule.copy()
        hidden = layout.hidden != NONE
        in_force[hidden] = rule[layout.hidden[hidden]]
        records = np.zeros(len(numbers), self.maps.entries.view.dtype)
        records["next"], records["rule"], records["length"] = layout.next, in_force, prefixes.length
        records["own_rule"], records["expires"] = rule, monotonic_of(expires)
        records["addr"] = (
            np.stack((prefixes.high, prefixes.low), axis=1).astype(">u8").view(np.uint8)
        )
        records["packets_before"], records["bytes_before"] = totals[:, 0], totals[:, 1]
        self.maps.entries.view[numbers] = records

    def _lead_to(self, layout: Layout) -> None:
        """From all addresses. Longer prefixes are there before a slot says so, and go after."""
        maps = self.maps
        hashed = np.flatnonzero(layout.hashed())
        # The longest first: what an address in one of them finds until then is as it was.
        hashed = hashed[np.argsort(-layout.nodes.length[hashed].astype(np.int64), kind="stable")]
        keys = key_records(layout.nodes.take(hashed), maps.prefixes.key_dtype)
        values = np.zeros(len(keys), maps.prefixes.value_dtype)
        values["number"] = layout.head_numbers[hashed]
        before = maps.prefixes.keys()
        if self.deleted and len(keys):
            self.reclaim()
        # Filters must have what comes before it is there.
        bloom = layout.bloom(len(maps.bloom))
        maps.bloom.view |= bloom
        bits, short6 = layout.filter6()
        filters, state = maps.filter6.view["length"], maps.state.view
        filters |= bits
        state["short6"][0] |= np.uint64(short6)
        if len(keys):
            maps.prefixes.update_many(keys, values, syscall.BPF_F_LOCK)
        state["root6"][0] = layout.root6()
        slots = layout.slots()
        maps.slots.view[:] = slots
        maps.used.view[:] = slots_used(slots)
        over = before[~np.isin(as_bytes(before), as_bytes(keys))]
        if len(over):
            # The shortest first, likewise.
            maps.prefixes.delete_many(over[np.argsort(over["length"], kind="stable")])
            self.deleted = True
        filters[:] = bits
        maps.bloom.view[:] = bloom
        state["short6"][0] = short6

    # ---- A few ---------------------------------------------------------------------

    def _patch(self, removed: U32, added: Sequence[tuple[int, Prefixes, float]]) -> None:
        gone = set(removed.tolist())
        nodes: dict[Key, list[tuple[int, float]]] = {self.key(n): [] for n in gone}
        for rule, new, expires in added:
            for key in keys_of(new):
                nodes.setdefault(key, []).append((rule, expires))
        before = {key: self.node(key) for key in nodes}
        if len(nodes) > 1:
            self._add_between(nodes, before)
        ordered = sorted(nodes, key=lambda key: key[2])
        total = sum(len(before[key]) + len(nodes[key]) for key in ordered)
        self.make_room(total)
        for number in gone:
            self.rules.count[self.own_rule[number]] -= 1
        patch = Patch(self, before)
        for key in ordered:
            patch.rebuild(key, [n for n in before[key] if n not in gone], nodes[key])
        patch.lead()

    def _add_between(
        self, nodes: dict[Key, list[tuple[int, float]]], before: dict[Key, list[int]]
    ) -> None:
        """Prefixes between two that change, or come: an address in the inner one would read two
        words."""
        changed = list(nodes)
        lengths = sorted({key[2] for key in changed})
        for key in changed:
            v4 = is_v4_key(key)
            outermost = next(
                (
                    length
                    for length in lengths
                    if length < key[2]
                    and (outer := cut(key, length)) in nodes
                    and is_v4_key(outer) == v4
                ),
                None,
            )
            number = self.around(key) if outermost is not None else 0
            while number and self.length[number] > (outermost or 0):
                outer = self.key(number)
                if outer not in nodes:
                    nodes[outer] = []
                    before[outer] = self.node(outer)
                number = self.beyond(number)

    def _expect(self, expires: float) -> None:
        if expires and not 0 < self.next_expiry <= expires:
            self.next_expiry = expires

    def _first_expiry(self) -> float:
        timed = self.ends[self.live & (self.ends > 0)]
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

    def _of(self, change: Change) -> tuple[U32, list[tuple[Rule, Prefixes, float]]]:
        """The numbers of what it takes away, and what it adds that is not there yet."""
        removed = np.unique(np.concatenate([self.places(None), *change.removed]))
        return removed, [
            (rule, self._without_known(rule, n, at), at) for rule, n, at in change.added
        ]

    def _but(self, removed: U32) -> U32:
        """The numbers of all others."""
        stay = self.live.copy()
        stay[removed] = False
        return self.places(stay)

    def _without_known(self, rule: Rule, new: Prefixes, expires: float) -> Prefixes:
        """What is not there yet; what is gets its expiry."""
        there = self.find(new, rule)
        if not len(there):
            return new
        self.ends[there] = expires
        self.maps.entries.view["expires"][there] = monotonic_of(np.full(len(there), expires))
        return new.missing_in(self.prefixes(there).unique())

    def _hides_others(self, removed: U32, added: Sequence[tuple[int, Prefixes, float]]) -> bool:
        """Is a built-in prefix among them, with others inside?"""
        builtin = {n for n, rule in self.rules.rules.items() if rule.source == "builtin"}
        keys = [self.key(n) for n in removed.tolist() if int(self.own_rule[n]) in builtin]
        keys += [key for rule, new, _ in added if rule in builtin for key in keys_of(new)]
        return any(self.may_have_inner(key) for key in keys)

    # ---- Taking over ---------------------------------------------------------------

    def _take_over(self, candidates: Iterable[Rule]) -> None:
        view = self.maps.entries.view
        reached = np.zeros(len(self.live), np.bool_)
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
        numbers = self.places(reached)
        if not len(numbers):
            if len(keys):
                self.maps.prefixes.delete_many(keys)
            return
        self.live[:] = reached
        self.fresh = len(self.live)
        self.free = np.flatnonzero(~reached)[:0:-1].tolist()
        address = np.ascontiguousarray(view["addr"][numbers]).view(np.uint8).reshape(-1, 16)
        words = address.copy().view(">u8").astype(np.uint64)
        self.high[numbers], self.low[numbers] = words[:, 0], words[:, 1]
        self.length[numbers] = view["length"][numbers]
        self.following[:] = view["next"]
        self.own_rule[numbers] = view["own_rule"][numbers]
        self.ends[numbers] = wall_of(view["expires"][numbers])
        used = np.bincount(view["own_rule"][numbers], minlength=len(self.rules.count))
        self.rules.count[:] = used[: len(self.rules.count)]
        self.rules.adopt(candidates, np.flatnonzero(self.rules.count).tolist())
        self.next_expiry = self._first_expiry()
        self.sort()
        if not self._is_whole(numbers):
            self._replace(self.places(None), ())

    def _is_whole(self, numbers: U32) -> bool:
        """Is all as a change leaves it, when it was not broken off?"""
        rank, builtin = self._ranks()
        rule = self.own_rule[numbers]
        prefixes = self.prefixes(numbers)
        order = np.lexsort((rank[rule], prefixes.length, prefixes.low, prefixes.high))
        apart = np.flatnonzero(self.maps.slots.view >> LENGTHS)
        layout = lay_out(prefixes, rank[rule], builtin[rule], numbers[order], apart)
        ordered = rule[order]
        hidden = layout.hidden != NONE
        ordered[hidden] = ordered[layout.hidden[hidden]]
        in_force = self.maps.entries.view["rule"][layout.numbers]
        if not np.array_equal(self.following[layout.numbers], layout.next):
            return False
        if not np.array_equal(in_force, ordered):
            return False
        slots = self.maps.slots.view
        wanted = layout.slots()
        if ((slots ^ wanted) & NUMBER).any() or (wanted & ~slots).any():
            return False
        if (slots_used(wanted) & ~self.maps.used.view).any():
            return False
        if (layout.bloom(len(self.maps.bloom)) & ~self.maps.bloom.view).any():
            return False
        bits, short6 = layout.filter6()
        if (bits & ~self.maps.filter6.view["length"]).any():
            return False
        state = self.maps.state.view
        if short6 & ~int(state["short6"][0]) or layout.root6() != int(state["root6"][0]):
            return False
        hashed = layout.hashed()
        keys = key_records(layout.nodes.take(hashed), self.maps.prefixes.key_dtype)
        there, values = self.maps.prefixes.items()
        mine = np.argsort(as_bytes(keys))
        theirs = np.argsort(as_bytes(there))
        return np.array_equal(as_bytes(keys)[mine], as_bytes(there)[theirs]) and np.array_equal(
            layout.head_numbers[hashed][mine], values["number"][theirs]
        )
