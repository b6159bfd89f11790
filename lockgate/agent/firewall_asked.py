"""What the firewall in force would do with a packet, for who asks: read from the tables that
programs read, by the same way through them, and nothing is counted.

It knows no connections: what the default lets pass because the node asked for it is not told.
"""

from __future__ import annotations

import socket
import time
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np

from lockgate.agent.firewall_tables import FirewallTables
from lockgate.compile.firewall import Rule
from lockgate.objects.address import is_ipv4, parse_address
from lockgate.objects.firewall import ranges_text

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["Asked", "ask", "judge", "rule_row"]

#: FW_STEPS in bpf/firewall_maps.h: after so many entries the default decides.
_MOST = 128


class Asked(msgspec.Struct, forbid_unknown_fields=True):
    """A whole packet that comes by the card with this index."""

    ifindex: int
    source: str
    destination: str
    protocol: str
    port: int = 0


def ask(agent: Agent, asked: Asked) -> dict[str, Any] | None:
    """None where no firewall looks at what comes by that card. ValueError for what is no address.
    From the worker."""
    tables = agent.firewall.tables
    try:
        place = agent.edge.places.get(socket.if_indextoname(asked.ifindex))
    except OSError:
        place = None
    if tables is None or place is None or place.mode is None or not place.faces_clients:
        return None
    links, roles = agent.dp.link_roles.items()
    underlay = agent.dp.object.schema.enum("link_role")["LINK_UNDERLAY"]
    inside = (asked.ifindex, underlay) in zip(links.tolist(), roles.tolist(), strict=True)
    return judge(tables, asked, inside=inside, now=time.time())


def judge(tables: FirewallTables, asked: Asked, *, inside: bool, now: float) -> dict[str, Any]:
    """`cause` of a drop or None, and by which prefix and rule; both None for the default. `inside`:
    the card leads to other nodes."""
    source, destination = parse_address(asked.source), parse_address(asked.destination)
    if source == destination:
        return {"cause": "spoofed-source", "prefix": None, "rule": None}
    high, low = int.from_bytes(source[:8]), int.from_bytes(source[8:])
    number = tables.head((high, low, 128)) or tables.around((high, low, 128))
    for _ in range(_MOST):
        if not number:
            break
        rule = tables.rules.rules[int(tables.maps.entries.view["rule"][number])]
        ends = float(tables.ends[number])
        if (not ends or now < ends) and _has_port(rule, asked, is_ipv4(source)):
            return {
                "cause": _obey(rule, destination, inside),
                "prefix": tables.prefixes(np.array([number])).text(0),
                "rule": rule_row(rule),
            }
        number = int(tables.following[number])
    cause = "firewall" if tables.rules.drops else None
    return {"cause": cause, "prefix": None, "rule": None}


def rule_row(rule: Rule) -> dict[str, Any]:
    """A rule as answers have it."""
    return {
        "action": rule.action,
        "ports": ranges_text(rule.ports),
        "rate": rule.rate,
        "source": rule.source,
        "name": rule.name,
        "rule": rule.index if rule.source == "object" else None,
    }


def _has_port(rule: Rule, asked: Asked, ipv4: bool) -> bool:
    if not rule.ports:
        return True
    if asked.protocol in ("ICMP", "ICMPv6"):
        return (asked.protocol == "ICMP") == ipv4 and any(one[0] == "ICMP" for one in rule.ports)
    return any(
        protocol == asked.protocol and first <= asked.port <= last
        for protocol, first, last in rule.ports
    )


def _obey(rule: Rule, destination: bytes, inside: bool) -> str | None:
    if rule.action == "deny":
        return "firewall"
    passes = {
        "allow": True,
        "member": inside,
        "unspecified": _to_many(destination),
        "nobody": False,
    }
    return None if passes[rule.action] else "spoofed-source"


def _to_many(address: bytes) -> bool:
    if is_ipv4(address):
        return address[12] >> 4 == 0xE or address[12:] == b"\xff" * 4
    return address[0] == 0xFF
