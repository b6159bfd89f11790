"""What a Firewall object may say beyond types, and what its words mean."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from lockgate.objects.address import pack_cidrs
from lockgate.objects.errors import FieldError
from lockgate.objects.model import FirewallPort, FirewallRule
from lockgate.objects.names import check_port

__all__ = ["RATE_MAX", "Range", "check_rule", "moment", "port_ranges"]

#: Packets a second. At one a nanosecond a limit is none.
RATE_MAX = 1_000_000_000
#: (protocol, first port, last port); ICMP has no ports: 0, 0.
Range = tuple[str, int, int]


def check_rule(rule: FirewallRule, path: str) -> None:
    """Raises FieldError for the first fault; `path` is the rule's."""
    if not rule.from_:
        raise FieldError(f"{path}.from", "at least one CIDR block", rule.from_)
    _, _, bad = pack_cidrs(rule.from_)
    if bad:
        raise FieldError(
            f"{path}.from[{bad[0]}]",
            "a CIDR block such as 192.0.2.0/24 or 2001:db8::/32",
            rule.from_[bad[0]],
        )
    port_ranges(rule.ports, f"{path}.ports")
    rate = rule.packets_per_second
    if rate and rule.action == "Deny":
        raise FieldError(f"{path}.packetsPerSecond", "none, as the action is Deny", rate)
    if not 0 <= rate <= RATE_MAX:
        raise FieldError(f"{path}.packetsPerSecond", f"a number from 1 to {RATE_MAX}", rate)
    if rule.expires:
        moment(rule.expires, f"{path}.expires")


def port_ranges(ports: Sequence[FirewallPort], path: str) -> tuple[Range, ...]:
    """In order, each once; none: all packets, with ports or without. Raises FieldError."""
    found: set[Range] = set()
    for index, item in enumerate(ports):
        below = f"{path}[{index}]"
        if item.protocol == "ICMP":
            if item.port is not None or item.end_port is not None:
                raise FieldError(f"{below}.port", "none, as ICMP has no ports", item.port)
            found.add(("ICMP", 0, 0))
            continue
        if item.port is None:
            if item.end_port is not None:
                raise FieldError(f"{below}.endPort", "none, as there is no port", item.end_port)
            found.add((item.protocol, 0, 65535))
            continue
        check_port(item.port, f"{below}.port")
        last = item.port if item.end_port is None else item.end_port
        if not item.port <= last <= 65535:
            raise FieldError(
                f"{below}.endPort", f"a number from port ({item.port}) to 65535", item.end_port
            )
        found.add((item.protocol, item.port, last))
    return tuple(sorted(found))


def moment(text: str, path: str) -> float:
    """A time of RFC 3339 in seconds since the epoch. Raises FieldError."""
    try:
        found = datetime.fromisoformat(text)
        if "T" not in text.upper():
            raise ValueError
        if found.tzinfo is None:
            found = found.replace(tzinfo=UTC)
        return found.timestamp()
    except (ValueError, OverflowError):
        raise FieldError(path, "a time such as 2030-01-31T12:00:00Z", text) from None
