"""The connected UDP sockets of a network namespace, and how one is ended.

NETLINK_SOCK_DIAG (sock_diag(7), linux/inet_diag.h): what `ss -u` and `ss -K` use. For the
namespace of the calling thread.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

from lockgate.net.dumps import ask

__all__ = ["ConnectedUdp", "abort", "connected_udp"]

_SOCK_DIAG = 4  # netlink family
_BY_FAMILY, _DESTROY = 20, 21
_DUMP, _REQUEST_ACK = 0x301, 5
_QUERY = struct.Struct("=BBBxI")  # family, protocol, extensions, states
_ESTABLISHED = 1 << 1  # what a connected UDP socket is in
_ID_AT, _ID_SIZE = 4, 48  # struct inet_diag_msg: inet_diag_sockid is second
_ID = struct.Struct("!HH16s16s")  # ports and addresses, source first
_COOKIE = struct.Struct("=Q")
_MAPPED = bytes(10) + b"\xff\xff"


@dataclass(frozen=True, slots=True)
class ConnectedUdp:
    """`cookie` is that of bpf_get_socket_cookie(); `address` has 16 bytes, as everywhere."""

    family: int
    cookie: int
    address: bytes  # of the other end
    port: int
    id: bytes  # struct inet_diag_sockid


def connected_udp() -> list[ConnectedUdp]:
    """All of them, of both families. OSError(ENOENT): the kernel has no udp_diag."""
    return [made for family in (socket.AF_INET, socket.AF_INET6) for made in _dump(int(family))]


def abort(one: ConnectedUdp) -> bool:
    """End a socket: its owner's next receive fails with ECONNABORTED, and what it sends with
    EDESTADDRREQ until it connects again. False: it is no longer there, or another. OSError
    (EOPNOTSUPP): the kernel cannot (INET_DIAG_DESTROY); EPERM: without CAP_NET_ADMIN."""
    query = _QUERY.pack(one.family, socket.IPPROTO_UDP, 0, _ESTABLISHED) + one.id
    try:
        list(ask(_DESTROY, _REQUEST_ACK, query, _SOCK_DIAG, "end a UDP socket"))
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise
    return True


def _dump(family: int) -> Iterator[ConnectedUdp]:
    query = _QUERY.pack(family, socket.IPPROTO_UDP, 0, _ESTABLISHED) + bytes(_ID_SIZE)
    for body in ask(_BY_FAMILY, _DUMP, query, _SOCK_DIAG, "list UDP sockets"):
        yield _one(family, body[_ID_AT : _ID_AT + _ID_SIZE])


def _one(family: int, id: bytes) -> ConnectedUdp:
    _, port, _, address = _ID.unpack_from(id)
    (cookie,) = _COOKIE.unpack_from(id, _ID_SIZE - _COOKIE.size)
    if family == socket.AF_INET:
        address = _MAPPED + address[:4]
    return ConnectedUdp(family, cookie, address, port, id)
