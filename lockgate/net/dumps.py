"""Reading what the kernel has over netlink, only the part that concerns one interface.

With hundreds of pods a node has thousands of addresses, routes and neighbours; the kernel
leaves out (NETLINK_GET_STRICT_CHK, Linux 4.20) what is of other interfaces, and what it sends
is read here without making objects of all of it. For the namespace of the calling thread.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Literal

__all__ = [
    "ATTRIBUTE",
    "HEADER",
    "ROUTE_PROTOCOL",
    "DefaultRoute",
    "Direction",
    "Filter",
    "Interface",
    "Route",
    "addresses",
    "ask",
    "attributes",
    "default_gateways",
    "default_routes",
    "filters",
    "interfaces",
    "link",
    "macs",
    "on_link",
    "own_routes",
    "own_unicast",
    "own_unreachable",
    "routes_of",
    "vxlan_port",
]

_SOL_NETLINK, _STRICT = 270, 12
HEADER = struct.Struct("=IHHII")
ATTRIBUTE = struct.Struct("=HH")
_ONE, _DUMP = 0x1, 0x301  # NLM_F_REQUEST, and NLM_F_DUMP
_ERROR, _DONE = 2, 3
_GETLINK, _GETADDR, _GETROUTE, _GETNEIGH = 18, 22, 26, 30


_IFINFO = struct.Struct("=BxHiII")  # family, type, index, flags, change
_UP = 1
_IFLA_ADDRESS, _IFLA_IFNAME, _IFLA_MTU, _IFLA_LINK, _IFLA_IFALIAS = 1, 3, 4, 5, 20
_IFADDR = struct.Struct("=BBBBI")  # family, prefix length, flags, scope, index
_IFA_ADDRESS, _IFA_LOCAL, _IFA_PROTO = 1, 2, 11
_ROUTE = struct.Struct("=BBBBBBBBI")  # family, length, _, _, table, _, _, type, flags
_RTA_DST, _RTA_OIF, _RTA_GATEWAY, _RTA_PRIORITY, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 5, 6, 7, 15
_RTA_ENCAP, _ENCAP_DST, _ENCAP_SRC = 22, 2, 3
_RTA_MULTIPATH, _RTA_VIA = 9, 18
_NEXT_HOP = struct.Struct("=HBBi")  # struct rtnexthop: length, flags, hops, ifindex
_FIB_MATCH = 0x2000  # RTM_F_FIB_MATCH: the route itself is answered, not a host's
_MAIN = 254
_UNICAST, _UNREACHABLE = 1, 7
_IFLA_LINKINFO, _INFO_KIND, _INFO_DATA = 18, 1, 2
_VXLAN_PORT, _VXLAN_COLLECT_METADATA = 15, 25
#: Who made a route (rtm_protocol) or an address (IFA_PROTO), on all of ours. Above what
#: rtnetlink.h names.
ROUTE_PROTOCOL = 108
_OURS = bytes([ROUTE_PROTOCOL])
_NEIGH = struct.Struct("=BxxxiHBB")  # family, index, state, flags, type
_NDA_DST, _NDA_LLADDR, _NDA_IFINDEX = 1, 2, 8
_GETTFILTER = 46
_TC = struct.Struct("=BxxxiIII")  # family, index, handle, parent, info
_TCA_KIND, _TCA_OPTIONS, _TCA_CHAIN, _BPF_ID = 1, 2, 11, 11
Direction = Literal["ingress", "egress"]
FILTER_PARENTS: dict[Direction, int] = {"ingress": 0xFFFFFFF2, "egress": 0xFFFFFFF3}
# REACHABLE, STALE, DELAY, PROBE, NOARP, PERMANENT
_USABLE = 0x02 | 0x04 | 0x08 | 0x10 | 0x40 | 0x80


@dataclass(frozen=True, slots=True)
class Interface:
    """A link as `ip link` shows it. `peer` is a veth's other end, in whatever namespace, else 0."""

    index: int
    name: str
    up: bool
    peer: int
    alias: str


