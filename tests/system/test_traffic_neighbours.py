"""Other people's eBPF programs on the hooks we use: they go on working, before us and after."""

from __future__ import annotations

import ctypes
import os
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from lockgate.bpf import syscall
from lockgate.bpf.syscall import AttachType, MapType
from lockgate.net import namespaces
from tests.system.harness import Cluster, connected, manifest, need_root, unique_name, until
from tests.system.test_traffic import exchange, ping

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

_SCHED_CLS = 3
_LINK_CREATE = 28
_PROG_QUERY = 16
BEFORE, AFTER = 1 << 3, 1 << 4  # BPF_F_BEFORE, BPF_F_AFTER: first or last of the hook


class Counter:
    """A tcx program that counts packets and leaves them to the next one (TCX_NEXT)."""

    def __init__(self, netns: Path, interface: str, hook: AttachType, place: int) -> None:
        self.map = syscall.map_create(MapType.ARRAY, 4, 8, 1, name="foreign")
        program = syscall.prog_load(_SCHED_CLS, self._code(), "foreign")
        with namespaces.inside(netns):
            index = socket.if_nametoindex(interface)
            attr = struct.pack("<IIII32x", program, index, hook, place)
            self.link = syscall._bpf(_LINK_CREATE, attr, f"attach to {interface}")
        os.close(program)

    def _code(self) -> bytes:
        def insn(code: int, dst: int = 0, src: int = 0, off: int = 0, imm: int = 0) -> bytes:
            return struct.pack("<BBhi", code, src << 4 | dst, off, imm)

        return b"".join(
            (
                insn(0x62, 10, off=-4),  # *(u32 *)(r10 - 4) = 0
                insn(0xBF, 2, 10),  # r2 = r10
                insn(0x07, 2, imm=-4),  # r2 += -4
                insn(0x18, 1, 1, imm=self.map) + insn(0),  # r1 = map
                insn(0x85, imm=1),  # r0 = map_lookup_elem
                insn(0x15, 0, off=2),  # if r0 == 0 goto the end
                insn(0xB7, 1, imm=1),  # r1 = 1
                insn(0xDB, 0, 1),  # lock *(u64 *)r0 += r1
                insn(0xB7, 0, imm=-1),  # r0 = TCX_NEXT
                insn(0x95),
            )
        )

    @property
    def count(self) -> int:
        value = syscall.map_lookup(self.map, bytes(4), 8)
        assert value is not None
        return int.from_bytes(value, "little")

    @property
    def attached(self) -> bool:
        return syscall.link_info(self.link).ifindex != 0

    def close(self) -> None:
        os.close(self.link)
        os.close(self.map)


@contextmanager
def counter(netns: Path, interface: str, hook: AttachType, place: int) -> Iterator[Counter]:
    made = Counter(netns, interface, hook, place)
    try:
        yield made
    finally:
        made.close()


def pod_link(cluster: Cluster, name: str) -> str:
    pod = cluster.pod(name)
    words = cluster.node(pod.node).run("ip", "route", "get", pod.ip(4)).stdout.split()
    return words[words.index("dev") + 1]


@pytest.mark.parametrize("place", [BEFORE, AFTER], ids=["before", "after"])
def test_programs_of_others_see_packets_and_packets_pass(traffic: Cluster, place: int) -> None:
    pod, other = traffic.pod("traffic/a"), traffic.pod("traffic/c")
    netns = traffic.state.netns_path("node-1")
    link = pod_link(traffic, "traffic/a")
    hooks = {
        "pod ingress": (link, AttachType.TCX_INGRESS),
        "pod egress": (link, AttachType.TCX_EGRESS),
        "card ingress": ("underlay0", AttachType.TCX_INGRESS),
    }
    with ExitStack() as stack:
        counters = {
            name: stack.enter_context(counter(netns, interface, hook, place))
            for name, (interface, hook) in hooks.items()
        }
        with connected(pod, other, other.ip(4), 0) as (near, far):
            exchange(near, far, 100_000)
            exchange(far, near, 100_000)
        assert ping(traffic.node("node-1"), pod.ip(4), 56)
        assert ping(traffic.node("node-1"), traffic.node_ip("node-2"), 56)
        assert all(one.attached for one in counters.values())
        # What we send on by the shortest way is not seen by those behind us; the rest is.
        assert {name for name, one in counters.items() if one.count} == set(hooks)


def test_starting_and_ending_leaves_programs_of_others_alone(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("foreign")
    spec = {"nodeName": "node-1", "containers": [{"name": "main"}]}
    (folder / "pods.yaml").write_text(manifest("Pod", "default", "one", spec))
    with ExitStack() as stack:
        cluster = Cluster(folder, unique_name("tf"), nodes=2)
        stack.callback(cluster.down)
        cluster.up()
        # Held open, so that the machines stay when `down` removes their names.
        for name in (cluster.state.netns("node-1"), cluster.state.underlay_netns):
            held = os.open(namespaces.path_of(name), os.O_RDONLY)
            stack.callback(os.close, held)
            if name == cluster.state.netns("node-1"):
                netns = Path(f"/proc/self/fd/{held}")
        first, last = (
            stack.enter_context(counter(netns, "underlay0", AttachType.TCX_INGRESS, place))
            for place in (BEFORE, AFTER)
        )
        pid = cluster.status()["nodes"][0]["agent"]["pid"]
        os.kill(pid, 9)
        until(
            lambda: cluster.status()["nodes"][0]["agent"]["pid"] not in (None, pid), "a new agent"
        )
        cluster.wait()
        assert first.attached and last.attached
        before = first.count, last.count
        assert ping(cluster.node("node-1"), cluster.node_ip("node-2"), 56)
        assert first.count > before[0] and last.count > before[1]
        assert programs_at(netns, "underlay0") == 3
        cluster.down()
        assert first.attached and last.attached
        assert programs_at(netns, "underlay0") == 2


def programs_at(netns: Path, interface: str) -> int:
    """How many tcx programs there are at an interface's ingress (BPF_PROG_QUERY)."""
    ids = (ctypes.c_uint32 * 16)()
    with namespaces.inside(netns):
        attr = bytearray(
            struct.pack(
                "<IIIIQI36x",
                socket.if_nametoindex(interface),
                AttachType.TCX_INGRESS,
                0,
                0,
                ctypes.addressof(ids),
                len(ids),
            )
        )
        syscall._call(_PROG_QUERY, (ctypes.c_char * len(attr)).from_buffer(attr))
    return sum(1 for one in ids if one)
