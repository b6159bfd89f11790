"""Programs on pods' links: clsact filters in direct action.

Not tcx links, which cost what pods that come and go cannot afford: each tcx attach and each end
of an interface that has some waits for an RCU grace period (8 to 16 ms) for each direction, and
nobody else can change links meanwhile; a namespace with 50 such pods takes the kernel 1.4 s to end.
A filter goes in and away with its interface without any wait, is replaced as a whole (a packet
meets the old program or the new one), and needs nobody to hold it. It costs a packet some 20 ns.

What it does not give is the first word: programs in tcx run before all filters. Whose they are
and what follows, `lockgate.agent.guard` looks after.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping

from lockgate.net import dumps
from lockgate.net.dumps import FILTER_PARENTS, Direction
from lockgate.net.netlink import Batch, attribute, text

__all__ = ["Direction", "Programs", "add", "put", "remove", "seat"]

Programs = Mapping[Direction, tuple[str, int]]
"""Where → (name, descriptor) of a program."""

#: Where our filters are: the first priority there is, and a handle that nobody else is likely to
#: use: who adds a filter there replaces what has its handle.
_PRIORITY, _HANDLE = 1, 0x6C67

_NEWQDISC, _NEWTFILTER, _DELTFILTER = 36, 44, 45
_CREATE, _REPLACE = 0x400, 0x100
_TC = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_KIND, _OPTIONS = 1, 2
_CLSACT, _CLSACT_HANDLE = 0xFFFFFFF1, 0xFFFF0000
_BPF_FD, _BPF_NAME, _BPF_FLAGS = 6, 7, 8
_DIRECT_ACTION = 1
_ETH_P_ALL = 3


def add(batch: Batch, index: int, programs: Programs) -> None:
    """Put programs on an interface that is just being made, in their order."""
    _add_clsact(batch, index)
    _add_filters(batch, index, programs)


def put(index: int, programs: Programs) -> None:
    """Put programs on an interface, in their order, in place of earlier ones of ours. OSError
    with ENODEV if there is no interface, EINVAL if others left no room for ours."""
    with Batch() as batch:
        # By itself: at an `ingress` qdisc, filters for egress would end up at ingress.
        _add_clsact(batch, index)
        batch.send()
        _add_filters(batch, index, programs)
        batch.send()


def remove(index: int, direction: Direction) -> None:
    """Take our filter away. Nothing there is success."""
    payload = _TC.pack(0, index, _HANDLE, FILTER_PARENTS[direction], _info())
    with Batch() as batch:
        what = f"detach the {direction} program from interface {index}"
        fine = {errno.ENOENT, errno.ENODEV, errno.EINVAL}
        batch.add(what, _DELTFILTER, payload + attribute(_KIND, text("bpf")), 0, fine)
        batch.send()


def seat(index: int, direction: Direction) -> tuple[int, bool]:
    """Id of the program in our filter, 0 if that is gone; and whether it is the first filter
    that packets meet. OSError with ENODEV if there is no interface."""
    for place, one in enumerate(dumps.filters(index, direction)):
        if (one.priority, one.handle) == (_PRIORITY, _HANDLE):
            return one.program, place == 0
    return 0, False


def _info() -> int:
    return _PRIORITY << 16 | socket.htons(_ETH_P_ALL)


def _add_clsact(batch: Batch, index: int) -> None:
    # One that is there is left as it is; EINVAL says that it is of another kind.
    clsact = _TC.pack(0, index, _CLSACT_HANDLE, _CLSACT, 0) + attribute(_KIND, text("clsact"))
    batch.add(f"add clsact to interface {index}", _NEWQDISC, clsact, _CREATE)


def _add_filters(batch: Batch, index: int, programs: Programs) -> None:
    for direction, (name, fd) in programs.items():
        options = attribute(_BPF_FD, fd) + attribute(_BPF_NAME, text(name))
        options += attribute(_BPF_FLAGS, _DIRECT_ACTION)
        payload = _TC.pack(0, index, _HANDLE, FILTER_PARENTS[direction], _info())
        payload += attribute(_KIND, text("bpf")) + attribute(_OPTIONS, options)
        what = f"attach program {name} to interface {index}"
        batch.add(what, _NEWTFILTER, payload, _CREATE | _REPLACE)