def interfaces() -> list[Interface]:
    """All links."""
    found = []
    for body in ask(_GETLINK, _DUMP, _IFINFO.pack(0, 0, 0, 0, 0)):
        _, _, index, flags, _ = _IFINFO.unpack_from(body)
        own = attributes(body, _IFINFO.size)
        name = own.get(_IFLA_IFNAME, b"").rstrip(b"\0").decode()
        alias = own.get(_IFLA_IFALIAS, b"").rstrip(b"\0").decode(errors="replace")
        peer = int.from_bytes(own.get(_IFLA_LINK, b""), "little")
        found.append(Interface(index, name, bool(flags & _UP), peer, alias))
    return found


def link(ifindex: int) -> tuple[bytes, int]:
    """MAC and MTU of an interface; OSError with ENODEV if there is none."""
    (body,) = ask(_GETLINK, _ONE, _IFINFO.pack(0, 0, ifindex, 0, 0))
    own = attributes(body, _IFINFO.size)
    return own.get(_IFLA_ADDRESS, b""), int.from_bytes(own[_IFLA_MTU], "little")


def addresses(ifindex: int, *, link_local: bool = False, own: bool = False) -> list[str]:
    """Addresses with prefix length of an interface, link-local ones left out unless asked for;
    `own`: only those that are marked as ours."""
    found = []
    for body in ask(_GETADDR, _DUMP, _IFADDR.pack(0, 0, 0, 0, ifindex)):
        _, length, _, _, index = _IFADDR.unpack_from(body)
        told = attributes(body, _IFADDR.size)
        raw = told.get(_IFA_LOCAL) or told.get(_IFA_ADDRESS)
        if index != ifindex or raw is None or (own and told.get(_IFA_PROTO) != _OURS):
            continue
        if link_local or not ip_address(raw).is_link_local:
            found.append(f"{ip_address(raw)}/{length}")
    return found


