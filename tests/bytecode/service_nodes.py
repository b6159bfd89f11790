"""Three nodes side by side, each with programs and maps of its own, and what they do with the
packets of clients who ask at a service.

A cluster is compiled for each of its nodes and published. Packets are told apart by where they
end: at a backend, here or in an outer header to another node; refused; dropped; or passed.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from lockgate.agent.publish import EndpointRecord
from lockgate.compile import Host, Tables, compile_node
from lockgate.objects.address import format_address, is_ipv4, parse_address
from lockgate.objects.model import Cluster, Pod, Service, ServicePort
from lockgate.spec.services import Choice, Client, Frontend, choose
from tests import generate_services as generate
from tests.bytecode import edge
from tests.bytecode.compare import PROTOCOLS, Interner
from tests.bytecode.world import (
    CARD_MAC,
    DRY_MARK,
    HOP_MAC,
    HOP_MASQ,
    HOP_XDP,
    IFINDEX_BASE,
    NEXT,
    OUTSIDE,
    SCTP,
    SLOTS,
    TCP,
    UNDERLAY,
    Hop,
    Outcome,
    Scene,
    World,
    host_mac,
    mac_bytes,
    pod_mac,
)

__all__ = ["Ask", "Found", "Node", "Nodes", "build", "decode"]

HOP_TO_WORLD = 3
RESULT, SERVICE = 0, 4  # enum dry_answer
CARD = mac_bytes(CARD_MAC)
RST, SYN, ACK = 4, 2, 16
#: The causes of services; another one is none of theirs.
CAUSES = frozenset(
    (
        *("no-backend", "no-local-backend", "source-range", "unknown-service-port"),
        *("sctp-port-rewrite", "no-frontend"),
    )
)
CARDS = [ip for ip in generate.CARDS if not ip.startswith("fe80")]


@dataclass(frozen=True)
class Ask:
    """A packet of a client. `link`: the card that it comes by, 0: from its pod. `begins`: it
    begins a connection, as far as it says."""

    node: str
    client: Client
    frontend: Frontend
    sport: int
    link: int = 0
    begins: bool = True


@dataclass(frozen=True)
class Found:
    """What became of it. `backend`: address, and port if the packet says one. `frame`: as it
    left. `told`: its sender was answered."""

    backend: tuple[str, int | None] | None = None
    cause: str = ""
    service: int = 0
    encapsulated: bool = False
    told: bool = False
    frame: bytes = b""


@dataclass(frozen=True)
class Decoded:
    outer: str
    hint: int
    source: str
    sport: int
    target: str
    port: int
    protocol: int
    tcp_flags: int


def build(ask: Ask, mac: bytes = b"") -> bytes:
    """The frame, from a pod with this MAC or from a card. Checksums are left out: nothing reads
    them."""
    source, target = parse_address(ask.client.address), parse_address(ask.frontend.address)
    protocol, ports = PROTOCOLS[ask.frontend.protocol], (ask.sport, ask.frontend.port)
    if protocol == TCP:
        flags = SYN if ask.begins else ACK
        l4 = struct.pack("!HHIIBBHHH", *ports, 1, 0, 0x50, flags, 65535, 0, 0)
    elif protocol == SCTP:
        l4 = struct.pack("!HHIIBBH", *ports, 0, 0, 1 if ask.begins else 0, 0, 4)
    else:
        l4 = struct.pack("!HHHH", *ports, 8, 0)
    if is_ipv4(source):
        head = struct.pack(
            *("!BBHHHBBH4s4s", 0x45, 0, 20 + len(l4), 0, 0, 64, protocol, 0),
            *(source[12:], target[12:]),
        )
        kind = b"\x08\x00"
    else:
        head = struct.pack("!IHBB", 6 << 28, len(l4), protocol, 64) + source + target
        kind = b"\x86\xdd"
    return (bytes(6) + mac if mac else CARD + bytes(5) + b"\xaa") + kind + head + l4


def decode(frame: bytes) -> Decoded:
    outer, hint, at = "", 0, 14
    if frame[12:14] == b"\x08\x00":
        if frame[23] == 4:
            outer = socket.inet_ntop(socket.AF_INET, frame[30:34])
            hint, at = int.from_bytes(frame[18:20], "big"), 34
        source, target = (socket.inet_ntop(socket.AF_INET, frame[at + n :][:4]) for n in (12, 16))
        protocol, l4 = frame[at + 9], at + 20
    else:
        if frame[20] == 41:
            outer = format_address(frame[38:54])
            hint, at = int.from_bytes(frame[14:18], "big") & 0xFFFFF, 54
            own = int.from_bytes(frame[34:38], "big") & 0xFFFFF  # the flow's hash is no hint
            hint = 0 if hint == own else hint
        source, target = (format_address(frame[at + n :][:16]) for n in (8, 24))
        protocol, l4 = frame[at + 6], at + 40
    sport, port = struct.unpack_from("!HH", frame, l4)
    flags = frame[l4 + 13] if protocol == TCP else 0
    return Decoded(outer, hint, source, sport, target, port, protocol, flags)


class _Ids(Interner):
    """Pods keep their slots, and other nodes their hops."""

    def __init__(self, node: str) -> None:
        super().__init__()
        self._hops = {name: n for n, name in enumerate((n for n in generate.NODES if n != node), 1)}

    def hop(self, node: str) -> int:
        return self._hops[node]

    def is_port(self, number: int, service: Service, port: ServicePort) -> bool:
        """Is this the id of a service's port?"""
        meta = service.metadata
        return number == self.service(
            meta.namespace, meta.name, port.name, port.protocol, port.port
        )

    def give_slots(self, pods: list[Pod]) -> None:
        uids = [pod.metadata.uid for pod in pods]
        used = {*self._slots.values()}
        free = (slot for slot in range(SLOTS) if slot not in used)
        self._slots = {uid: self._slots[uid] for uid in uids if uid in self._slots} | {
            uid: next(free) for uid in uids if uid not in self._slots
        }


