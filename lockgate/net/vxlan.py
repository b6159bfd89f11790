"""The kernel's VXLAN device in external mode, in the calling thread's namespace.

External: neither addresses nor a network identifier are the device's; they come with each packet
(a BPF program or a route gives them), and with each packet that arrives they can be read. The
device does no ARP and learns nothing: whatever MAC a frame has, it arrives.
"""

from __future__ import annotations

import errno
import os
import socket

from lockgate.net import dumps
from lockgate.net.netlink import Batch

__all__ = ["OVERHEAD4", "OVERHEAD6", "ensure", "remove", "supported"]

#: Bytes that an inner IP packet grows by: Ethernet 14, VXLAN 8, UDP 8, IP 20 or 40 (RFC 7348 5).
OVERHEAD4, OVERHEAD6 = 50, 70


def ensure(name: str, port: int, mtu: int) -> int:
    """Its index. A device of that name that is of another kind or port is replaced. Raises OSError
    if it can't be, with EOPNOTSUPP if the kernel has no such devices."""
    index = _index(name)
    if index is not None and dumps.vxlan_port(index) != port:
        remove(name)
        index = None
    with Batch() as batch:
        if index is None:
            batch.vxlan(name, port, mtu)
            batch.send()
            index = socket.if_nametoindex(name)
        batch.set_mtu(index, mtu)
        batch.up(index)
        try:
            batch.send()
        except OSError as error:
            if error.errno != errno.EADDRINUSE and error.errno != errno.EEXIST:
                raise
            remove(name)
            what = f"cannot bring up {name}: another VXLAN device or socket has UDP port {port}"
            raise OSError(error.errno, what) from error
    return index


def remove(name: str) -> bool:
    """False if there was none."""
    if _index(name) is None:
        return False
    with Batch() as batch:
        batch.remove(name)
        batch.send()
    return True


def supported() -> bool:
    """Has this kernel such devices? Tried with one that is never brought up."""
    name = f"lgprobe{os.getpid() % 1000000}"
    try:
        with Batch() as batch:
            batch.vxlan(name, 8472, 1450)
            batch.send()
    except OSError as error:
        if error.errno in (errno.EOPNOTSUPP, errno.ENODEV):
            return False
        raise
    remove(name)
    return True


def _index(name: str) -> int | None:
    try:
        return socket.if_nametoindex(name)
    except OSError:
        return None
