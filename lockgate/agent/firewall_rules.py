"""Rules and port sets of the firewall in the kernel, by number."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from lockgate.agent.firewall_maps import FirewallMaps
from lockgate.bpf.btf import Schema
from lockgate.compile.firewall import Rule
from lockgate.objects.firewall import Range

__all__ = ["FirewallFull", "Rules"]

_TABLES = ("TCP", "UDP", "SCTP", "ICMP")
_SECOND = 1_000_000_000


class FirewallFull(Exception):
    """No room; one sentence."""


class Rules:
    """Numbers of rules, given out when they are first asked for. Number 0 is the default."""

    def __init__(
        self, maps: FirewallMaps, schema: Schema, reason: Callable[[Rule | None], int]
    ) -> None:
        """`reason`: the journal's id of a rule; None is the default."""
        self._maps, self._reason = maps, reason
        self._actions = schema.enum("fw_action")
        self.numbers: dict[Rule, int] = {}
        self.rules: dict[int, Rule] = {}
        #: Entries of each; what has none may be given up once no program reads it.
        self.count: NDArray[np.int64] = np.zeros(len(maps.rules), np.int64)
        self._sets: dict[tuple[Range, ...], int] = {(): 0}

    def set_default(self, drop: bool) -> None:
        record = self._maps.rules.view[0]
        record["reason"] = self._reason(None) if drop else 0
        record["action"] = self._actions["FW_DENY" if drop else "FW_ALLOW"]

    @property
    def drops(self) -> bool:
        """Does the default?"""
        return int(self._maps.rules.view[0]["action"]) == self._actions["FW_DENY"]

    def adopt(self, candidates: Iterable[Rule], numbers: Iterable[int]) -> None:
        """Know again, of the rules that might be, those that these numbers have."""
        view = self._maps.rules.view
        by_record: dict[bytes, list[int]] = {}
        for number in numbers:
            by_record.setdefault(view[number].tobytes(), []).append(number)
        kept = {number for found in by_record.values() for number in found}
        sets = {int(view[number]["ports"]) for number in kept} - {0}
        contents = {self._maps.ports.view[one].tobytes(): one for one in sets}
        for rule in candidates:
            ports = contents.get(self._bits(rule.ports).tobytes()) if rule.ports else 0
            if ports is None:
                continue
            for number in by_record.get(self._record(rule, ports).tobytes(), ()):
                if number not in self.rules:
                    self.numbers[rule], self.rules[number] = number, rule
                    self._sets[rule.ports] = ports
                    break
        # What nobody knows any more keeps its place until its entries are gone.
        for number in kept - self.rules.keys():
            stranger = Rule("object", "deny", name="\0unknown", index=number)
            self.numbers[stranger], self.rules[number] = number, stranger
            self._sets[(("unknown", int(view[number]["ports"]), 0),)] = int(view[number]["ports"])

    def number(self, rule: Rule) -> int:
        """FirewallFull when there is no room for another."""
        known = self.numbers.get(rule)
        if known is not None:
            return known
        number = next((n for n in range(1, len(self.count)) if n not in self.rules), 0)
        if not number:
            raise FirewallFull(f"there are {len(self.rules)} rules, and there is no room for more")
        self._maps.rules.view[number] = self._record(rule, self._set(rule.ports))
        self.numbers[rule], self.rules[number] = number, rule
        return number

    def tidy(self) -> None:
        """Give up the rules without entries, and port sets without rules, when no program can
        be reading them."""
        for number in [n for n in self.rules if not self.count[n]]:
            del self.numbers[self.rules.pop(number)]
            self._maps.rules.view[number] = np.zeros(1, self._maps.rules.view.dtype)[0]
        used = {int(self._maps.rules.view[n]["ports"]) for n in self.rules}
        self._sets = {k: n for k, n in self._sets.items() if n in used or not n}

    # ---- Inside --------------------------------------------------------------------

    def _record(self, rule: Rule, ports: int) -> NDArray[np.void]:
        record = np.zeros(1, self._maps.rules.view.dtype)
        record["action"] = self._actions[f"FW_{rule.action.upper()}"]
        record["ports"] = ports
        record["every_ns"] = min(_SECOND // rule.rate, 0xFFFFFFFF) if rule.rate else 0
        record["reason"] = self._reason(rule)
        return record[0]  # type: ignore[no-any-return]

    def _set(self, ports: tuple[Range, ...]) -> int:
        known = self._sets.get(ports)
        if known is not None:
            return known
        taken = set(self._sets.values())
        number = next((n for n in range(1, len(self._maps.ports)) if n not in taken), 0)
        if not number:
            raise FirewallFull(
                f"there are {len(taken) - 1} different lists of ports, with no room for more"
            )
        self._maps.ports.view[number] = self._bits(ports)[0]
        self._sets[ports] = number
        return number

    def _bits(self, ports: tuple[Range, ...]) -> NDArray[np.void]:
        made = np.zeros(1, self._maps.ports.view.dtype)
        open_ = np.zeros((3, 65536), np.uint8)
        for protocol, first, last in ports:
            table = _TABLES.index(protocol)
            made["protocols"] |= np.uint64(1 << table)
            if table < 3:
                open_[table, first : last + 1] = 1
        made["bits"] = np.packbits(open_, axis=1, bitorder="little").view("<u8")
        return made
