"""The firewall's tables while there is a firewall: made, made larger, let go (docs/firewall.md)."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.edge import Edge
from lockgate.agent.firewall_maps import FirewallMaps, sizes, sizes_of
from lockgate.agent.firewall_tables import Change, FirewallFull, FirewallTables
from lockgate.bpf.grace import wait_grace
from lockgate.compile.firewall import Rule

__all__ = ["Loaded"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Outgrown:
    """Tables that were too small, while programs have them; entries there and in the new ones, and
    what they had counted."""

    tables: FirewallTables
    theirs: NDArray[np.uint32]
    mine: NDArray[np.uint32]
    at: NDArray[np.uint64]


class Loaded:
    """`tables` is None while there is no firewall."""

    def __init__(self, edge: Edge, reason: Callable[[Rule | None], int]) -> None:
        """`reason`: the journal's id of a rule."""
        self._edge, self._reason = edge, reason
        self._outgrown: _Outgrown | None = None
        self.tables: FirewallTables | None = None

    def open(self, need: int, candidates: Iterable[Rule]) -> FirewallTables:
        """Tables for so many entries: those that are pinned, if they are large enough; they may be
        of the `candidates`. LoadError or OSError, and nothing has changed."""
        edge = self._edge
        before = edge.firewall, edge.sizes
        wanted = sizes(need)
        if self.tables is None:
            pinned = edge.pinned_size("fw_entries")
            if pinned > wanted["fw_entries"]:
                wanted = sizes_of(pinned)
        edge.firewall, edge.sizes = True, wanted
        maps = None
        try:
            obj = edge.object()
            maps = FirewallMaps.of(obj)
            self.tables = FirewallTables(maps, obj.schema, self._reason, candidates)
        except BaseException:
            edge.firewall, edge.sizes = before
            if maps is not None:
                maps.close()
            raise
        return self.tables

    def apply(self, change: Change) -> None:
        """In larger tables if these are too small; programs get them when XDP is settled next.
        FirewallFull when there are none so large, or LoadError or OSError."""
        assert self.tables is not None
        if not self._edge.due:  # before entries get other numbers
            self.leave()
        try:
            self.tables.apply(change)
        except FirewallFull:
            more = sum(len(prefixes) for _, prefixes, _ in change.added)
            if sizes(len(self.tables) + more)["fw_entries"] <= self.tables.room + 1:
                raise
            self._grow(change, more)

    def leave(self) -> None:
        """Programs have the tables that there are: what they counted in those that were too small
        is added, and these are let go."""
        one, self._outgrown = self._outgrown, None
        if one is not None and self.tables is not None:
            wait_grace()
            self.tables.count_up(one.mine, one.tables.counters(one.theirs) - one.at)
            one.tables.maps.close()

    def close(self) -> None:
        """Let go; what programs have, and what is pinned, stays."""
        if self.tables is not None:
            self.tables.maps.close()
        if self._outgrown is not None:
            self._outgrown.tables.maps.close()
        self.tables = self._outgrown = None
        self._edge.sizes = {}

    def _grow(self, change: Change, more: int) -> None:
        """Everything into larger tables, with its counters."""
        old, before = self.tables, self._edge.sizes
        assert old is not None
        old.settle()
        drops = old.rules.drops
        try:
            tables = self.open(len(old) + more, ())
            theirs, mine, at = tables.copy(old, change)
            tables.rules.set_default(drops)
        except BaseException:
            if self.tables is not old and self.tables is not None:
                self.tables.maps.close()
            self.tables, self._edge.sizes = old, before
            raise
        log.info("the firewall's tables have room for %d entries now", tables.room)
        if self._outgrown is not None:  # of which no program was left, or is for a moment
            self._outgrown.tables.maps.close()
        self._outgrown = _Outgrown(old, theirs, mine, at)
