"""What the firewall does with a packet, in plain Python (docs/firewall.md).

The kernel's program is compared with `decide` (tests/bytecode/test_firewall_property.py), so this
says each thing once and as simply as it can be said. It knows no connections: what the default lets
pass because the node asked for it is `known`, for the caller to say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Literal

from lockgate.objects.firewall import Range, moment, port_ranges
from lockgate.objects.model import Firewall
from lockgate.spec.policy import selects

__all__ = ["Decision", "Packet", "Rule", "decide", "rules_of"]

Action = Literal["Allow", "Deny"]
_PROTOCOLS = {6: "TCP", 17: "UDP", 132: "SCTP"}
_MULTICAST = (ip_network("224.0.0.0/4"), ip_network("ff00::/8"))
_BROADCAST = IPv4Address("255.255.255.255")
_UNSPECIFIED = ("0.0.0.0/32", "::/128")
#: Sources that nobody can have.
_NOBODY = ("0.0.0.0/8", "127.0.0.0/8", "224.0.0.0/3", "::/96", "ff00::/8")


@dataclass(frozen=True)
class Rule:
    """One rule of an object, `name` and its place there; or of a command: name ""."""

    action: Action
    prefixes: tuple[str, ...]
    ports: tuple[Range, ...] = ()
    name: str = ""
    index: int = 0
    expires: float | None = None


@dataclass(frozen=True)
class Packet:
    """`port` is the destination's, 0 for protocols without; `fragment`: a later one."""

    source: str
    destination: str
    protocol: int
    port: int = 0
    fragment: bool = False


@dataclass(frozen=True)
class Decision:
    """`cause` "" passes; `rule` None: built in, or the default."""

    cause: Literal["", "firewall", "spoofed-source"]
    rule: Rule | None = None


def rules_of(
    firewalls: Iterable[Firewall], labels: Mapping[str, str]
) -> tuple[list[Rule], Literal["Allow", "Drop"]]:
    """Of all objects for a node with these labels, and the default."""
    rules: list[Rule] = []
    default: Literal["Allow", "Drop"] = "Allow"
    for item in firewalls:
        spec = item.spec
        if spec.node_selector is not None and not selects(spec.node_selector, labels):
            continue
        if spec.default == "Drop":
            default = "Drop"
        for index, rule in enumerate(spec.rules):
            expires = moment(rule.expires, "expires") if rule.expires else None
            ports = port_ranges(rule.ports, "ports")
            rules.append(
                Rule(rule.action, tuple(rule.from_), ports, item.metadata.name, index, expires)
            )
    return rules, default


def decide(
    packet: Packet,
    rules: Iterable[Rule],
    default: Literal["Allow", "Drop"],
    now: float,
    *,
    own: Iterable[str] = (),
    members: Iterable[str] = (),
    allowed: Iterable[str] = (),
    inside: bool = False,
    known: bool = False,
) -> Decision:
    """`own`: the node's addresses; `members`: those of the cluster's nodes and pods, which come by
    cards that lead there (`inside`); `allowed`: API servers. All are prefixes."""
    source, destination = ip_address(packet.source), ip_address(packet.destination)
    if source == destination:
        return Decision("spoofed-source")
    # The most specific of what is built in; a node's own address before others'.
    builtin = [
        (-block.prefixlen, rank)
        for rank, prefixes in enumerate((_UNSPECIFIED, (*_NOBODY, *own), members, allowed))
        for block in (ip_network(prefix, strict=False) for prefix in prefixes)
        if source in block
    ]
    if builtin:
        many = destination == _BROADCAST or any(destination in block for block in _MULTICAST)
        passes = (many, False, inside, True)[min(builtin)[1]]
        return Decision("" if passes else "spoofed-source")

    matching = [
        (-network.prefixlen, rule.action != "Deny", not rule.name, rule.name, rule.index, rule)
        for rule in rules
        if (rule.expires is None or now < rule.expires) and _matches(rule, packet)
        for network in (ip_network(prefix, strict=False) for prefix in rule.prefixes)
        if source in network
    ]
    if matching:
        rule = min(matching, key=lambda one: one[:-1])[-1]
        return Decision("firewall" if rule.action == "Deny" else "", rule)
    return Decision("firewall" if default == "Drop" and not known else "")


def _matches(rule: Rule, packet: Packet) -> bool:
    if not rule.ports:
        return True
    if packet.protocol == (58 if ":" in packet.source else 1):
        return any(protocol == "ICMP" for protocol, _, _ in rule.ports)
    ranges = [one for one in rule.ports if one[0] == _PROTOCOLS.get(packet.protocol)]
    if packet.fragment:
        return rule.action == "Allow" and bool(ranges)
    return any(first <= packet.port <= last for _, first, last in ranges)
