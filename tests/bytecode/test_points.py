"""What the API promises about packets and connections, one behaviour a row, the answers by hand.

The points of docs/policy.md that a verdict alone cannot show: policies as users write them,
compiled and published, then packets through the real programs, one after the other.

    this node   shop/a, shop/b, shop/c          another node   shop/remote
    service     svc 80 → b:8080, 83 → remote:8083, 90 → nobody

Addresses are those of goldens.py, labels `app` are the pods' names.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec
import pytest
from scapy.layers.inet import IP
from scapy.layers.inet import UDP as Udp
from scapy.layers.inet6 import ICMPv6ND_NA, ICMPv6ND_NS, ICMPv6ND_RA, IPv6, IPv6ExtHdrFragment
from scapy.layers.l2 import ARP, Ether
from scapy.packet import Packet, Raw

from lockgate.objects.model import (
    Cluster,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    Pod,
    Service,
)
from tests.bytecode.compare import Case
from tests.bytecode.goldens import (
    ADDRESSES,
    FAMILIES,
    at_pod,
    echo,
    ip,
    same_frame,
    syn,
    tcp,
    time_exceeded,
    too_big,
    udp,
    unreachable,
)
from tests.bytecode.world import DROP, NEXT, REDIRECT, UNDERLAY, World, pod_mac

SLOTS = {"a": 0, "b": 1, "c": 2}
GATEWAY = "02:00:00:00:00:aa"


# ---- What a row says ---------------------------------------------------------------------


@dataclass(frozen=True)
class Sent:
    """A packet, and what becomes of it.

    `answer`: "arrives" (at the pod that it is for), "leaves" (for another node), "answered" (its
    sender gets something back at once), "stack" (it goes its way untouched) or "dropped".
    `seen`: the packet as it arrives or leaves, where it is not as it was sent.
    """

    by: str  # a pod of this node, "remote" for the wire, "host" for this node's own stack
    packet: Callable[[int], Packet]
    answer: str
    seen: Callable[[int], Packet] | None = None


@dataclass(frozen=True)
class Now:
    """From here on these policies, and no other pods of this node than `pods`, are in force."""

    policies: tuple[NetworkPolicy, ...] = ()
    pods: tuple[str, ...] = tuple(SLOTS)


@dataclass(frozen=True)
class Row:
    name: str
    steps: list[Sent | Now]
    families: tuple[int, ...] = field(default=FAMILIES)


def policy(subject: str, **spec: Any) -> NetworkPolicy:
    """`ingress` or `egress`: isolated in these directions, with these rules."""
    types = [name.capitalize() for name in spec]
    selector = {"matchLabels": {"app": subject}}
    value = {
        "metadata": {"namespace": "shop", "name": f"{subject}-{'-'.join(spec)}"},
        "spec": {"podSelector": selector, "policyTypes": types, **spec},
    }
    return msgspec.convert(value, NetworkPolicy)


def app(name: str) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": {"app": name}}}


def sent(by: str, to: str, l4: Any, answer: str, seen: Any = None) -> Sent:
    """From pod to pod; `l4`: a packet, or one by family."""
    return Sent(by, lambda f: ip(f, by, to) / (l4(f) if callable(l4) else l4), answer, seen)


def pieces(source: str, target: str, number: int) -> list[Callable[[int], Packet]]:
    """A datagram in two fragments."""

    def piece(f: int, n: int) -> Packet:
        known = ADDRESSES[f]
        data = bytes(Udp(sport=40000, dport=5353, len=80, chksum=1)) + bytes(72)
        if f == 4:
            head = IP(src=known[source], dst=known[target], id=number, proto=17)
            head.flags, head.frag = ("MF", 0) if n == 0 else (0, 6)
        else:
            head = IPv6(src=known[source], dst=known[target])
            head /= IPv6ExtHdrFragment(id=number, offset=6 * n, m=1 - n, nh=17)
        return head / Raw(data[:48] if n == 0 else data[48:])

    return [lambda f: piece(f, 0), lambda f: piece(f, 1)]


def about(kind: Callable[..., Packet], sport: int = 40000, *more: int) -> Callable[[int], Packet]:
    """An ICMP error of a router on the way about what a sent to remote."""
    return lambda f: ip(f, "node", "a") / kind(f, ip(f, "a", "remote") / syn(sport), *more)


def arp(**fields: Any) -> Callable[[int], Packet]:
    return lambda _: ARP(**({"hwsrc": pod_mac(0), "psrc": "10.0.1.2"} | fields))


def ndp(message: Packet, source: str) -> Callable[[int], Packet]:
    return lambda _: IPv6(src=source, dst="ff02::1", hlim=255) / message


A6, B6 = ADDRESSES[6]["a"], ADDRESSES[6]["b"]
SHUT_A = policy("a", ingress=[], egress=[])
A_MAY_WEB = policy("a", ingress=[], egress=[{"to": [app("b")], "ports": [{"port": 80}]}])
A_MAY_UDP = policy("a", egress=[{"to": [app("b")], "ports": [{"protocol": "UDP", "port": 5353}]}])
FIRST, LATER = pieces("a", "b", 5)
OPENED = [sent("a", "b", syn(), "arrives"), sent("b", "a", tcp(80, 40000, "SA"), "arrives")]

ROWS = [
    Row("15 the backend of a service sees the pod that asked", [
        sent("a", "svc", syn(), "arrives", lambda f: ip(f, "a", "b") / syn(dport=8080)),
    ]),
    Row("15 so does a backend on another node", [
        sent("a", "svc", syn(dport=83), "leaves", lambda f: ip(f, "a", "remote") / syn(dport=8083)),
    ]),
    Row("15 its policies judge the pod that asked: admitted", [
        Now((policy("b", ingress=[{"from": [app("a")], "ports": [{"port": 8080}]}]),)),
        sent("a", "svc", syn(), "arrives", lambda f: ip(f, "a", "b") / syn(dport=8080)),
    ]),
    Row("15 its policies judge the pod that asked: not admitted", [
        Now((policy("b", ingress=[{"from": [app("a")], "ports": [{"port": 8080}]}]),)),
        sent("c", "svc", syn(), "dropped"),
    ]),
    Row("19 replies pass to and from pods that may begin nothing", [
        Now((A_MAY_WEB, policy("b", ingress=[{"from": [app("a")]}], egress=[]))),
        *OPENED,
        sent("a", "b", tcp(40000, 80, "A"), "arrives"),
        sent("b", "a", tcp(80, 40000, "A"), "arrives"),
        sent("b", "a", syn(dport=40000), "dropped"),
    ]),
    Row("19 replies of datagrams", [
        Now((policy("a", ingress=[], egress=[{}]), policy("b", egress=[]))),
        sent("a", "b", udp(40000, 53), "arrives"),
        sent("b", "a", udp(53, 40000), "arrives"),
        sent("b", "a", udp(53, 40001), "dropped"),
    ]),
    Row("19 replies of pings", [
        Now((policy("a", ingress=[], egress=[{}]), policy("b", egress=[]))),
        sent("a", "b", lambda f: echo(f, 7), "arrives"),
        sent("b", "a", lambda f: echo(f, 7, reply=True), "arrives"),
        sent("b", "a", lambda f: echo(f, 8), "dropped"),
    ]),
    Row("19 replies to another node", [
        Now((policy("a", ingress=[{"from": [app("remote")]}], egress=[]),)),
        sent("remote", "a", syn(), "arrives"),
        sent("a", "remote", tcp(80, 40000, "SA"), "leaves"),
        sent("a", "remote", syn(dport=40000), "dropped"),
    ]),
    *[Row(f"20 {name}", [
        Now((policy("a", ingress=[], egress=[{"to": [app("remote")]}]),)),
        sent("a", "remote", syn(), "leaves"),
        Sent("remote", about(kind, 40000, *more), "arrives"),
        Sent("remote", about(kind, 40001, *more), "dropped"),
    ]) for name, kind, more in (
        ("fragmentation needed, packet too big", too_big, (1400,)),
        ("unreachable", unreachable, ()),
        ("time exceeded", time_exceeded, ()),
    )],
    Row("22 ARP of a pod that may nothing", [
        Now((SHUT_A,)),
        Sent("a", arp(op=1, pdst="169.254.1.1"), "stack"),
        Sent("a", arp(op=2, pdst="169.254.1.1"), "stack"),
        Sent("a", arp(op=2, psrc="10.0.1.3"), "dropped"),
        Sent("host", arp(op=1, hwsrc=GATEWAY, psrc="169.254.1.1", pdst="10.0.1.2"), "stack"),
    ], (4,)),
    Row("22 neighbour discovery of a pod that may nothing", [
        Now((SHUT_A,)),
        Sent("a", ndp(ICMPv6ND_NS(tgt="fe80::1"), A6), "stack"),
        Sent("a", ndp(ICMPv6ND_NA(tgt=A6), A6), "stack"),
        Sent("a", ndp(ICMPv6ND_NA(tgt=B6), A6), "dropped"),
        Sent("host", ndp(ICMPv6ND_NS(tgt=A6), "fe80::1"), "stack"),
    ], (6,)),
    Row("22 router advertisements: to a pod that may nothing, but by none", [
        Now((SHUT_A,)),
        Sent("host", ndp(ICMPv6ND_RA(), "fe80::1"), "stack"),
        Sent("a", ndp(ICMPv6ND_RA(), A6), "dropped"),
    ], (6,)),
    Row("23 the first is allowed by its port", [
        Now((A_MAY_UDP,)), Sent("a", FIRST, "arrives"), Sent("a", LATER, "arrives"),
    ]),
    Row("23 the first is denied", [
        Now((SHUT_A,)), Sent("a", FIRST, "dropped"), Sent("a", LATER, "dropped"),
    ]),
    Row("23 a later one whose first never came", [Now((A_MAY_UDP,)), Sent("a", LATER, "dropped")]),
    Row("24 the client may no longer", [
        Now((A_MAY_WEB,)),
        *OPENED,
        Now((SHUT_A,)),
        sent("a", "b", tcp(40000, 80, "A"), "dropped"),
        sent("b", "a", tcp(80, 40000, "A"), "dropped"),
    ]),
    Row("24 the server may no longer be asked, and talks first", [
        *OPENED,
        Now((policy("b", ingress=[]),)),
        sent("b", "a", tcp(80, 40000, "A"), "dropped"),
        sent("a", "b", tcp(40000, 80, "A"), "dropped"),
    ]),
    Row("24 a policy about others", [
        Now((A_MAY_WEB,)),
        *OPENED,
        Now((A_MAY_WEB, policy("c", ingress=[], egress=[]))),
        sent("a", "b", tcp(40000, 80, "A"), "arrives"),
        sent("b", "a", tcp(80, 40000, "A"), "arrives"),
    ]),
    Row("25 nothing leaves a pod before it is published", [
        Now(pods=("a", "b")),
        sent("c", "b", syn(), "dropped"),
        sent("c", "b", udp(), "dropped"),
        sent("c", "svc", syn(), "dropped"),
    ]),
    Row("25 its first packets are judged by its policies", [
        Now((policy("c", egress=[{"to": [app("a")]}]),), pods=("a", "b")),
        Now((policy("c", egress=[{"to": [app("a")]}]),)),
        sent("c", "b", syn(), "dropped"),
        sent("c", "a", syn(), "arrives"),
    ]),
    Row("30 a policy is replaced by one that allows the same", [
        Now((A_MAY_WEB,)),
        *OPENED,
        Now((policy("a", egress=[{}]),)),
        sent("a", "b", tcp(40000, 80, "A"), "arrives"),
        sent("b", "a", tcp(80, 40000, "A"), "arrives"),
    ]),
    Row("30 the policy is deleted", [
        Now((SHUT_A,)),
        sent("a", "b", syn(), "dropped"),
        Now(),
        sent("a", "b", syn(), "arrives"),
        sent("b", "a", syn(41000), "arrives"),
    ]),
    *[Row(f"31 {name}", [
        Now((policy("b", ingress=[]),)),
        sent("a", "b", l4, "dropped"),
        sent("remote", "b", l4, "dropped"),
    ]) for name, l4 in (
        ("a connection", syn()), ("a datagram", udp()), ("a ping", lambda f: echo(f)),
    )],
    Row("31 by egress, to whomever", [
        Now((SHUT_A,)),
        *[sent("a", to, syn(), "dropped") for to in ("b", "svc", "remote", "world", "host")],
    ]),
    Row("31 only what no policy forbids is answered", [
        sent("a", "svc", syn(dport=90), "answered"),
    ]),
]  # fmt: skip


# ---- The check ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "family"),
    [
        pytest.param(row, family, id=f"{row.name}-{family}")
        for row in ROWS
        for family in row.families
    ],
)
def test_point(world: World, row: Row, family: int) -> None:
    case = Case(world, cluster(Now()), "node-1")
    case.publish()
    for number, step in enumerate(row.steps):
        if isinstance(step, Now):
            case.cluster = cluster(step)
            case.publish()
            continue
        packet = step.packet(family)
        found, seen = outcome(world, step.by, packet)
        assert found == step.answer, f"step {number}: {packet.summary()}"
        if found in ("arrives", "leaves"):
            wanted = (step.seen or step.packet)(family)
            if found == "leaves":
                setattr(wanted, "ttl" if family == 4 else "hlim", 63)  # a hop further
            same_frame(layer2(family) + seen, Ether(layer2(family)) / wanted)


def layer2(family: int) -> bytes:
    return bytes(12) + (b"\x08\x00" if family == 4 else b"\x86\xdd")


def outcome(world: World, by: str, packet: Packet) -> tuple[str, bytes]:
    """What becomes of it, and the packet afterwards, without its Ethernet header."""
    program, at, mac = "from_net", UNDERLAY, GATEWAY
    if by in SLOTS:
        program, at, mac = "from_pod", at_pod(SLOTS[by]), pod_mac(SLOTS[by])
    elif by == "host":
        program, at = "to_pod", at_pod(SLOTS["a"])
    # Zero is the host's end of every veth here (Case).
    to = "ff:ff:ff:ff:ff:ff" if packet.haslayer(ARP) else "00:00:00:00:00:00"
    frame = bytes(Ether(src=mac, dst=to) / packet)
    done = world.run(program, frame, at)
    after = done.packet[14:]
    if done.verdict == DROP:
        return "dropped", after
    if done.verdict == NEXT:
        assert done.packet == frame
        return "stack", after
    assert done.verdict == REDIRECT
    target = {bytes.fromhex(pod_mac(slot).replace(":", "")): pod for pod, slot in SLOTS.items()}
    pod = target.get(done.packet[:6])
    if pod is None:
        return "leaves", after
    return "answered" if pod == by else "arrives", after


def cluster(now: Now) -> Cluster:
    """The cluster of this module with these pods and policies."""
    found = Cluster()
    found.namespaces["shop"] = msgspec.convert({"metadata": {"name": "shop"}}, Namespace)
    for name, address in (("node-1", "host"), ("node-2", "node")):
        ips = [ADDRESSES[f][address] for f in FAMILIES]
        addresses = [{"type": "InternalIP", "address": ip} for ip in ips]
        value = {"metadata": {"name": name}, "status": {"addresses": addresses}}
        found.nodes[name] = msgspec.convert(value, Node)
    for name in (*now.pods, "remote"):
        ips = [{"ip": ADDRESSES[f][name]} for f in FAMILIES]
        meta = {"namespace": "shop", "name": name, "uid": name, "labels": {"app": name}}
        pod = {
            "metadata": meta,
            "spec": {"nodeName": "node-2" if name == "remote" else "node-1", "containers": []},
            "status": {"phase": "Running", "podIPs": ips},
        }
        found.pods["shop", name] = msgspec.convert(pod, Pod)
    for one in now.policies:
        found.policies[one.key] = one
    _service(found, {80: ("b", 8080), 83: ("remote", 8083), 90: None})
    return found


def _service(found: Cluster, backends: Mapping[int, tuple[str, int] | None]) -> None:
    """Service svc with these ports."""
    ips = [ADDRESSES[f]["svc"] for f in FAMILIES]
    ports = [{"name": f"port-{port}", "port": port} for port in backends]
    spec = {"clusterIP": ips[0], "clusterIPs": ips, "ports": ports}
    value = {"metadata": {"namespace": "shop", "name": "svc"}, "spec": spec}
    found.services["shop", "svc"] = msgspec.convert(value, Service)
    for port, backend in backends.items():
        for family in FAMILIES if backend else ():
            pod, target = backend
            name = f"svc-{port}-{family}"
            labels = {"kubernetes.io/service-name": "svc"}
            value = {
                "metadata": {"namespace": "shop", "name": name, "labels": labels},
                "addressType": f"IPv{family}",
                "endpoints": [{"addresses": [ADDRESSES[family][pod]]}],
                "ports": [{"name": f"port-{port}", "port": target}],
            }
            found.slices["shop", name] = msgspec.convert(value, EndpointSlice)
