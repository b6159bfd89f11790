"""The kernel's verdicts against the specification's, on random clusters.

A cluster is compiled for one of its nodes and published; then packets, each asked of the program
that would see it there, in dry mode. rounds.py makes the clusters and the packets.
"""

from __future__ import annotations

import random
import socket
import struct
from dataclasses import dataclass, field, replace
from typing import Any

from lockgate.agent.publish import EndpointRecord
from lockgate.bpf import syscall
from lockgate.compile import Tables, compile_node
from lockgate.compile.tables import CELL_ALLOW, CELL_REASON, POLICY, UNREADABLE
from lockgate.objects.address import format_address, is_ipv4, parse_address
from lockgate.objects.model import Cluster, Pod
from lockgate.spec import policy as spec
from tests import generate
from tests.bytecode.world import (
    DRY_MARK,
    HOP_MASQ,
    IFINDEX_BASE,
    OUTSIDE,
    SLOTS,
    UNDERLAY,
    Hop,
    Scene,
    World,
    mac_bytes,
    pod_mac,
)

PROTOCOLS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}
NAMES = {number: name for name, number in PROTOCOLS.items()}
HOP_TO_NODE, HOP_TO_WORLD = 1, 2
WAYS = Scene(
    {},
    {},
    hops={
        HOP_TO_NODE: Hop(UNDERLAY, mtu=9000),
        HOP_TO_WORLD: Hop(OUTSIDE, HOP_MASQ, mtu=9000, masquerade=("192.0.2.1", "fd00:0:0:ff::1")),
    },
    routes={"0.0.0.0/0": HOP_TO_WORLD, "::/0": HOP_TO_WORLD},
)
INGRESS, EGRESS = 1, 2  # enum direction
RESULT, CELL_E, CELL_I, TARGET, SERVICE = range(5)  # enum dry_answer


class Interner:
    """Ids for the compiler (lockgate.compile.tables.Ids), and back."""

    def __init__(self) -> None:
        self._numbers: dict[Any, int] = {}
        self.reasons: dict[int, tuple[Any, ...]] = {}
        self._slots: dict[str, int] = {}

    def _number(self, *key: Any) -> int:
        return self._numbers.setdefault(key, len(self._numbers) + 1)

    def endpoint(self, pod: Pod) -> int:
        return self._number("endpoint", pod.metadata.uid)

    def reason(self, verdict: str, direction: str, rules: tuple[Any, ...]) -> int:
        number = self._number("reason", verdict, direction, rules)
        self.reasons[number] = (verdict, direction, rules)
        return number

    def service(self, *key: Any) -> int:
        return self._number("service", *key)

    def slot(self, uid: str) -> int | None:
        return self._slots.get(uid)

    def hop(self, node: str) -> int:
        return HOP_TO_NODE

    def give_slots(self, pods: list[Pod]) -> None:
        self._slots = {pod.metadata.uid: slot for slot, pod in enumerate(pods)}


@dataclass(eq=False)
class Mismatch(Exception):
    """The kernel and the specification differ. `text` says in what."""

    packet: spec.Packet
    program: str
    text: str
    #: Where `packet` is what came of it behind a service.
    sent: spec.Packet | None = None

    def __str__(self) -> str:
        return f"{self.program} on {self.packet}:\n{self.text}"