class Node:
    """One node of a cluster. Nothing is in force before `take`."""

    def __init__(self, name: str, world: World) -> None:
        self.name, self.world = name, world
        self.edge = edge.Edge(world, {"config_balance": 1})
        self.cards = CARDS if name == "a" else []
        self._causes = world.causes

    def forget(self, snat: bool) -> None:
        """Begin anew, with other ids. `snat`: clients outside get to other nodes' backends so,
        where a Service does not say."""
        self.world.clear()
        cards = generate.cards() if self.name == "a" else frozenset()
        self._host = Host(cards, snat)
        self.ids = _Ids(self.name)
        self.tables: Tables | None = None

    def take(self, cluster: Cluster, by_new_agent: bool = False) -> None:
        """Compile, or patch what was compiled last, and publish. `by_new_agent`: it has compiled
        nothing yet, and finds in the maps what is in force."""
        world = self.world
        if by_new_agent:
            self.tables = None
            world.publisher.read_back()
        self.cluster = cluster
        self.own = [
            one.address
            for one in cluster.nodes[self.name].status.addresses
            if one.type == "InternalIP"
        ]
        local = [
            pod
            for pod in cluster.pods.values()
            if pod.spec.node_name == self.name and not pod.finished and not pod.spec.host_network
        ]
        self.ids.give_slots(local)
        self.slots = {pod.key: self.ids.slot(pod.metadata.uid) for pod in local}
        self.tables = compile_node(cluster, self.name, self.ids, self.tables, host=self._host)
        records = {
            self.slots[pod.key]: EndpointRecord(
                self.ids.endpoint(pod),
                mac_bytes(pod_mac(self.slots[pod.key])),
                mac_bytes(host_mac(self.slots[pod.key])),
                9000,
                tuple(pod.ips),
            )
            for pod in local
        }
        masquerade, known = tuple(self.own), HOP_MAC | HOP_XDP
        ways = Scene(
            {},
            {},
            hops={
                1: Hop(UNDERLAY, known, mtu=9000, masquerade=masquerade),
                # Where the MAC is not known yet, XDP sends nothing.
                2: Hop(UNDERLAY, known if self.name == "a" else 0, mtu=9000, masquerade=masquerade),
                HOP_TO_WORLD: Hop(OUTSIDE, HOP_MASQ, mtu=9000, masquerade=masquerade),
            },
            routes={"0.0.0.0/0": HOP_TO_WORLD, "::/0": HOP_TO_WORLD},
        )
        world.write_routes(ways)
        for field, sample in (("node4", "."), ("node6", ":")):
            mine = next(parse_address(ip) for ip in self.own if sample in ip)
            world.state.view[field][0] = np.frombuffer(mine, np.uint8)
        world.publisher.publish(self.tables, records, world.hop_table(ways))

    def choose(self, client: Client, frontend: Frontend) -> Choice:
        return choose(self.cluster, self.name, client, frontend, self.cards)

    # ---- Runs --------------------------------------------------------------------------

    def dry(self, ask: Ask) -> Found:
        """What would become of it: as a new connection, and nothing is remembered."""
        program, ifindex, frame = self._way(ask)
        result = self.world.run(program, frame, ifindex, DRY_MARK)
        assert not result.events
        if result.verdict == NEXT:
            assert result.packet == frame
            return Found()
        word, service = result.cb[RESULT], result.cb[SERVICE]
        if not word & 1:
            return Found(cause=self._causes[word >> 8 & 0xFF], service=service)
        return self._served(ask, result.packet, service)

    def xdp(self, ask: Ask) -> Found | None:
        """What XDP does with it; None: it passes it."""
        _, ifindex, frame = self._way(ask)
        result = self.edge.run(frame, ifindex)
        assert not result.events
        if result.verdict == edge.PASS:
            assert result.packet == frame
            return None
        assert result.verdict in (edge.TX, edge.REDIRECT)
        found = self._served(ask, result.packet, 0)
        assert found.encapsulated
        return found

    def real(self, ask: Ask) -> Found:
        program, ifindex, frame = self._way(ask)
        return self._outcome(ask, frame, self.world.run(program, frame, ifindex))

    def inside(self, ask: Ask, frame: bytes) -> Found:
        """The client's packet, as another node sent it in an outer header."""
        frame = CARD + frame[6:]
        return self._outcome(ask, frame, self.world.run("from_net", frame, UNDERLAY))

    def _way(self, ask: Ask) -> tuple[str, int, bytes]:
        if ask.client.place == "outside":
            return "from_net", ask.link, build(ask)
        slot = self.slot_of(ask.client.address)
        return "from_pod", IFINDEX_BASE + slot, build(ask, mac_bytes(pod_mac(slot)))

    def slot_of(self, address: str) -> int:
        """Of a pod of the node; StopIteration: it has none with this address."""
        pods = self.cluster.pods
        return next(slot for key, slot in self.slots.items() if address in pods[key].ips)

    def _outcome(self, ask: Ask, frame: bytes, result: Outcome) -> Found:
        drops = [event for event in result.events if event["type"] == 2]
        if drops:
            told = result.verdict not in (NEXT, 2) and self._is_refusal(ask, result.packet)
            assert told or result.verdict == 2, result
            return Found(cause=drops[0]["cause"], service=drops[0]["service"], told=told)
        assert result.verdict != 2, result
        return self._served(ask, result.packet, 0)

    @staticmethod
    def _served(ask: Ask, frame: bytes, service: int) -> Found:
        to = decode(frame)
        if to.outer:
            return Found((to.outer, to.hint or None), "", service, True, frame=frame)
        return Found((to.target, to.port), "", service, frame=frame)

    @staticmethod
    def _is_refusal(ask: Ask, frame: bytes) -> bool:
        """A reset, or port unreachable, in the frontend's name."""
        got = decode(frame)
        ends = (got.source, got.target) == (ask.frontend.address, ask.client.address)
        if ask.frontend.protocol == "TCP":
            ports = (got.sport, got.port) == (ask.frontend.port, ask.sport)
            return ends and ports and bool(got.tcp_flags & RST)
        type_code = (3, 3) if "." in got.source else (1, 4)
        return ends and got.protocol in (1, 58) and divmod(got.sport, 256) == type_code

    # ---- What it remembers ---------------------------------------------------------------

    def remembers_flow(self, ask: Ask) -> bool:
        _, ways = self.world.flows.items()
        port = socket.htons(ask.sport)
        client = parse_address(ask.client.address)
        return any(way["sport"] == port and way["client"].tobytes() == client for way in ways)


class Nodes:
    """All nodes of a cluster, run from the network namespace of one."""

    def __init__(self) -> None:
        self.by_name = {name: Node(name, World(name=f"service-{name}")) for name in generate.NODES}

    def __getitem__(self, name: str) -> Node:
        return self.by_name[name]

    def __iter__(self) -> Iterator[Node]:
        return iter(self.by_name.values())

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread where test runs find the interfaces."""
        first = self.by_name["a"]
        with first.world.inside(), edge.awake(first.edge):
            yield

    def close(self) -> None:
        for node in self:
            node.edge.close()
            node.world.close()

    def node_of(self, cluster: Cluster, address: str) -> Node | None:
        """Whose pod or own address it is."""
        for pod in cluster.pods.values():
            if address in pod.ips and not pod.finished and not pod.spec.host_network:
                return self[pod.spec.node_name]
        return next((node for node in self if address in node.own), None)
