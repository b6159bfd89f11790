"""What the words of a Firewall object mean: ports, times."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime

from lockgate.objects.errors import FieldError
from lockgate.objects.model import FirewallPort
from lockgate.objects.names import check_port

__all__ = [
    "LIFETIME_MAX",
    "RATE_MAX",
    "Range",
    "moment",
    "port_ranges",
    "ranges_text",
    "read_ranges",
]

#: Packets a second. At one a nanosecond a limit is none.
RATE_MAX = 1_000_000_000
#: Seconds: a hundred years.
LIFETIME_MAX = 36_500 * 86_400
#: (protocol, first port, last port); ICMP has no ports: 0, 0.
Range = tuple[str, int, int]


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


def read_ranges(texts: Sequence[str]) -> tuple[Range, ...]:
    """Of texts such as tcp, tcp/80, udp/30000-32767 and icmp. Raises FieldError."""
    ports = []
    for text in texts:
        protocol, slash, range_ = text.partition("/")
        first, dash, last = range_.partition("-")
        numbers = [one for one in (first, last) if one]
        if (
            protocol.upper() not in ("TCP", "UDP", "SCTP", "ICMP")
            or any(not (one.isascii() and one.isdigit()) or len(one) > 5 for one in numbers)
            or (slash and not first)
            or (dash and not last)
        ):
            raise FieldError("ports", "ports such as tcp/80, udp/30000-32767, sctp or icmp", text)
        ports.append(
            FirewallPort(
                protocol=protocol.upper(),  # type: ignore[arg-type]
                port=int(first) if first else None,
                end_port=int(last) if last else None,
            )
        )
    return port_ranges(ports, "ports")


def ranges_text(ranges: Sequence[Range]) -> list[str]:
    """As `read_ranges` takes them."""
    texts = []
    for protocol, first, last in ranges:
        text = protocol.lower()
        if protocol != "ICMP" and (first, last) != (0, 65535):
            text += f"/{first}" if first == last else f"/{first}-{last}"
        texts.append(text)
    return texts


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