@dataclass
class Case:
    """A cluster as one of its nodes has it, in the kernel."""

    world: World
    cluster: Cluster
    node: str
    ids: Interner = field(default_factory=Interner)
    tables: Tables | None = None

    def publish(self, previous: Tables | None = None) -> bool:
        """Compile and bring in force; True if that moved the epoch. `previous`: tables of this
        case to be patched, else all is compiled from nothing."""
        local = [
            pod
            for pod in self.cluster.pods.values()
            if pod.spec.node_name == self.node and not pod.finished and not pod.spec.host_network
        ]
        assert len(local) <= SLOTS
        self.ids.give_slots(local)
        self.slots = {pod.key: slot for slot, pod in enumerate(local)}
        given = () if previous is None else (previous,)
        self.tables = compile_node(self.cluster, self.node, self.ids, *given)
        shared = ("an address is", "is taken by")
        unexpected = [e for e in self.tables.errors if not any(text in e for text in shared)]
        assert not unexpected, unexpected
        records = {
            slot: EndpointRecord(
                self.ids.endpoint(pod),
                mac_bytes(pod_mac(slot)),
                bytes(6),
                9000,
                tuple(pod.ips),
            )
            for slot, pod in enumerate(local)
        }
        self.world.write_routes(WAYS)
        self.own = {
            parse_address(a.address)
            for a in self.cluster.nodes[self.node].status.addresses
            if a.type == "InternalIP"
        }
        return self.world.publisher.publish(self.tables, records, self.world.hop_table(WAYS))

    def check(self, packet: spec.Packet) -> bool:
        """Ask the kernel and the specification; Mismatch if they differ. False: the packet
        does not cross this node."""
        source = spec.pod_at(self.cluster, packet.source)
        target = spec.pod_at(self.cluster, packet.destination)
        source_slot = self.slots.get(source.key) if source else None
        target_slot = self.slots.get(target.key) if target else None
        cb: tuple[int, ...] = ()
        if source_slot is not None:
            program, ifindex = "from_pod", IFINDEX_BASE + source_slot
        elif target_slot is None:
            return False
        elif parse_address(packet.source) in self.own:
            # By a socket of the node, or forwarded by its stack for another.
            program, ifindex = "to_pod", IFINDEX_BASE + target_slot
            cb = (int(packet.from_own_node),)
        elif source is None and packet.source in generate.OUTSIDE:
            program, ifindex = "from_net", OUTSIDE
        else:
            program, ifindex = "from_net", UNDERLAY
        if program != "to_pod":
            packet = replace(packet, from_own_node=False)
        frame = build(packet, source_slot)
        result = self.run(program, frame, ifindex, cb)
        if packet.destination in self.services():
            return self.check_service(packet, result, source_slot)
        self.compare(packet, program, result.cb, source_slot, target_slot)
        return True

    def check_service(
        self, packet: spec.Packet, result: syscall.TestRun, source_slot: int | None
    ) -> bool:
        """An allowed packet says which backend was drawn; of a denied one we only know that it
        was one of the service's, so one must have just this answer."""
        drawn = [destination(result.data)]
        if not result.cb[RESULT] & 1:
            if result.cb[RESULT] >> 8 & 0xFF != 1:
                return False  # no backend, SCTP ports: no question of policies
            drawn = [
                (format_address(address), port)
                for address, service, port, _ in sorted(self.tables.backends)
                if service == result.cb[SERVICE] and is_ipv4(address) == (":" not in packet.source)
            ]
        mismatch = Mismatch(packet, "from_pod", "denied, but the service has no backends")
        for address, port in drawn:
            target = spec.pod_at(self.cluster, address)
            target_slot = self.slots.get(target.key) if target else None
            asked = spec.Packet(packet.source, address, packet.protocol, port)
            try:
                self.compare(asked, "from_pod", result.cb, source_slot, target_slot)
                return True
            except Mismatch as found:
                mismatch = found
        mismatch.sent = packet
        raise mismatch

    def services(self) -> set[str]:
        return {ip for service in self.cluster.services.values() for ip in service.cluster_ips}

    def run(
        self, program: str, frame: bytes, ifindex: int, cb: tuple[int, ...] = ()
    ) -> syscall.TestRun:
        context = syscall.skb_context(mark=DRY_MARK, ifindex=ifindex, cb=cb)
        return syscall.prog_test_run(
            self.world.object.prog_fd(program), frame, context, name=program
        )

    def compare(
        self,
        packet: spec.Packet,
        program: str,
        cb: tuple[int, ...],
        source_slot: int | None,
        target_slot: int | None,
    ) -> None:
        answer = spec.judge(self.cluster, packet)
        # What this node judges, in order; a denial ends it. Exempt: allowed, for no rule.
        exempt = answer.egress is None and answer.ingress is None
        wanted: list[tuple[int, Any]] = []
        if source_slot is not None:
            wanted.append((EGRESS, answer.egress))
        denied = bool(wanted) and not exempt and not answer.egress.allowed
        if target_slot is not None and not denied:
            wanted.append((INGRESS, answer.ingress))
            denied = not exempt and not answer.ingress.allowed
        differences = []
        verdict, cause, judged = cb[RESULT] & 0xFF, cb[RESULT] >> 8 & 0xFF, cb[RESULT] >> 16
        if verdict != (not denied):
            differences.append(f"verdict: kernel {verdict}, specification {int(not denied)}")
        if cause != int(denied):
            differences.append(f"cause: kernel {self.world.causes.get(cause, cause)}")
        bits = sum(1 << direction for direction, _ in wanted)
        if judged != bits:
            differences.append(f"directions judged: kernel {judged:#b}, wanted {bits:#b}")
        for direction, judgement in wanted:
            name = "egress" if direction == EGRESS else "ingress"
            mine = self.meaning(cb[CELL_E if direction == EGRESS else CELL_I])
            theirs = expected(judgement, name)
            if mine != theirs:
                differences.append(f"{name}: kernel {mine}\n{name}: specification {theirs}")
        if differences:
            raise Mismatch(packet, program, "\n".join(differences))

    def meaning(self, cell: int) -> tuple[Any, ...]:
        """(verdict, direction, rules) of a cell; no rules and no direction: no policy."""
        verdict = "allow" if cell & CELL_ALLOW else "deny"
        reason = cell & CELL_REASON
        if not reason:
            return (verdict, None, ())
        known = self.ids.reasons.get(reason, ("?", "?", (f"unknown reason {reason}",)))
        return known if known[0] == verdict else (verdict, f"for a reason to {known[0]}", known[2])


