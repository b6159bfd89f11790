"""What the firewall of one node is made of: rules, each with its prefixes. Pure.

Precedence and what is built in are written down in docs/firewall.md.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lockgate.compile.labels import Index, selector_key
from lockgate.compile.prefixes import Prefixes, parse
from lockgate.objects.errors import FieldError
from lockgate.objects.firewall import Range, moment, port_ranges
from lockgate.objects.model import Cluster, Firewall, FirewallRule, LabelSelector, Node

__all__ = ["COMMAND", "Facts", "Memory", "Rule", "Wanted", "builtin_rules", "wanted"]

Action = Literal["allow", "deny", "member", "nobody", "unspecified"]
Source = Literal["builtin", "object", "command"]
#: The index of rules that are of no object.
COMMAND = -1
_NOBODY = ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3", "::/96", "ff00::/8")
_UNSPECIFIED = ("0.0.0.0/32", "::/128")


@dataclass(frozen=True, slots=True)
class Rule:
    """What its prefixes share; two that are equal are one."""

    source: Source
    action: Action
    ports: tuple[Range, ...] = ()
    rate: int = 0  # packets a second of each source, 0 = any
    name: str = ""  # of the object
    index: int = COMMAND  # in the object's rules

    @property
    def order(self) -> tuple[object, ...]:
        """Of the rules of one prefix the first that matches decides."""
        builtin = ("unspecified", "nobody", "member", "allow", "deny").index(self.action)
        rank = builtin if self.source == "builtin" else 5 + (self.action != "deny")
        return rank, self.source == "command", self.name, self.index, self.ports, self.rate


@dataclass(frozen=True, slots=True)
class Wanted:
    """All that is for one node, but for what commands added. Of each rule its prefixes, sorted,
    and when it expires (seconds since the epoch, 0 = never)."""

    rules: Mapping[Rule, tuple[Prefixes, float]]
    drop_by: str = ""  # the first object that says so; "": the default is to allow
    errors: list[str] = field(default_factory=list)

    @property
    def drop(self) -> bool:
        """Is it the default?"""
        return bool(self.drop_by)

    @property
    def needed(self) -> bool:
        """Is there anything that somebody asked for?"""
        return self.drop or any(rule.source == "object" for rule in self.rules)


@dataclass(frozen=True, slots=True)
class Facts:
    """What is built in: prefixes of the node itself, of the cluster's nodes and pods, of API
    servers."""

    own: frozenset[str] = frozenset()
    members: frozenset[str] = frozenset()
    servers: frozenset[str] = frozenset()

    @classmethod
    def of(cls, cluster: Cluster, node: str, cards: Iterable[str]) -> Facts:
        """`cards`: the addresses of the node's cards."""
        me = cluster.nodes.get(node)
        own = {_host(address) for address in cards}
        own |= set(me.pod_cidrs) if me is not None else set()
        own |= _addresses(me)
        members: set[str] = set()
        for name, other in cluster.nodes.items():
            if name != node:
                members |= _addresses(other) | set(other.pod_cidrs)
        servers = {
            _host(address)
            for (namespace, _), item in cluster.slices.items()
            if namespace == "default"
            and item.service == "kubernetes"
            and item.address_type != "FQDN"
            for endpoint in item.endpoints
            for address in endpoint.addresses
        }
        return cls(frozenset(own), frozenset(members - own), frozenset(servers - own - members))


class Memory:
    """Prefixes that were parsed, by the list that they are of: objects stay the same object while
    nothing about them changes, and a list may be long."""

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[str], Prefixes, list[int]]] = {}

    def parse(self, texts: list[str]) -> tuple[Prefixes, list[int]]:
        known = self._known.get(id(texts))
        if known is None or known[0] is not texts:
            found, bad = parse(texts)
            known = self._known[id(texts)] = texts, found.unique(), bad
        return known[1], known[2]

    def keep(self, lists: Iterable[list[str]]) -> None:
        """Forget all others."""
        ids = {id(one) for one in lists}
        self._known = {key: value for key, value in self._known.items() if key in ids}


def builtin_rules(facts: Facts) -> dict[Rule, tuple[Prefixes, float]]:
    """What wins over all that anybody asks for."""
    found = {
        "unspecified": _UNSPECIFIED,
        "nobody": (*_NOBODY, *facts.own),
        "member": tuple(facts.members),
        "allow": tuple(facts.servers),
    }
    rules: dict[Rule, tuple[Prefixes, float]] = {}
    for action, texts in found.items():
        prefixes, _ = parse(sorted(texts))
        if len(prefixes):
            rules[Rule("builtin", action)] = prefixes.unique(), 0.0  # type: ignore[arg-type]
    return rules


def wanted(
    firewalls: Iterable[Firewall],
    labels: Mapping[str, str],
    facts: Facts,
    memory: Memory,
    now: float,
) -> Wanted:
    """Of the objects that are for a node with these labels. What can't be read is named, and left
    out; rules that have expired are."""
    rules = builtin_rules(facts)
    errors: list[str] = []
    drop_by = ""
    lists = []
    for item in sorted(firewalls, key=lambda one: one.metadata.name):
        spec = item.spec
        if spec.node_selector is not None and not _selects(spec.node_selector, labels):
            continue
        if spec.default == "Drop":
            drop_by = drop_by or item.metadata.name
        for index, rule in enumerate(spec.rules):
            lists.append(rule.from_)
            prefixes, bad = memory.parse(rule.from_)
            path = f"spec.rules[{index}]"
            title = f"Firewall {item.metadata.name}: {path}"
            errors += [
                f"{title}.from[{at}]: not a CIDR block: {rule.from_[at]!r}" for at in bad[:1]
            ]
            if len(bad) > 1:
                errors.append(f"{title}.from: {len(bad) - 1} more that are no CIDR blocks")
            try:
                made, expires = _rule(item.metadata.name, index, rule)
            except FieldError as error:
                errors.append(f"Firewall {item.metadata.name}: {error.path}: {error.text}")
                continue
            if len(prefixes) and not 0 < expires <= now:
                rules[made] = prefixes, expires
    memory.keep(lists)
    return Wanted(rules, drop_by, errors)


def _rule(name: str, index: int, rule: FirewallRule) -> tuple[Rule, float]:
    path = f"spec.rules[{index}]"
    ports = port_ranges(rule.ports, f"{path}.ports")
    expires = moment(rule.expires, f"{path}.expires") if rule.expires else 0.0
    action: Action = "deny" if rule.action == "Deny" else "allow"
    rate = rule.packets_per_second if action == "allow" else 0
    return Rule("object", action, ports, max(0, rate), name, index), expires


def _selects(selector: LabelSelector, labels: Mapping[str, str]) -> bool:
    index = Index()
    index.add(0, labels.items())
    return bool(index.match(selector_key(selector)))


def _host(address: str) -> str:
    host = address.partition("/")[0]
    return f"{host}/{128 if ':' in host else 32}"


def _addresses(node: Node | None) -> set[str]:
    found = node.status.addresses if node is not None else []
    return {_host(one.address) for one in found if one.type == "InternalIP"}
