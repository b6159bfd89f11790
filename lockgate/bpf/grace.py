"""Waiting until no program can still see what it saw before.

membarrier(MEMBARRIER_CMD_GLOBAL) runs synchronize_rcu() (kernel/sched/membarrier.c), but
returns at once when one CPU is online, where a preempted program may still be reading, and
is refused with nohz_full CPUs. Then we replace an element of a map of maps of our own: that
update runs synchronize_rcu() too, since programs must let go of the old inner map before
user space may touch it (maybe_wait_bpf_programs in kernel/bpf/syscall.c, since Linux 5.0).
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading

from . import syscall
from .syscall import MapType

__all__ = ["memory_barrier", "wait_grace"]

_CMD_QUERY = 0
_CMD_GLOBAL = 1
_libc = ctypes.CDLL(None, use_errno=True)
_SYS_MEMBARRIER = syscall.syscall_numbers()[1]
_lock = threading.Lock()
_scratch: tuple[int, int] | None = None


def _membarrier(command: int) -> int:
    result: int = _libc.syscall(_SYS_MEMBARRIER, command, 0, 0)
    return result if result >= 0 else -ctypes.get_errno()


def membarrier_global() -> bool:
    """Does this kernel offer MEMBARRIER_CMD_GLOBAL now?"""
    commands = _membarrier(_CMD_QUERY)
    return commands > 0 and bool(commands & _CMD_GLOBAL)


def wait_grace() -> None:
    """Return after an RCU grace period: every program run that began before the call has
    ended. Takes milliseconds (up to some tens) and blocks only this thread. Cost is per call,
    so call once per change, not per element. OSError if the kernel offers no way."""
    if _online_cpus() > 1 and _membarrier(_CMD_GLOBAL) == 0:
        return
    _replace_inner()


def memory_barrier() -> None:
    """A barrier for this thread, on machines that reorder loads: system calls that reach the
    scheduler's barriers order memory. Nothing weaker is reachable from Python."""
    _membarrier(_CMD_QUERY)


def _online_cpus() -> int:
    return int(os.sysconf("SC_NPROCESSORS_ONLN"))


def _replace_inner() -> None:
    global _scratch
    with _lock:
        if _scratch is None:
            inner = syscall.map_create(MapType.ARRAY, 4, 4, 1, name="grace_in")
            try:
                outer = syscall.map_create(
                    MapType.ARRAY_OF_MAPS, 4, 4, 1, name="grace", inner_map_fd=inner
                )
            except OSError as error:
                os.close(inner)
                raise OSError(
                    error.errno or errno.ENOSYS,
                    f"cannot wait for a grace period: neither membarrier nor maps of maps "
                    f"work here: {error.strerror}",
                ) from error
            _scratch = inner, outer
        inner, outer = _scratch
        syscall.map_update(outer, bytes(4), inner.to_bytes(4, "little"), name="grace")
