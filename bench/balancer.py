"""ns per packet of XDP's balancer over an XDP program that only sends the frame back.

By live frames (`BPF_F_TEST_XDP_LIVE_FRAMES`): the kernel runs the program on 64 frames at a time
and really sends them, into a veth whose other end drops them. What the last run left in a frame is
written over first, in the empty program as well, and what was decided is counted. And by single
cold test runs, as `packet`. 10 frontends with 100 backends of another node, both families.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bench import kernel
from lockgate.agent.datapath import Datapath
from lockgate.agent.publish import Publisher
from lockgate.agent.sizes import Sizes
from lockgate.bpf import syscall
from lockgate.bpf.maps import ArrayMap, PerCpuArray
from lockgate.bpf.object import Object
from lockgate.compile import compile_node
from lockgate.objects.address import parse_address
from lockgate.objects.model import (
    Cluster,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    Node,
    NodeAddress,
    NodeSpec,
    NodeStatus,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
)

FRONTENDS, BACKENDS, CLIENTS = 10, 100, 65536
#: As on a node with 8 GB: room for 65,536 flows.
FLOW_SETS = 32768
CARD, OTHER_END, HOP = 100, 101, 1
MAC = bytes.fromhex("020000000001")
PASS, TX = 2, 3  # enum xdp_action
TCP, UDP, SYN, ACK = 6, 17, 0x02, 0x10
HEAD = 80  # of bench/balancer.bpf.c: so long is each frame
ADDRESSES = {
    4: ("198.51.0.0", "203.0.113.{}", "192.0.2.9"),
    6: ("2001:db8:51::", "2001:db8:113::{}", "2001:db8:2::9"),
}
#: Constants of the program by what of the table of flows it uses.
FLOWS: dict[str, dict[str, int]] = {
    "flows": {"config_flows": 1, "config_flow_ns": 20_000},
    "flows, all learned": {"config_flows": 1, "config_flow_ns": 0},
    "no flows": {"config_flows": 0},
}


@dataclass(frozen=True)
class Case:
    """A packet and how many clients take turns in sending it; 0: always another."""

    name: str
    proto: int
    flags: int
    clients: int
    kinds: tuple[str, ...]
    ours: bool = True


ALL = ("flows", "no flows")
CASES = (
    Case("TCP established, one client", TCP, ACK, 1, ALL),
    Case("TCP established, 65,536 clients", TCP, ACK, CLIENTS, ALL),
    Case("TCP new, one client", TCP, SYN, 1, ALL),
    Case(
        "TCP new, always another client", TCP, SYN, 0, ("flows", "flows, all learned", "no flows")
    ),
    Case("UDP, one client", UDP, 0, 1, ALL),
    Case("UDP, 65,536 clients", UDP, 0, CLIENTS, ALL),
    Case("not ours", TCP, ACK, CLIENTS, ("flows",), ours=False),
)


def cluster() -> Cluster:
    """This node is "a"; all backends are on "b"."""
    found = Cluster()
    for number, name in enumerate("ab", 1):
        found.nodes[name] = Node(
            metadata=ObjectMeta(name=name),
            spec=NodeSpec(pod_cidrs=[f"10.0.{number}.0/24", f"fd00:{number}::/64"]),
            status=NodeStatus(addresses=[NodeAddress("InternalIP", f"192.0.2.{number}")]),
        )
    for n in range(BACKENDS):
        ips = [PodIP(f"10.0.2.{n + 1}"), PodIP(f"fd00:2::{n + 1:x}")]
        found.pods["bench", f"pod-{n}"] = Pod(
            metadata=ObjectMeta(name=f"pod-{n}", namespace="bench", uid=f"uid-{n}"),
            spec=PodSpec(node_name="b"),
            status=PodStatus(phase="Running", pod_ips=ips),
        )
    ports = [ServicePort(80, "tcp", "TCP"), ServicePort(80, "udp", "UDP")]
    for n in range(FRONTENDS):
        name = f"service-{n}"
        ingress = [LoadBalancerIngress(ADDRESSES[f][1].format(n + 1)) for f in (4, 6)]
        found.services["bench", name] = Service(
            metadata=ObjectMeta(name=name, namespace="bench", uid=name),
            spec=ServiceSpec(
                type="LoadBalancer", cluster_ips=[f"10.96.0.{n + 1}", f"fd00:96::{n}"], ports=ports
            ),
            status=ServiceStatus(LoadBalancerStatus(ingress)),
        )
        for family in (4, 6):
            found.slices["bench", f"{name}-{family}"] = EndpointSlice(
                metadata=ObjectMeta(
                    name=f"{name}-{family}",
                    namespace="bench",
                    labels={"kubernetes.io/service-name": name},
                ),
                address_type="IPv4" if family == 4 else "IPv6",
                endpoints=[
                    Endpoint([pod.ips[family == 6]], EndpointConditions(ready=True), node_name="b")
                    for pod in found.pods.values()
                ],
                ports=[EndpointPort(8080, "tcp", "TCP"), EndpointPort(8080, "udp", "UDP")],
            )
    return found


def frame(family: int, case: Case) -> bytes:
    """HEAD bytes, without the upper layer's checksum."""
    source, frontend, other = ADDRESSES[family]
    ends = [parse_address(ip) for ip in (source, frontend.format(3) if case.ours else other)]
    ports = struct.pack("!HH", 0, 80)
    size = HEAD - 14 - (20 if family == 4 else 40)
    if case.proto == TCP:
        upper = ports + struct.pack("!IIBBHHH", 1, 1, 0x50, case.flags, 65535, 0, 0)
    else:
        upper = ports + struct.pack("!HH", size, 0)
    upper = upper.ljust(size, b"x")
    if family == 6:
        head = struct.pack("!IHBB", 6 << 28, size, case.proto, 64)
        return MAC + MAC + b"\x86\xdd" + head + b"".join(ends) + upper
    head = struct.pack("!BBHHHBBH", 0x45, 0, HEAD - 14, 1, 0x4000, 64, case.proto, 0)
    head += b"".join(end[12:] for end in ends)
    total = sum(struct.unpack("!10H", head))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return MAC + MAC + b"\x08\0" + head[:10] + struct.pack("!H", total ^ 0xFFFF) + head[12:] + upper


