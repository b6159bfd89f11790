"""Hearing of changes to links, addresses, neighbours and default routes."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable

__all__ = ["concerns", "watch"]

_NETLINK_ROUTE = 0
# RTMGRP_LINK, _NEIGH, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE
_GROUPS = 0x1 | 0x4 | 0x10 | 0x40 | 0x100 | 0x400
_HEADER = struct.Struct("=IHHII")
_INDEX = struct.Struct("=4xi")
# RTM_NEWLINK, RTM_DELLINK, RTM_NEWADDR, RTM_DELADDR, RTM_NEWNEIGH, RTM_DELNEIGH: in all of them
# an interface's index follows four bytes.
_OF_LINK = frozenset((16, 17, 20, 21, 28, 29))
_ROUTES = frozenset((24, 25))  # RTM_NEWROUTE, RTM_DELROUTE


def watch(changed: Callable[[], None], below: int) -> Callable[[], None]:
    """Call `changed` from the running loop after something of the interfaces with an index under
    `below`, or a default route, changed in this thread's namespace; several changes at a time.
    Returns what ends the watch."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_ROUTE)
    sock.bind((0, _GROUPS))

    def readable() -> None:
        # What changed is read anew anyway, so the messages tell enough by coming.
        concerned = False
        try:
            while data := sock.recv(65536):
                concerned |= concerns(data, below)
        except BlockingIOError:
            pass
        except OSError:
            concerned = True  # some were lost
        if concerned:
            changed()

    def stop() -> None:
        loop.remove_reader(sock)
        sock.close()

    loop.add_reader(sock, readable)
    return stop


def concerns(data: bytes, below: int) -> bool:
    """Whether any of the netlink messages in `data` is about such an interface, or a default
    route."""
    at = 0
    while at + _HEADER.size <= len(data):
        length, type_, _, _, _ = _HEADER.unpack_from(data, at)
        if length < _HEADER.size:
            return True
        body = at + _HEADER.size
        if type_ in _OF_LINK and _INDEX.unpack_from(data, body)[0] < below:
            return True
        if type_ in _ROUTES and data[body + 1] == 0:  # the length of the prefix
            return True
        at += length + 3 & ~3
    return False