def default_gateways(ifindex: int) -> list[str]:
    """Gateways of the default routes over an interface."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, _UNICAST, 0)
        for body in ask(_GETROUTE, _DUMP, request + _number(_RTA_OIF, ifindex)):
            length, kind = body[1], body[7]
            if length or kind != _UNICAST:
                continue
            ways = _next_hops(attributes(body, _ROUTE.size))
            found += [gateway for card, gateway in ways if card == ifindex and gateway]
    return found


def _next_hops(route: dict[int, bytes]) -> list[tuple[int, str]]:
    """Interface and gateway ("" for the link itself) of each of a route's ways: one, or those that
    it is balanced over (ECMP)."""

    def hop(ifindex: int, own: dict[int, bytes]) -> tuple[int, str]:
        gateway = own.get(_RTA_GATEWAY)
        return ifindex, str(ip_address(gateway)) if gateway else ""

    many = route.get(_RTA_MULTIPATH)
    if many is None:
        return [hop(int.from_bytes(route.get(_RTA_OIF, b""), "little"), route)]
    found, at = [], 0
    while at + _NEXT_HOP.size <= len(many):
        length, _, _, ifindex = _NEXT_HOP.unpack_from(many, at)
        if length < _NEXT_HOP.size:
            break
        found.append(hop(ifindex, attributes(many[at : at + length], _NEXT_HOP.size)))
        at += length + -length % 4
    return found


@dataclass(frozen=True, slots=True)
class DefaultRoute:
    """One way out; the smallest metric wins, and several with it share what leaves. `gateway` is ""
    for a route to the link itself."""

    ifindex: int
    gateway: str
    metric: int


def default_routes() -> list[DefaultRoute]:
    """The default routes of the main table, of both families."""
    found = []
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, _UNICAST, 0)
        for body in ask(_GETROUTE, _DUMP, request + _number(_RTA_TABLE, _MAIN)):
            length, kind = body[1], body[7]
            if length or kind != _UNICAST:
                continue
            own = attributes(body, _ROUTE.size)
            metric = int.from_bytes(own.get(_RTA_PRIORITY, b""), "little")
            found += [DefaultRoute(*hop, metric) for hop in _next_hops(own)]
    return found


def on_link(address: str) -> int:
    """Index of the interface whose link an address is on, by the route that the stack takes;
    0 when there is none, or it leads to a gateway, or is the default route. OSError: no route."""
    packed = ip_address(address).packed
    family = socket.AF_INET if len(packed) == 4 else socket.AF_INET6
    wanted = _ROUTE.pack(family, 8 * len(packed), 0, 0, 0, 0, 0, 0, _FIB_MATCH)
    wanted += ATTRIBUTE.pack(ATTRIBUTE.size + len(packed), _RTA_DST) + packed
    (body,) = ask(_GETROUTE, _ONE, wanted)
    length, kind = body[1], body[7]
    own = attributes(body, _ROUTE.size)
    if not length or kind != _UNICAST or _RTA_GATEWAY in own or _RTA_VIA in own:
        return 0
    return int.from_bytes(own.get(_RTA_OIF, b""), "little")


def routes_of(ifindex: int) -> set[str]:
    """Destinations ("10.1.0.7/32") of the unicast routes over an interface."""
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _ROUTE.pack(family, 0, 0, 0, 0, 0, 0, _UNICAST, 0)
        for body in ask(_GETROUTE, _DUMP, request + _number(_RTA_OIF, ifindex)):
            length, kind = body[1], body[7]
            own = attributes(body, _ROUTE.size)
            address, card = own.get(_RTA_DST), own.get(_RTA_OIF, b"")
            if address and kind == _UNICAST and int.from_bytes(card, "little") == ifindex:
                found.add(f"{ip_address(address)}/{length}")
    return found


def own_routes() -> list[str]:
    """Destinations of all routes of ours."""
    found = []
    for family, anywhere in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for body in ask(_GETROUTE, _DUMP, _ROUTE.pack(family, 0, 0, 0, 0, ROUTE_PROTOCOL, 0, 0, 0)):
            if body[5] == ROUTE_PROTOCOL:
                address = attributes(body, _ROUTE.size).get(_RTA_DST)
                found.append(f"{ip_address(address) if address else anywhere}/{body[1]}")
    return found


def own_unreachable() -> set[str]:
    """Destinations of our routes that say there is no way."""
    found = set()
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _ROUTE.pack(family, 0, 0, 0, _MAIN, ROUTE_PROTOCOL, 0, _UNREACHABLE, 0)
        for body in ask(_GETROUTE, _DUMP, request):
            length, protocol, kind = body[1], body[5], body[7]
            address = attributes(body, _ROUTE.size).get(_RTA_DST)
            if address and (protocol, kind) == (ROUTE_PROTOCOL, _UNREACHABLE):
                found.add(f"{ip_address(address)}/{length}")
    return found


@dataclass(frozen=True, slots=True)
class Route:
    """A unicast route; addresses as text, "" for none. `remote` and `local` are the outer
    addresses of one into a tunnel."""

    ifindex: int
    gateway: str = ""
    source: str = ""
    remote: str = ""
    local: str = ""


def own_unicast(below: int) -> dict[str, Route]:
    """Our unicast routes by destination, those over interfaces with an index under `below`."""
    found = {}
    for family in (socket.AF_INET, socket.AF_INET6):
        request = _ROUTE.pack(family, 0, 0, 0, _MAIN, ROUTE_PROTOCOL, 0, _UNICAST, 0)
        for body in ask(_GETROUTE, _DUMP, request):
            length, table, protocol, kind = body[1], body[4], body[5], body[7]
            own = attributes(body, _ROUTE.size)
            index = int.from_bytes(own.get(_RTA_OIF, b""), "little")
            if (table, protocol, kind) != (_MAIN, ROUTE_PROTOCOL, _UNICAST) or index >= below:
                continue
            raw = own.get(_RTA_DST) or bytes(4 if family == socket.AF_INET else 16)
            outer = attributes(own.get(_RTA_ENCAP, b""), 0)
            found[f"{ip_address(raw)}/{length}"] = Route(
                index,
                *(_text(own.get(kind)) for kind in (_RTA_GATEWAY, _RTA_PREFSRC)),
                *(_text(outer.get(kind)) for kind in (_ENCAP_DST, _ENCAP_SRC)),
            )
    return found


def vxlan_port(ifindex: int) -> int | None:
    """UDP port of an interface that is a VXLAN device in external mode; None if it is not."""
    (body,) = ask(_GETLINK, _ONE, _IFINFO.pack(0, 0, ifindex, 0, 0))
    info = attributes(attributes(body, _IFINFO.size).get(_IFLA_LINKINFO, b""), 0)
    data = attributes(info.get(_INFO_DATA, b""), 0)
    external = any(data.get(_VXLAN_COLLECT_METADATA, b""))
    if info.get(_INFO_KIND) != b"vxlan\0" or not external:
        return None
    return int.from_bytes(data[_VXLAN_PORT], "big")


def _text(raw: bytes | None) -> str:
    return str(ip_address(raw)) if raw else ""


def macs(ifindex: int) -> dict[str, bytes]:
    """Addresses → MACs that the kernel knows on an interface and does not hold to be dead."""
    found: dict[str, bytes] = {}
    request = _NEIGH.pack(0, 0, 0, 0, 0) + _number(_NDA_IFINDEX, ifindex)
    for body in ask(_GETNEIGH, _DUMP, request):
        family, index, state, _, _ = _NEIGH.unpack_from(body)
        own = attributes(body, _NEIGH.size)
        address, mac = own.get(_NDA_DST), own.get(_NDA_LLADDR)
        if family not in (socket.AF_INET, socket.AF_INET6) or index != ifindex:
            continue
        if address and mac and state & _USABLE:
            found[str(ip_address(address))] = mac
    return found


@dataclass(frozen=True, slots=True)
class Filter:
    """A filter on an interface. `program` is the id of its BPF program, 0 for other kinds."""

    priority: int
    handle: int
    program: int


def filters(ifindex: int, direction: Direction) -> list[Filter]:
    """The filters of an interface's clsact, in the order that packets meet them; none where
    there is no clsact. OSError with ENODEV if there is no interface."""
    found = []
    parent = FILTER_PARENTS[direction]
    for body in ask(_GETTFILTER, _DUMP, _TC.pack(0, ifindex, 0, parent, 0)):
        _, _, handle, _, info = _TC.unpack_from(body)
        own = attributes(body, _TC.size)
        options = own.get(_TCA_OPTIONS)
        # The kernel tells of each priority as a whole first, without options; and other chains
        # than 0 are met only from there.
        if options is None or any(own.get(_TCA_CHAIN, b"")):
            continue
        is_bpf = own.get(_TCA_KIND) == b"bpf\0"
        number = attributes(options, 0).get(_BPF_ID, b"") if is_bpf else b""
        found.append(Filter(info >> 16, handle, int.from_bytes(number, "little")))
    return found


def _number(attribute: int, value: int) -> bytes:
    return ATTRIBUTE.pack(8, attribute) + value.to_bytes(4, "little")


def ask(
    request: int,
    flags: int,
    payload: bytes,
    family: int = socket.NETLINK_ROUTE,
    what: str = "",
) -> Iterator[bytes]:
    """The bodies of the kernel's messages. `what` names the request in an OSError."""
    kind = socket.SOCK_RAW | socket.SOCK_CLOEXEC
    with socket.socket(socket.AF_NETLINK, kind, family) as sock:
        if family == socket.NETLINK_ROUTE:
            sock.setsockopt(_SOL_NETLINK, _STRICT, 1)
        sock.bind((0, 0))
        sock.send(HEADER.pack(HEADER.size + len(payload), request, flags, 1, 0) + payload)
        while True:
            data = sock.recv(1 << 18)
            at = 0
            while at + HEADER.size <= len(data):
                length, type_, _, _, _ = HEADER.unpack_from(data, at)
                body = data[at + HEADER.size : at + length]
                if type_ in (_ERROR, _DONE):
                    code = -int.from_bytes(body[:4], "little", signed=True)
                    if code > 0:
                        text = what or f"netlink request {request}"
                        raise OSError(code, f"{text}: {os.strerror(code)}")
                    return
                yield body
                at += length + 3 & ~3
            if flags == _ONE:
                return


def attributes(body: bytes, at: int) -> dict[int, bytes]:
    """The attributes of a message from byte `at` on, by type."""
    found: dict[int, bytes] = {}
    while at + ATTRIBUTE.size <= len(body):
        length, type_ = ATTRIBUTE.unpack_from(body, at)
        if length < ATTRIBUTE.size:
            break
        found[type_ & 0x3FFF] = body[at + ATTRIBUTE.size : at + length]
        at += length + 3 & ~3
    return found
