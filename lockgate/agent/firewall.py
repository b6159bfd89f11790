"""The firewall of the node: what objects and commands ask for, in the kernel's tables.

It is loaded while anybody asks for anything (docs/firewall.md). All of it blocks: call it from the
agent's worker, in turn.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockgate.agent.edge import Edge
from lockgate.agent.firewall_loaded import Loaded
from lockgate.agent.firewall_log import Entries, FirewallLog
from lockgate.agent.firewall_tables import Change, FirewallFull, FirewallTables
from lockgate.agent.journal import Journal
from lockgate.bpf.object import LoadError
from lockgate.compile.firewall import COMMAND, Facts, Memory, Rule, Wanted, wanted
from lockgate.compile.prefixes import Prefixes
from lockgate.objects.changes import Changed
from lockgate.objects.model import Cluster

__all__ = ["Deleted", "Firewall", "FirewallFull"]

log = logging.getLogger(__name__)
_API_SERVERS = "default"


@dataclass(frozen=True, slots=True)
class Deleted:
    """How many entries went; of those asked for, which there are only by objects, and none of."""

    count: int
    of_objects: list[str]
    unknown: list[str]


class Firewall:
    """For one agent."""

    def __init__(self, edge: Edge, journal: Journal, state: Path, node: str) -> None:
        self._edge, self._journal, self._node = edge, journal, node
        self._log = FirewallLog(state / "firewall.jsonl")
        self._commands: Entries | None = self._log.load(time.time())
        self._memory = Memory()
        self._wanted = Wanted({})
        self._cards: frozenset[str] = frozenset()
        self._cluster: Cluster | None = None
        self._rule_expiry = 0.0
        self._clock = _clock()
        self._loaded = Loaded(edge, self._reason)
        #: What is in force of objects, and built in.
        self._applied: dict[Rule, tuple[Prefixes, float]] = {}
        self.errors: list[str] = []

    def close(self) -> None:
        """What is in the kernel stays."""
        self._log.close()
        self._loaded.close()

    @property
    def tables(self) -> FirewallTables | None:
        """None while there is no firewall."""
        return self._loaded.tables

    # ---- Objects -------------------------------------------------------------------

    def follow(self, cluster: Cluster, changed: Changed | None) -> None:
        """Objects are others, `changed` of them; None: any."""
        self._cluster = cluster
        if changed is not None and not (
            changed.firewalls
            or changed.nodes
            or any(namespace == _API_SERVERS for namespace, _ in changed.slices)
        ):
            return
        self._look()

    def see_cards(self, addresses: Iterable[str]) -> None:
        """The addresses of the node's cards."""
        cards = frozenset(addresses)
        if cards != self._cards:
            self._cards = cards
            if self._cluster is not None:
                self._look()

    def ask(self) -> None:
        """Ask the journal for all ids that are in use (`Journal.asking`)."""
        for rule in self.tables.rules.numbers if self.tables is not None else ():
            self._reason(rule)
        if self._wanted.drop:
            self._reason(None)

    def _look(self) -> None:
        """What is wanted now, and that in force."""
        if self._cluster is not None and not self._cluster.firewalls and not self._is_used:
            self._wanted, self.errors = Wanted({}), []  # on most nodes, whatever changes
            return
        self._want()
        try:
            self._bring()
            self.errors = self._wanted.errors
        except (FirewallFull, LoadError, OSError) as error:
            text = f"the firewall is not in force as it should be: {error}"
            log.warning("%s", text)
            self.errors = [*self._wanted.errors, text]

    @property
    def _is_used(self) -> bool:
        return self.tables is not None or bool(self._commands)

    def _want(self) -> None:
        cluster = self._cluster or Cluster()
        me = cluster.nodes.get(self._node)
        labels = me.metadata.labels if me is not None else {}
        facts, now = Facts.of(cluster, self._node, self._cards), time.time()
        found = wanted(cluster.firewalls.values(), labels, facts, self._memory, now)
        expiries = [expires for _, expires in found.rules.values() if expires > now]
        self._rule_expiry = min(expiries) if expiries else 0.0
        self._wanted = found

    def summary(self) -> dict[str, Any] | None:
        """For the agent's status; None: there is none."""
        tables = self.tables
        if tables is None:
            return None
        return {
            "default": "Drop" if tables.rules.drops else "Allow",
            "entries": len(tables),
            "room": tables.room,
            "rules": sum(rule.source != "builtin" for rule in tables.rules.numbers),
        }

    # ---- Commands ------------------------------------------------------------------

    def add(self, rule: Rule, prefixes: Prefixes, expires: float) -> int:
        """Entries for each of them, in force when it returns; how many are new. FirewallFull,
        LoadError or OSError, and nothing has changed."""
        change = Change()
        change.added.append((rule, prefixes, expires))
        before = self._count(rule)
        if self.tables is None:
            self._commands = {**(self._commands or {}), (rule, expires): prefixes}
            try:
                self._want()
                self._bring()
            except BaseException:
                self._commands.pop((rule, expires))
                raise
        else:
            self._apply(change)
        try:
            self._log.added(rule, _texts(prefixes), expires)
        except OSError as error:
            raise OSError(
                error.errno, f"it is in force, but not kept in {self._log.path}: {error.strerror}"
            ) from error
        self._tidy_log()
        return self._count(rule) - before

    def delete(self, prefixes: Prefixes | None, ports: tuple[object, ...] | None) -> Deleted:
        """What commands added of them (None: all), with these ports (None: any)."""
        if self.tables is None:
            return Deleted(0, [], _texts(prefixes))
        change = Change()
        told: list[tuple[Rule, list[str]]] = []
        gone: list[Prefixes] = []
        objects: list[Prefixes] = []
        for rule in list(self.tables.rules.numbers):
            if rule.source == "builtin" or (ports is not None and rule.ports != ports):
                continue
            if prefixes is None:
                numbers = self.tables.numbers_of(rule)
            else:
                numbers = self.tables.find(prefixes, rule)
            if not len(numbers):
                continue
            found = self.tables.prefixes(numbers)
            if rule.source == "command":
                change.removed.append(numbers)
                told.append((rule, _texts(found)))
                gone.append(found)
            else:
                objects.append(found)
        if change:
            self.tables.apply(change)
            self._log.deleted(told)
        count = sum(map(len, gone))
        if not self._has_commands() and not self._wanted.needed:
            self._bring()
        if prefixes is None:
            return Deleted(count, [], [])
        left = prefixes.missing_in(Prefixes.joined(gone).unique())
        by_object = Prefixes.joined(objects).unique()
        unknown = left.missing_in(by_object)
        return Deleted(count, _texts(left.missing_in(unknown)), _texts(unknown))

    @property
    def idle(self) -> bool:
        """Is there nothing that `tick` could do?"""
        return self.tables is None and not self._rule_expiry

    # ---- As time goes by -------------------------------------------------------------

    def tick(self) -> None:
        """Once a second or so: what has expired goes, what was replaced is made free."""
        now = time.time()
        if self.tables is not None:
            clock = _clock()
            if abs(clock - self._clock) > 1:
                self._clock = clock
                self.tables.set_clock()
            if not self._edge.due:
                self._loaded.leave()
            if self.tables.expire(now):
                self._tidy_log()
            self.tables.settle()
        if 0 < self._rule_expiry <= now and self._cluster is not None:
            self._look()
        if self.tables is not None and not self._wanted.needed and not self._has_commands():
            self._bring()

    # ---- Inside --------------------------------------------------------------------

    def _bring(self) -> None:
        """Have what is wanted in force, and nothing loaded where nothing is."""
        commands = self._commands or {}
        if not self._wanted.needed and not commands and not self._has_commands():
            if self.tables is not None:
                log.info("the firewall is empty")
            self._edge.firewall, self._applied = False, {}
            self._loaded.close()
            return
        need = sum(len(prefixes) for prefixes, _ in self._wanted.rules.values())
        need += sum(len(prefixes) for prefixes in commands.values())
        if self.tables is None:
            self._loaded.open(need, [*self._wanted.rules, *(rule for rule, _ in commands)])
        self._apply(self._difference(commands))
        assert self.tables is not None
        self._applied = dict(self._wanted.rules)
        self._commands = None
        self._reason_of_default()
        self.tables.rules.set_default(self._wanted.drop)
        self._edge.firewall = True

    def _difference(self, commands: Entries) -> Change:
        assert self.tables is not None
        change = Change()
        rules: dict[Rule, list[tuple[Prefixes, float]]] = {
            rule: [(prefixes, expires)] for rule, (prefixes, expires) in self._wanted.rules.items()
        }
        for (rule, expires), prefixes in commands.items():
            rules.setdefault(rule, []).append((prefixes, expires))
        # A list that is the same list as before is long, perhaps.
        same = {
            rule
            for rule, (prefixes, expires) in self._applied.items()
            if rule in self._wanted.rules
            and self._wanted.rules[rule][0] is prefixes
            and self._wanted.rules[rule][1] == expires
        }
        for rule, parts in rules.items():
            if rule not in same:
                change.added += [(rule, prefixes, expires) for prefixes, expires in parts]
        for rule in list(self.tables.rules.numbers):
            if rule in same or (rule.source == "command" and self._commands is None):
                continue  # what there is, is what there should be
            numbers = self.tables.numbers_of(rule)
            kept = Prefixes.joined(part for part, _ in rules.get(rule, ())).unique()
            over = self.tables.prefixes(numbers).unique().missing_in(kept)
            if len(over):
                change.removed.append(self.tables.find(over, rule))
        return change

    def _apply(self, change: Change) -> None:
        for rule, _, _ in change.added:
            self._reason(rule)
        self._journal.commit()
        self._loaded.apply(change)

    def _reason(self, rule: Rule | None) -> int:
        if rule is None:
            return self._journal.firewall(self._wanted.drop_by, COMMAND)
        if rule.source == "builtin":
            return 0
        return self._journal.firewall(rule.name, rule.index)

    def _reason_of_default(self) -> None:
        if self._wanted.drop:
            self._reason(None)
            self._journal.commit()

    def _count(self, rule: Rule) -> int:
        if self.tables is None or rule not in self.tables.rules.numbers:
            return 0
        return int(self.tables.rules.count[self.tables.rules.numbers[rule]])

    def _has_commands(self) -> bool:
        if self.tables is None:
            return bool(self._commands)
        return any(
            rule.source == "command" and self.tables.rules.count[number]
            for rule, number in self.tables.rules.numbers.items()
        )

    def _tidy_log(self) -> None:
        if self.tables is None:
            return
        rules = [rule for rule in self.tables.rules.numbers if rule.source == "command"]
        if not self._log.overgrown(sum(self._count(rule) for rule in rules)):
            return
        entries: Entries = {}
        for rule in rules:
            numbers = self.tables.numbers_of(rule)
            ends = self.tables.expires(numbers)
            for expires in np.unique(ends).tolist():
                entries[rule, expires] = self.tables.prefixes(numbers[ends == expires])
        try:
            self._log.rewrite(entries)
        except OSError as error:
            log.warning("%s stays long: %s", self._log.path, error)


def _texts(prefixes: Prefixes | None) -> list[str]:
    return [prefixes.text(n) for n in range(len(prefixes))] if prefixes is not None else []


def _clock() -> float:
    """Between the time of day and the kernel's clock."""
    return time.time() - time.monotonic()
