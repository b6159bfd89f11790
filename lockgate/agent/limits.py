"""How much of what all pods share one pod may use up (bpf/limit.h)."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["Limits"]

_PerSecond = Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)]


class Limits(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Of each pod, per second; after a pause a quarter of that at once. 0 = no limit."""

    #: ICMP errors and TCP resets that it is sent. Linux: net.ipv4.icmp_msgs_per_sec, per node
    answers: _PerSecond = 1000

    def constants(self) -> dict[str, int]:
        """What one takes, in nanoseconds, by its name in bpf/config.h."""
        return {"config_answer_ns": _nanoseconds(self.answers)}


def _nanoseconds(per_second: int) -> int:
    return 1_000_000_000 // per_second if per_second else 0
