"""This boot of the machine, and the clock that counts from it: the one of events in the kernel
(bpf_ktime_get_boot_ns). Nobody sets it, unlike the time of day."""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["Moment", "now", "this_boot"]

#: A boot of the machine, and nanoseconds since.
Moment = tuple[str, int]


def this_boot() -> str:
    """What tells boots of machines apart; the same in all containers (proc(5), boot_id)."""
    return Path("/proc/sys/kernel/random/boot_id").read_text()[:8]


def now() -> int:
    """Nanoseconds since this boot, sleep of the machine included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