def expected(judgement: Any, direction: str) -> tuple[Any, ...]:
    if judgement is None or not judgement.isolated:
        return ("allow", None, ())
    if judgement.allowed:
        rules = tuple((ns, name, index) for ns, name, _, index in judgement.rules)
        return ("allow", direction, rules)
    return (
        "deny",
        direction,
        tuple(
            (*policy, UNREADABLE if policy in judgement.unreadable else POLICY)
            for policy in judgement.policies
        ),
    )


# ---- Packets -------------------------------------------------------------------------


def build(packet: spec.Packet, slot: int | None = None) -> bytes:
    """The frame of a connection's first packet. Checksums are left out: nothing reads them."""
    source, target = parse_address(packet.source), parse_address(packet.destination)
    proto = PROTOCOLS[packet.protocol]
    port = packet.port or 0
    if proto == 6:
        l4 = struct.pack("!HHIIBBHHH", 40000, port, 1, 0, 0x50, 2, 65535, 0, 0)
    elif proto == 17:
        l4 = struct.pack("!HHHH", 40000, port, 8, 0)
    elif proto == 132:
        l4 = struct.pack("!HHII", 40000, port, 0, 0) + struct.pack("!BBH", 1, 0, 4)
    else:
        l4 = struct.pack("!BBHHH", 8 if proto == 1 else 128, 0, 0, 7, 1)
    mac = bytes(6) + (mac_bytes(pod_mac(slot)) if slot is not None else bytes(6))
    if is_ipv4(source):
        head = struct.pack(
            "!BBHHHBBH4s4s", 0x45, 0, 20 + len(l4), 0, 0, 64, proto, 0, source[12:], target[12:]
        )
        return mac + b"\x08\x00" + head + l4
    return (
        mac
        + b"\x86\xdd"
        + struct.pack("!IHBB", 6 << 28, len(l4), proto, 64)
        + (source + target + l4)
    )


def destination(frame: bytes) -> tuple[str, int | None]:
    """Address and port that a frame goes to."""
    if frame[12:14] == b"\x08\x00":
        address, proto, l4 = socket.inet_ntop(socket.AF_INET, frame[30:34]), frame[23], 34
    else:
        address, proto, l4 = format_address(frame[38:54]), frame[20], 54
    ported = proto in (6, 17, 132)
    return address, struct.unpack_from("!H", frame, l4 + 2)[0] if ported else None


def random_packet(rng: random.Random, cluster: Cluster) -> spec.Packet:
    found = generate.packet(rng, cluster)
    packet = spec.Packet(*found[:4])
    if rng.random() < 0.1:
        packet = through_service(rng, cluster, packet)
    if rng.random() < 0.5 and any(
        packet.source == a.address for n in cluster.nodes.values() for a in n.status.addresses
    ):
        packet = spec.Packet(*found[:4], from_own_node=True)
    return packet


def through_service(rng: random.Random, cluster: Cluster, packet: spec.Packet) -> spec.Packet:
    services = [s for s in cluster.services.values() if s.cluster_ips]
    source = spec.pod_at(cluster, packet.source)
    if not services or source is None:
        return packet
    service = rng.choice(services)
    port = rng.choice(service.spec.ports)
    for ip in service.cluster_ips:
        if (":" in ip) == (":" in packet.source):
            return spec.Packet(packet.source, ip, port.protocol, port.port)
    return packet
