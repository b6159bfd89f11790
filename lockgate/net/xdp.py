"""What the kernel says of XDP on an interface of the calling thread's namespace."""

from __future__ import annotations

import errno
import fcntl
import functools
import socket
import struct
from ctypes import addressof, create_string_buffer
from dataclasses import dataclass
from typing import Literal

from lockgate.net.dumps import ATTRIBUTE, ask, attributes

__all__ = ["BASIC", "NDO_XMIT", "State", "fill_checksums", "state", "use_gro"]

Mode = Literal["", "native", "generic", "offloaded", "several"]

#: `enum netdev_xdp_act` of linux/netdev.h (Linux 6.3): what the driver can.
BASIC, NDO_XMIT = 1, 4

_ONE = 0x1  # NLM_F_REQUEST
_NETLINK_GENERIC = 16
_GETLINK = 18
_IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
_IFLA_LINKINFO, _INFO_KIND = 18, 1
_IFLA_XDP, _XDP_ATTACHED, _XDP_PROG_ID = 43, 2, 4
_MODES: tuple[Mode, ...] = ("", "native", "generic", "offloaded", "several")  # XDP_ATTACHED_*
_GENERIC = struct.Struct("=BBH")  # command, version
_CTRL, _GETFAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2  # linux/genetlink.h
_DEV_GET, _DEV_IFINDEX, _DEV_XDP_FEATURES = 1, 1, 3
_SIOCETHTOOL, _GGRO, _SGRO, _STXCSUM = 0x8946, 0x2B, 0x2C, 0x17


@dataclass(frozen=True, slots=True)
class State:
    """`kind` of the link ("veth", "" for hardware); what its driver can (`BASIC`: run programs,
    `NDO_XMIT`: send what another interface's program redirects); the id of the program that is
    attached, 0 for none, and how it runs."""

    kind: str = ""
    features: int = 0
    program: int = 0
    mode: Mode = ""


def state(ifindex: int) -> State:
    """OSError with ENODEV if there is no interface."""
    (body,) = ask(_GETLINK, _ONE, _IFINFO.pack(0, 0, ifindex, 0, 0))
    own = attributes(body, _IFINFO.size)
    info = attributes(own.get(_IFLA_LINKINFO, b""), 0)
    xdp = attributes(own.get(_IFLA_XDP, b""), 0)
    attached = xdp.get(_XDP_ATTACHED, b"\0")[0]
    return State(
        info.get(_INFO_KIND, b"").rstrip(b"\0").decode(),
        _features(ifindex),
        int.from_bytes(xdp.get(_XDP_PROG_ID, b""), "little"),
        _MODES[attached] if attached < len(_MODES) else "several",
    )


def use_gro(name: str) -> None:
    """Have an interface join what it receives (generic receive offload). A veth takes what XDP
    redirects to its peer only so, or with a program of its own (`veth_xdp_xmit`: it needs NAPI).
    OSError if there is no such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        if not _ethtool(sock, name, _GGRO, 0):
            _ethtool(sock, name, _SGRO, 1)


def fill_checksums(name: str) -> None:
    """Have the stack fill in the checksums of what it sends by an interface, as a card does (no
    transmit offload): who is behind a veth sees otherwise frames without. OSError if there is no
    such interface."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        _ethtool(sock, name, _STXCSUM, 0)


def _ethtool(sock: socket.socket, name: str, command: int, value: int) -> int:
    data = create_string_buffer(struct.pack("II", command, value), 8)
    request = struct.pack("16sQ16x", name.encode(), addressof(data))
    try:
        fcntl.ioctl(sock, _SIOCETHTOOL, request)
    except OSError as error:
        raise OSError(error.errno, f"offloads of {name}: {error.strerror}") from error
    found: int = struct.unpack("II", data.raw)[1]
    return found


def _features(ifindex: int) -> int:
    family = _netdev_family()
    if not family:
        return 0
    payload = _GENERIC.pack(_DEV_GET, 1, 0) + _attribute(_DEV_IFINDEX, struct.pack("=I", ifindex))
    for body in ask(family, _ONE, payload, _NETLINK_GENERIC, f"features of {ifindex}"):
        told = attributes(body, _GENERIC.size).get(_DEV_XDP_FEATURES, b"")
        return int.from_bytes(told, "little")
    return 0


@functools.cache
def _netdev_family() -> int:
    """Number of generic netlink's family "netdev"; 0 before Linux 6.3."""
    payload = _GENERIC.pack(_GETFAMILY, 1, 0) + _attribute(_FAMILY_NAME, b"netdev\0")
    try:
        for body in ask(_CTRL, _ONE, payload, _NETLINK_GENERIC, "netlink family netdev"):
            return int.from_bytes(attributes(body, _GENERIC.size)[_FAMILY_ID], "little")
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
    return 0


def _attribute(kind: int, value: bytes) -> bytes:
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)