class World:
    """The maps as an agent fills them, and the programs over them by kind."""

    def __init__(self, pins: Path) -> None:
        self.dp = Datapath(_object("lockgate"), pins, Sizes(16384, 16384, 16384, 16384, FLOW_SETS))
        found = cluster()
        tables = compile_node(found, "a", kernel.Ids(found, "a"))
        if tables.errors:
            raise ValueError(tables.errors[0])
        hops = np.zeros(len(self.dp.hops), self.dp.object.schema.dtype("hop_view"))
        flags = self.dp.object.schema.enum("hop_flag")
        hop = hops[HOP]
        hop["ifindex"], hop["mtu"] = CARD, 1500
        hop["flags"] = flags["HOP_MAC"] | flags["HOP_XDP"]
        hop["dmac"] = hop["smac"] = np.frombuffer(MAC, np.uint8)
        Publisher(self.dp).publish(tables, {}, hops)
        self.live = {kind: self._load("balancer", more) for kind, more in FLOWS.items()}
        self.single = {kind: self._load("lockgate-xdp", more) for kind, more in FLOWS.items()}

    def close(self) -> None:
        for one in (*self.live.values(), *self.single.values()):
            one.close()
        self.dp.close()

    def _load(self, name: str, more: Mapping[str, Any]) -> Object:
        made = Object(_object(name))
        made.share_maps(self.dp.object)
        mac = int.from_bytes(MAC, "little")
        made.set_rodata(
            {
                **_known(made, self.dp.constants),
                "config_balance": 1,
                "config_macs": [mac, *[0] * 7],
                **more,
            }
        )
        made.load()
        return made

    def forget(self) -> None:
        """Flows of the last case."""
        self.dp.flows.view[:] = np.zeros((), self.dp.flows.view.dtype)


def _known(of: Object, constants: Mapping[str, Any]) -> dict[str, Any]:
    names = of.schema.variables(".rodata")
    return {name: value for name, value in constants.items() if name in names}


def _object(name: str) -> Path:
    return Path(__file__).parents[1] / "build" / f"{name}.bpf.o"


@contextmanager
def veth(world: World) -> Iterator[None]:
    """The card, in use by XDP, and its other end, which drops what comes."""
    drop = struct.pack("<BBhi", 0xB7, 0, 0, 1) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    program = syscall.prog_load(6, drop, "drop")
    own = world.single["flows"].prog_fd("xdp_net")
    held = [
        syscall.link_create(fd, index, syscall.AttachType.XDP, flags=1 << 2)
        for fd, index in ((own, CARD), (program, OTHER_END))
    ]
    try:
        yield
    finally:
        for fd in (*held, program):
            os.close(fd)


