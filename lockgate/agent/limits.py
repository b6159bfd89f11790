"""How much of what all pods share one pod may use up (bpf/limit.h), and an event may carry."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["CAPTURE_MAX", "Limits"]

#: Bytes of its packet that an event can carry: EVENT_CAPTURE_MAX of bpf/types.h.
CAPTURE_MAX = 128

_PerSecond = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]


class Limits(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Of each pod, per second; after a pause a quarter of that at once. 0 = no limit."""

    #: ICMP errors and TCP resets that it is sent. Linux: net.ipv4.icmp_msgs_per_sec, per node
    answers: _PerSecond = 1000

    #: Connections that it begins. Absent: 20,000, or so many that it alone needs four seconds
    #: to fill the table of half-open ones
    connections: _PerSecond | None = None
    #: Verdicts and drops about it; a connection within the node has two verdicts
    events: _PerSecond = 50_000
    #: Packets in fragments that it sends or gets: the table of fragments has room for four seconds
    fragments: _PerSecond = 8_000

    def constants(self, half_open: int) -> dict[str, int]:
        """What one takes, in nanoseconds, by its name in bpf/config.h. `half_open`: elements of
        that map."""
        connections = self.connections
        if connections is None:
            connections = max(20_000, half_open // 4)
        return {
            "config_answer_ns": _nanoseconds(self.answers),
            "config_connection_ns": _nanoseconds(connections),
            "config_event_ns": _nanoseconds(self.events),
            "config_fragment_ns": _nanoseconds(self.fragments),
        }


def _nanoseconds(per_second: int) -> int:
    return 1_000_000_000 // per_second if per_second else 0
