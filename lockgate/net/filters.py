"""Programs on pods' links: clsact filters in direct action.

Not tcx links, which cost what pods that come and go cannot afford: each tcx attach and each end
of an interface that has some waits for an RCU grace period (8 to 16 ms) for each direction, and
nobody else can change links meanwhile; a namespace with 50 such pods takes the kernel 1.4 s to end.
A filter goes in and away with its interface without any wait, is replaced as a whole (a packet
meets the old program or the new one), and needs nobody to hold it. It costs a packet some 20 ns.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping

from lockgate.net.dumps import CLSACT, FILTER, FILTER_PARENTS, Direction
from lockgate.net.netlink import Batch, attribute, text

__all__ = ["Direction", "Programs", "add"]

Programs = Mapping[Direction, tuple[str, int]]
"""Where → (name, descriptor) of a program."""

_NEWQDISC, _NEWTFILTER = 36, 44
_CREATE, _REPLACE = 0x400, 0x100
_TC = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_KIND, _OPTIONS = 1, 2
_CLSACT_HANDLE = 0xFFFF0000
_BPF_FD, _BPF_NAME, _BPF_FLAGS = 6, 7, 8
_DIRECT_ACTION = 1
_ETH_P_ALL = 3


def add(batch: Batch, index: int, programs: Programs) -> None:
    """Put programs on an interface, in their order, in place of those of an earlier call."""
    clsact = _TC.pack(0, index, _CLSACT_HANDLE, CLSACT, 0) + attribute(_KIND, text("clsact"))
    batch.add(f"add clsact to interface {index}", _NEWQDISC, clsact, _CREATE, {errno.EEXIST})
    for direction, (name, fd) in programs.items():
        info = FILTER << 16 | socket.htons(_ETH_P_ALL)
        options = attribute(_BPF_FD, fd) + attribute(_BPF_NAME, text(name))
        options += attribute(_BPF_FLAGS, _DIRECT_ACTION)
        payload = _TC.pack(0, index, FILTER, FILTER_PARENTS[direction], info)
        payload += attribute(_KIND, text("bpf")) + attribute(_OPTIONS, options)
        what = f"attach program {name} to interface {index}"
        batch.add(what, _NEWTFILTER, payload, _CREATE | _REPLACE)
