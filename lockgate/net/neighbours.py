"""Hearing of neighbour and link changes."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable

__all__ = ["watch"]

_NETLINK_ROUTE = 0
_GROUPS = 0x1 | 0x4 | 0x40 | 0x400  # RTMGRP_LINK, _NEIGH, _IPV4_ROUTE, _IPV6_ROUTE


def watch(changed: Callable[[], None]) -> Callable[[], None]:
    """Call `changed` from the running loop after neighbours, links or routes of this thread's
    namespace changed, several changes at a time. Returns what ends the watch."""
    loop = asyncio.get_running_loop()
    sock = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_ROUTE)
    sock.bind((0, _GROUPS))

    def readable() -> None:
        # What changed is read anew anyway, so the messages (and lost ones) tell enough by coming.
        with contextlib.suppress(OSError):
            while sock.recv(65536):
                pass
        changed()

    def stop() -> None:
        loop.remove_reader(sock)
        sock.close()

    loop.add_reader(sock, readable)
    return stop
