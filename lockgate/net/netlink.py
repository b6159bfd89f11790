"""Several netlink requests in one message.

Wiring a pod takes a dozen requests. Sent together they cost one system call, and nothing is
made of the answers but errors; a library's socket costs more than all of the work.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from collections.abc import Container
from dataclasses import dataclass
from ipaddress import ip_interface
from typing import Self

from lockgate.net.dumps import ATTRIBUTE, HEADER, ROUTE_PROTOCOL

__all__ = ["Batch", "Tunnel", "attribute", "text"]

_REQUEST, _ACK, _REPLACE, _EXCL, _CREATE = 1, 4, 0x100, 0x200, 0x400
_ERROR = 2
NEWLINK, DELLINK, GETLINK, SETLINK = 16, 17, 18, 19
_NEWADDR, _DELADDR, _NEWROUTE, _DELROUTE, _NEWNEIGH = 20, 21, 24, 25, 28

_IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, mask
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, length, _, tos, table, protocol, scope, type, flags
_NEIGH = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type

_UP = 1
_NODAD = 2
_PERMANENT = 0x80
_NOARP = 0x80
_ONLINK = 4
_TABLE_MAIN, _UNICAST = 254, 1
_SCOPE_UNIVERSE, _SCOPE_LINK, _SCOPE_HOST, _SCOPE_NOWHERE = 0, 253, 254, 255

IFLA_ADDRESS, IFLA_IFNAME, IFLA_MTU, IFLA_LINKINFO, IFLA_IFALIAS = 1, 3, 4, 18, 20
IFLA_AF_SPEC, IFLA_GROUP, IFLA_NET_NS_FD = 26, 27, 28
#: Group of the links that are about to go; a number that nobody else is likely to use.
_GOING = 0x6C67676F
_INFO_KIND, _INFO_DATA, _VETH_PEER = 1, 2, 1
_INET6_ADDR_GEN_MODE, _GEN_MODE_NONE = 8, 1
_IFA_ADDRESS, _IFA_LOCAL, _IFA_PROTO = 1, 2, 11
_NDA_DST, _NDA_LLADDR = 1, 2
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PREFSRC = 1, 4, 5, 7
_RTA_ENCAP_TYPE, _RTA_ENCAP = 21, 22
_ENCAP_IP, _ENCAP_IP6 = 2, 4
_ENCAP_ID, _ENCAP_DST, _ENCAP_SRC, _ENCAP_FLAGS = 1, 2, 3, 6
_TUNNEL_CSUM = 1
_VXLAN_LEARNING, _VXLAN_PORT, _VXLAN_COLLECT_METADATA = 7, 15, 25
_NESTED = 0x8000


def attribute(kind: int, value: bytes | int) -> bytes:
    """One attribute, padded; an int is 32 bits wide."""
    if isinstance(value, int):
        value = value.to_bytes(4, "little")
    return ATTRIBUTE.pack(ATTRIBUTE.size + len(value), kind) + value + bytes(-len(value) % 4)


def text(value: str) -> bytes:
    """A string as netlink has it."""
    return value.encode() + b"\0"


@dataclass(frozen=True, slots=True)
class Tunnel:
    """What a route gives packets for a tunnel device in external mode: the identifier and the
    outer addresses, of one family."""

    number: int
    remote: str
    local: str

    def attributes(self) -> bytes:
        """As attributes of a route."""
        six = ":" in self.remote
        made = attribute(_ENCAP_ID, self.number.to_bytes(8, "big"))
        made += attribute(_ENCAP_DST, _packed(self.remote))
        made += attribute(_ENCAP_SRC, _packed(self.local))
        if six:  # UDP over IPv6 needs its checksum, and VXLAN devices drop it without
            made += attribute(_ENCAP_FLAGS, _TUNNEL_CSUM.to_bytes(2, "big"))
        kind = _ENCAP_IP6 if six else _ENCAP_IP
        return attribute(_RTA_ENCAP_TYPE, kind.to_bytes(2, "little")) + attribute(
            _NESTED | _RTA_ENCAP, made
        )


class Batch:
    """Requests for the namespace of the thread that makes it, done in order by `send`."""

    def __init__(self) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
        self._socket = socket.socket(socket.AF_NETLINK, kind, socket.NETLINK_ROUTE)
        self._requests: list[tuple[str, int, bytes, Container[int]]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def add(
        self, what: str, kind: int, payload: bytes, flags: int = 0, fine: Container[int] = ()
    ) -> None:
        """`what` is for the error's text ("make interface lg1"); errors in `fine` are none."""
        head = HEADER.pack(
            HEADER.size + len(payload), kind, flags | _REQUEST | _ACK, len(self._requests), 0
        )
        self._requests.append((what, kind, head + payload, fine))

    def send(self) -> None:
        """Do all. The first that fails is raised as OSError("cannot …"); the others, those after
        it too, are done nevertheless."""
        requests, self._requests = self._requests, []
        if not requests:
            return
        self._socket.send(b"".join(message for _, _, message, _ in requests))
        failure: OSError | None = None
        waits = len(requests)
        while waits:
            data = self._socket.recv(1 << 16)
            at = 0
            while at + HEADER.size <= len(data):
                length, kind, _, number, _ = HEADER.unpack_from(data, at)
                if kind == _ERROR:
                    waits -= 1
                    (code,) = struct.unpack_from("=i", data, at + HEADER.size)
                    what, _, _, fine = requests[number]
                    if code and -code not in fine and failure is None:
                        failure = OSError(-code, f"cannot {what}: {os.strerror(-code)}")
                at += length + 3 & ~3
        if failure is not None:
            raise failure

    # ---- Links -----------------------------------------------------------------------

    def veth(
        self, name: str, index: int, mac: bytes, mtu: int, peer: str, peer_mac: bytes, netns: int
    ) -> None:
        """A pair whose other end is made in the namespace of descriptor `netns`. Both are down."""
        there = (
            _IFINFO.pack(0, 0, 0, 0, 0)
            + attribute(IFLA_IFNAME, text(peer))
            + attribute(IFLA_ADDRESS, peer_mac)
            + attribute(IFLA_MTU, mtu)
            + attribute(IFLA_NET_NS_FD, netns)
        )
        data = attribute(_INFO_DATA, attribute(_VETH_PEER, there))
        payload = (
            _IFINFO.pack(0, 0, index, 0, 0)
            + attribute(IFLA_IFNAME, text(name))
            + attribute(IFLA_ADDRESS, mac)
            + attribute(IFLA_MTU, mtu)
            + attribute(IFLA_LINKINFO, attribute(_INFO_KIND, text("veth")) + data)
        )
        self.add(f"make interface {name}", NEWLINK, payload, _CREATE | _EXCL)

    def up(self, index: int, *, alias: str = "", addressless: bool = True) -> None:
        """Bring a link up, with an alias; `addressless`: without an IPv6 link-local address of
        the kernel's own."""
        if addressless:
            # By itself and before: in one request the kernel would bring the link up first.
            mode = attribute(_INET6_ADDR_GEN_MODE, bytes([_GEN_MODE_NONE]))
            spec = attribute(IFLA_AF_SPEC, attribute(int(socket.AF_INET6), mode))
            payload = _IFINFO.pack(0, 0, index, 0, 0) + spec
            self.add(f"keep addresses off interface {index}", SETLINK, payload)
        payload = _IFINFO.pack(0, 0, index, _UP, _UP)
        if alias:
            payload += attribute(IFLA_IFALIAS, alias.encode())
        self.add(f"bring up interface {index}", SETLINK, payload)

    def settle(self, index: int) -> None:
        """Have the kernel do at once what it does soon after a link's other end came up: until
        then the link drops what is sent (it does when asked of the link; rtnl_getlink)."""
        self.add(f"look at interface {index}", GETLINK, _IFINFO.pack(0, 0, index, 0, 0))

    def retire(self, name: str) -> None:
        """Take a link down and its alias away, at once. Nothing there is success."""
        payload = _IFINFO.pack(0, 0, 0, 0, _UP) + attribute(IFLA_IFNAME, text(name))
        payload += attribute(IFLA_IFALIAS, b"")
        self.add(f"take down interface {name}", SETLINK, payload, fine={errno.ENODEV})

    def remove(self, *names: str) -> None:
        """By name: an index may be somebody else's by now. Nothing there is success. Several go
        as a group: the kernel's waits for readers are shared then."""
        if len(names) == 1:
            payload = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, text(names[0]))
            self.add(f"remove interface {names[0]}", DELLINK, payload, fine={errno.ENODEV})
            return
        group = attribute(IFLA_GROUP, _GOING)
        for name in names:
            payload = _IFINFO.pack(0, 0, 0, 0, 0) + attribute(IFLA_IFNAME, text(name)) + group
            self.add(f"remove interface {name}", SETLINK, payload, fine={errno.ENODEV})
        payload = _IFINFO.pack(0, 0, 0, 0, 0) + group
        self.add("remove interfaces", DELLINK, payload, fine={errno.ENODEV})

    def vxlan(self, name: str, port: int, mtu: int) -> None:
        """A device in external mode that neither learns nor asks for MACs. It is down."""
        data = attribute(_VXLAN_COLLECT_METADATA, b"\1") + attribute(_VXLAN_LEARNING, b"\0")
        data += attribute(_VXLAN_PORT, port.to_bytes(2, "big"))
        payload = (
            _IFINFO.pack(0, 0, 0, _NOARP, _NOARP)
            + attribute(IFLA_IFNAME, text(name))
            + attribute(IFLA_MTU, mtu)
            + attribute(
                IFLA_LINKINFO,
                attribute(_INFO_KIND, text("vxlan")) + attribute(_INFO_DATA, data),
            )
        )
        self.add(f"make interface {name}", NEWLINK, payload, _CREATE | _EXCL)

    def set_mtu(self, index: int, mtu: int) -> None:
        payload = _IFINFO.pack(0, 0, index, 0, 0) + attribute(IFLA_MTU, mtu)
        self.add(f"set the MTU of interface {index}", SETLINK, payload)

    # ---- Addresses, neighbours, routes -------------------------------------------------

    def address(self, index: int, address: str, scope: int = _SCOPE_UNIVERSE) -> None:
        """With its prefix length, marked as ours; one that is there is fine, and stays whosever
        it is. No duplicate address detection."""
        value = ip_interface(address)
        length = value.network.prefixlen
        flags = _NODAD if value.version == 6 else 0
        payload = _IFADDR.pack(_family(address), length, flags, scope, index)
        payload += attribute(_IFA_LOCAL, value.packed) + attribute(_IFA_ADDRESS, value.packed)
        payload += attribute(_IFA_PROTO, bytes([ROUTE_PROTOCOL]))
        self.add(f"add {address} to interface {index}", _NEWADDR, payload, _CREATE, {errno.EEXIST})

    def host_address(self, index: int, address: str) -> None:
        """Like `address`, of host scope: the kernel never takes it as a source."""
        self.address(index, address, _SCOPE_HOST)

    def remove_address(self, index: int, address: str) -> None:
        """Nothing there is success."""
        value = ip_interface(address)
        payload = _IFADDR.pack(_family(address), value.network.prefixlen, 0, 0, index)
        payload += attribute(_IFA_LOCAL, value.packed)
        fine = {errno.EADDRNOTAVAIL, errno.ENODEV}
        self.add(f"remove {address} from interface {index}", _DELADDR, payload, 0, fine)

    def neighbour(self, index: int, address: str, mac: bytes) -> None:
        """A permanent entry."""
        payload = _NEIGH.pack(_family(address), index, _PERMANENT, 0, _UNICAST)
        payload += attribute(_NDA_DST, _packed(address)) + attribute(_NDA_LLADDR, mac)
        self.add(f"set neighbour {address}", _NEWNEIGH, payload, _CREATE | _REPLACE)

    def route(
        self,
        destination: str,
        index: int,
        gateway: str = "",
        source: str = "",
        tunnel: Tunnel | None = None,
    ) -> None:
        """Set a route over a link. An IPv4 gateway is taken to be on the link."""
        address, _, length = destination.partition("/")
        # What has no gateway is on the link; IPv6 has no scopes of routes.
        scope = _SCOPE_UNIVERSE if gateway or ":" in address else _SCOPE_LINK
        flags = _ONLINK if gateway and ":" not in gateway else 0
        kind = (0, _TABLE_MAIN, ROUTE_PROTOCOL, scope, _UNICAST, flags)
        payload = _ROUTE.pack(_family(address), int(length), 0, *kind)
        payload += attribute(_RTA_DST, _packed(address)) if int(length) else b""
        payload += attribute(_RTA_OIF, index)
        payload += attribute(_RTA_GATEWAY, _packed(gateway)) if gateway else b""
        payload += attribute(_RTA_PREFSRC, _packed(source)) if source else b""
        if tunnel is not None:
            payload += tunnel.attributes()
        self.add(f"set route {destination}", _NEWROUTE, payload, _CREATE | _REPLACE)

    def remove_route(self, destination: str) -> None:
        """A route of ours to a block, of whatever kind. Nothing there is success."""
        address, _, length = destination.partition("/")
        kind = (0, _TABLE_MAIN, ROUTE_PROTOCOL, _SCOPE_NOWHERE, 0, 0)
        payload = _ROUTE.pack(_family(address), int(length), 0, *kind)
        payload += attribute(_RTA_DST, _packed(address)) if int(length) else b""
        self.add(f"remove route {destination}", _DELROUTE, payload, 0, {errno.ESRCH})


def _family(address: str) -> int:
    return int(socket.AF_INET6 if ":" in address else socket.AF_INET)


def _packed(address: str) -> bytes:
    return socket.inet_pton(_family(address), address)
