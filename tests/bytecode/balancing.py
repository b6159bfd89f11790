"""What the goldens of frontends share: services for clients outside, and their outer headers.

Backends by name: `b`, a pod of the node; `remote` and `far`, pods behind hops 1 (MACs known)
and 2; `host`, a process of the node; `node`, one of the node behind hop 1; `world`, an endpoint
that is no pod.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from scapy.layers.inet import IP
from scapy.layers.inet6 import IPv6
from scapy.layers.l2 import Ether
from scapy.packet import Packet

from lockgate.objects.address import parse_address
from tests.bytecode.goldens import ADDRESSES, B, base, ip, syn, tcp, udp
from tests.bytecode.world import (
    SCTP,
    SVC_FRONTEND,
    SVC_LOCAL,
    SVC_OPEN,
    SVC_RANGES,
    SVC_SNAT,
    TCP,
    TO_HOP,
    TO_HOST,
    TO_LOCAL,
    TO_NOWHERE,
    UDP,
    Owner,
    Scene,
    Service,
)

#: An address that only services have, by family; and a second client.
LB = {4: "203.0.113.80", 6: "2001:db8:80::1"}
OTHER = {4: "198.51.100.99", 6: "2001:db8::99"}
NODE_PORT = 30080
#: Service ids.
HERE, DSR, FAR, SNAT, HOST, NODE, CHAIN, EMPTY, LOCAL, RANGED, WORLD, STICKY = range(40, 52)
#: Port of the frontend, by service.
PORTS = {
    HERE: 80,
    DSR: 81,
    FAR: 82,
    SNAT: 83,
    HOST: 84,
    NODE: 85,
    CHAIN: 86,
    EMPTY: 87,
    LOCAL: 88,
    RANGED: 89,
    WORLD: 90,
    STICKY: 91,
}


def owner(family: int, name: str, port: int = 8080) -> Owner:
    kind, index = {
        "b": (TO_LOCAL, B),
        "c": (TO_LOCAL, 2),
        "remote": (TO_HOP, 1),
        "far": (TO_HOP, 2),
        "node": (TO_HOP, 1),
        "host": (TO_HOST, 0),
        "world": (TO_NOWHERE, 0),
    }[name]
    return Owner(ADDRESSES[family][name], port, kind, index)


def frontends() -> Scene:
    """At LB, the same ports of TCP and UDP; HERE and DSR also as node ports of the host."""
    scene = base()
    services: dict[tuple[str, int, int], Service] = dict(scene.services)
    addresses = {}
    for family, known in ADDRESSES.items():

        def service(id: int, *names: str, flags: int = 0, family: int = family, **more: Any):
            owners = tuple(owner(family, name) for name in names)
            return Service(id, (), flags=SVC_FRONTEND | flags, owners=owners, **more)

        first = {4: "198.51.100.0", 6: "2001:db8::"}[family]
        block = family, _number(first), 24 if family == 4 else 64
        found = (
            service(HERE, "b"),
            service(DSR, "remote"),
            service(FAR, "far"),
            service(SNAT, "remote", flags=SVC_SNAT),
            service(HOST, "host"),
            service(NODE, "node"),
            service(CHAIN, "b", "remote", "far", "c", slots=((0, 1, 2),)),
            service(EMPTY),
            service(LOCAL, flags=SVC_LOCAL),
            service(RANGED, "b", flags=SVC_RANGES, ranges=(block,)),
            service(WORLD, "world"),
            service(STICKY, "remote", "far", affinity=60),
        )
        for one in found:
            for proto in (TCP, UDP):
                services[LB[family], PORTS[one.id], proto] = one
        services[LB[family], 70, SCTP] = Service(60, owners=(owner(family, "b", 70),))
        services[LB[family], 71, SCTP] = Service(61, owners=(owner(family, "b", 7070),))
        services[LB[family], 72, SCTP] = Service(62, owners=(owner(family, "remote", 7272),))
        services[LB[family], 73, SCTP] = Service(
            63, flags=SVC_SNAT, owners=(owner(family, "remote", 73),)
        )
        services[known["host"], NODE_PORT, TCP] = service(70, "b")
        services[known["host"], NODE_PORT, UDP] = service(71, "remote")
        services[known["host"], NODE_PORT + 1, TCP] = service(72, "host")
        addresses |= {LB[family]: SVC_FRONTEND, known["host"]: SVC_FRONTEND | SVC_OPEN}
    mine = tuple(ADDRESSES[family]["host"] for family in ADDRESSES)
    hops = {
        number: replace(hop, masquerade=mine) if number in (1, 2) else hop
        for number, hop in scene.hops.items()
    }
    return scene.but(services=services, addresses=addresses, hops=hops)


def _number(address: str) -> int:
    packed = parse_address(address)
    return int.from_bytes(packed[12:] if ":" not in address else packed, "big")


# ---- The flow's hash, and outer headers --------------------------------------------------


def flow_hash(packet: Packet) -> int:
    """As bpf/balance.h, of the packet's tuple (with ports or without)."""
    head = packet[IP] if IP in packet else packet[IPv6]
    proto = head.proto if IP in packet else head.nh
    ports = (head.payload.sport, head.payload.dport) if proto in (TCP, UDP) else (0, 0)
    raw = parse_address(head.src) + parse_address(head.dst)
    raw += ports[0].to_bytes(2, "big") + ports[1].to_bytes(2, "big") + bytes((proto, 0, 0, 0))
    words = [int.from_bytes(raw[i : i + 8], "little") for i in range(0, 40, 8)]

    def mixed(word: int) -> int:
        return (x := word * 0x9E3779B97F4A7C15 & (1 << 64) - 1) ^ x >> 32

    client = mixed(mixed(words[0]) ^ words[1])
    frontend = mixed(mixed(words[2]) ^ words[3])
    last = (mixed(client ^ words[4]) ^ frontend) * 0x9E3779B97F4A7C15
    return last >> 32 & 0xFFFFFFFF


def outer(
    inner: Packet, to: str, ttl: int = 64, hash: int | None = None, hint: int = 0, tos: int = 0
) -> Packet:
    """The packet in an outer header to a backend by name or address."""
    number = flow_hash(inner) if hash is None else hash
    if IP in inner:
        source = f"198.18.{number >> 8 & 255}.{number & 255}"
        to = ADDRESSES[4].get(to, to)
        return IP(src=source, dst=to, ttl=ttl, id=hint, flags="DF", proto=4, tos=tos) / inner
    source = f"100::{number >> 16:x}:{number & 0xFFFF:x}"
    label = hint or number & 0xFFFFF
    to = ADDRESSES[6].get(to, to)
    return IPv6(src=source, dst=to, hlim=ttl, fl=label, nh=41, tc=tos) / inner


# ---- Clients' packets ---------------------------------------------------------------------

SPORT = 40000


def ask(family: int, service: int, kind: str = "syn", source: str = "world", ttl: int = 64):
    """A client's packet to a service at LB."""
    l4 = {
        "syn": syn(SPORT, PORTS[service]),
        "ack": tcp(SPORT, PORTS[service], "A"),
        "udp": udp(SPORT, PORTS[service]),
    }[kind]
    return ip(family, source, LB[family], ttl=ttl) / l4


def back(frame: Packet) -> Ether:
    """The way back by the same card."""
    return Ether(src=frame.dst, dst=frame.src)
