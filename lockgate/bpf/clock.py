"""What time the programs go by: the kernel's count of ticks, which they read without a call."""

from __future__ import annotations

import os
import struct
import time

from lockgate.bpf import syscall

__all__ = ["constants"]

_CLOCK_MONOTONIC_COARSE = 6  # include/uapi/linux/time.h
_SCHED_CLS = 3
_JIFFIES64 = 118  # enum bpf_func_id
#: The count is that much short of 2³² at boot (INITIAL_JIFFIES in include/linux/jiffies.h).
_FIRST = 300


def constants() -> dict[str, int]:
    """Ticks of a second, by its name in bpf/config.h; 0 where the count is not that of
    CLOCK_MONOTONIC_COARSE within a second, as user space reckons ages by that. They part only
    where the kernel loses ticks, before it has its timers or without `nohz` and `highres`."""
    # The clock moves with each tick, and its resolution says so.
    hz = round(1 / time.clock_getres(_CLOCK_MONOTONIC_COARSE))
    passed = _count() + _FIRST * hz
    behind = round(time.clock_gettime(_CLOCK_MONOTONIC_COARSE) * hz) - passed
    return {"config_hz": hz if behind % (1 << 32) < hz else 0}


def _count() -> int:
    """jiffies, the lower 32 bits."""
    call, leave = struct.pack("<BBhi", 0x85, 0, 0, _JIFFIES64), struct.pack("<BBhi", 0x95, 0, 0, 0)
    program = syscall.prog_load(_SCHED_CLS, call + leave, "jiffies")
    try:
        return syscall.prog_test_run(program, bytes(64), syscall.skb_context()).retval & 0xFFFFFFFF
    finally:
        os.close(program)