class Live:
    """Runs on live frames."""

    def __init__(self, world: World, frames: int) -> None:
        self._world, self._frames = world, frames

    def run(self, kind: str, program: str, family: int, case: Case) -> tuple[float, list[int]]:
        """ns a frame, and what was decided, by enum xdp_action."""
        made = self._world.live[kind]
        data = frame(family, case)
        course = ArrayMap.of(made, "course", made.schema.dtype("course"))
        record = np.zeros((), course.value_dtype)
        record["head"] = np.frombuffer(data, np.uint8)
        record["client"], record["ports"] = (28, 34) if family == 4 else (36, 54)
        record["mask"] = (case.clients or 1 << 32) - 1
        course[0] = record
        verdicts = PerCpuArray.of(made, "verdicts", np.dtype("<u8"))
        before = verdicts.values().sum(axis=1)
        context = syscall.xdp_context(len(data), CARD)
        done = syscall.prog_test_run(
            made.prog_fd(program), data, context, repeat=self._frames, live=True
        )
        found = verdicts.values().sum(axis=1) - before
        for one in (course, verdicts):
            one.close()
        return done.duration, found.tolist()

    def costs(self, kind: str, family: int, case: Case, rounds: int) -> float:
        """Median of the rounds' differences, ns."""
        self._world.forget()
        begins = Case(case.name, case.proto, SYN if case.proto == TCP else 0, case.clients, ())
        if kind != "no flows" and case.clients and case.ours:
            # As they would have been learned, but at once.
            for _ in range(-(-case.clients // self._frames)):
                self.run("flows, all learned", "balanced", family, begins)
        found = []
        for _ in range(rounds):
            empty, _ = self.run(kind, "nothing", family, case)
            ns, verdicts = self.run(kind, "balanced", family, case)
            wanted = TX if case.ours else PASS
            if verdicts[wanted] != self._frames:
                raise AssertionError(f"{case.name}, IPv{family}, {kind}: decided {verdicts}")
            found.append(ns - empty)
        return statistics.median(found)


def single(world: World, kind: str, family: int, case: Case, rounds: int) -> float:
    """Median of single cold runs over those of an empty program, ns."""
    world.forget()
    send = struct.pack("<BBhi", 0xB7, 0, 0, TX) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    empty = syscall.prog_load(6, send, "empty")
    fd = world.single[kind].prog_fd("xdp_net")
    learning = world.single["flows, all learned"].prog_fd("xdp_net")
    data = bytearray(frame(family, case))
    client, ports = (28, 34) if family == 4 else (36, 54)
    context = syscall.xdp_context(len(data), CARD)
    wanted = TX if case.ours else PASS
    times: dict[str, list[int]] = {"empty": [], "balanced": []}
    for n in range(rounds):
        number = n % (min(case.clients, 4096) or 1 << 32)
        struct.pack_into("!H", data, client, number >> 16)
        struct.pack_into("!H", data, ports, number & 0xFFFF)
        if kind == "flows" and case.clients and n == number:
            first = bytearray(data)
            if case.proto == TCP:
                first[ports + 13] = SYN
            syscall.prog_test_run(learning, bytes(first), context)
        times["empty"].append(syscall.prog_test_run(empty, bytes(data), context).duration)
        done = syscall.prog_test_run(fd, bytes(data), context)
        if done.retval != wanted:
            raise AssertionError(f"{case.name}, IPv{family}, {kind}: answered {done.retval}")
        times["balanced"].append(done.duration)
    os.close(empty)
    return statistics.median(times["balanced"]) - statistics.median(times["empty"])


def main() -> None:
    quick = "--quick" in sys.argv
    frames, rounds, singles = (16384, 3, 200) if quick else (CLIENTS, 31, 8000)
    kernel.own_namespace(())
    ends = f"index {CARD} type veth peer name card-end index {OTHER_END}"
    subprocess.run(["ip", "link", "add", "card", *ends.split()], check=True)
    for name in ("card", "card-end"):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    pins = Path("/sys/fs/bpf/lockgate", f"bench-balancer-{os.getpid()}")
    rows = []
    try:
        world = World(pins)
        with veth(world):
            live = Live(world, frames)
            for case in CASES:
                for kind in case.kinds:
                    row: dict[str, Any] = {
                        "packet": f"{case.name}; {kind}" if case.ours else case.name
                    }
                    for family in (4, 6):
                        row[f"live IPv{family}"] = live.costs(kind, family, case, rounds)
                        row[f"single IPv{family}"] = single(world, kind, family, case, singles)
                    rows.append(row)
        world.close()
    finally:
        shutil.rmtree(pins, ignore_errors=True)
    print(
        json.dumps(
            {
                "name": "balancer",
                "title": "ns per packet of xdp_net over an empty XDP program that sends it back",
                "columns": ["packet", "live IPv4", "live IPv6", "single IPv4", "single IPv6"],
                "rows": rows,
                "notes": [
                    f"live: medians of {rounds} rounds of {frames:,} frames, both in turn",
                    f"single: medians of {singles:,} cold test runs; at most 4,096 clients",
                    f"{FRONTENDS} frontends, {BACKENDS} backends, 16,384 slots; 50,000 flows/s",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
