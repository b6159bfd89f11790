"""Nodes that come, go and change addresses, and pods that go on talking through tunnels."""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import ArrayMap
from lockgate.bpf.pins import pin_names
from lockgate.net import namespaces
from lockgate.paths import bpf_object
from tests.system.agents import NODES, Bed, Node, make_bed, pod, until, with_ips
from tests.system.harness import need_root

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

HOP_MAC, HOP_TUNNEL = 1, 8


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with make_bed(tmp_path) as made:
        yield made


class Talk:
    """A TCP connection from one pod to another."""

    def __init__(self, bed: Bed, source: str, destination: str, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with namespaces.inside(namespaces.path_of(f"lg-{bed.cluster}-{destination}")):
            listener = socket.socket(family)
        with namespaces.inside(namespaces.path_of(f"lg-{bed.cluster}-{source}")):
            self.near = socket.socket(family)
        with listener:
            listener.bind(("", 0))
            listener.listen()
            self.near.settimeout(10)
            self.near.connect((address, listener.getsockname()[1]))
            self.far, _ = listener.accept()
        self.far.settimeout(10)

    def goes_on(self) -> None:
        for one, other in ((self.near, self.far), (self.far, self.near)):
            one.sendall(b"still here")
            assert other.recv(100) == b"still here"

    def close(self) -> None:
        self.near.close()
        self.far.close()


def hop(node: Node, number: int) -> Any:
    """The record in force."""
    schema = Schema.from_object(bpf_object())
    names = pin_names(schema)
    with (
        ArrayMap.open(str(node.pins / names["hops"]), schema.dtype("hop")) as table,
        ArrayMap.open(str(node.pins / names["state"]), schema.dtype("node_state")) as state,
    ):
        return table[number]["view"][int(state[0]["epoch"]) & 1]


def node_object(name: str, v4: str, v6: str, number: int) -> dict[str, Any]:
    addresses = [{"type": "InternalIP", "address": ip} for ip in (v4, v6) if ip]
    return {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {"name": name},
        "spec": {"podCIDRs": [f"10.77.{number}.0/24", f"fd77:{number}::/64"]},
        "status": {"addresses": addresses},
    }


async def two_pods(bed: Bed) -> tuple[list[str], list[str]]:
    items = {"near": pod("near", "one"), "far": pod("far", "two")}
    bed.supervisor.put(*items.values())
    near, far = await bed.nodes["one"].add("near"), await bed.nodes["two"].add("far")
    made = [with_ips(items["near"], near["ips"]), with_ips(items["far"], far["ips"])]
    await bed.supervisor.wait(bed.supervisor.put(*made, verb="MODIFIED"), "one", "two")
    return near["ips"], far["ips"]


async def restart(bed: Bed, routing: str) -> None:
    for node in bed.nodes.values():
        await node.kill()
        node.settings["routing"] = routing
        await node.start()
    await bed.supervisor.wait(bed.supervisor.put(), "one", "two")


async def test_connections_stand_while_other_nodes_come_go_and_move(bed: Bed) -> None:
    one = bed.nodes["one"]
    await restart(bed, "vxlan")
    _, far_ips = await two_pods(bed)
    before = hop(one, 8)
    assert before["flags"] == HOP_MAC | HOP_TUNNEL and before["mtu"] == 1450
    with ExitStack() as stack:
        talks = [await asyncio.to_thread(Talk, bed, "near", "far", ip) for ip in far_ips]
        for talk in talks:
            stack.callback(talk.close)
        for turn in range(3):
            others = [
                node_object(f"other-{n}", f"192.168.77.{20 + n}", f"fd77::{20 + n}", 20 + n)
                for n in range(5)
            ]
            revision = bed.supervisor.put(*others, verb="MODIFIED" if turn else "ADDED")
            await bed.supervisor.wait(revision, "one", "two")
            moved = node_object("other-0", f"203.0.113.{turn + 1}", "", 20)
            await bed.supervisor.wait(bed.supervisor.put(moved, verb="MODIFIED"), "one", "two")
            for talk in talks:
                await asyncio.to_thread(talk.goes_on)
            revision = bed.supervisor.put(*others[1:], verb="DELETED")
            await bed.supervisor.wait(revision, "one", "two")
            for talk in talks:
                await asyncio.to_thread(talk.goes_on)
            assert np.array_equal(hop(one, 8), before)
        assert "10.77.20.0/24 encap" in await routes(one)
        assert "10.77.21.0/24" not in await routes(one)


async def test_a_node_that_changes_its_address_keeps_its_connections(bed: Bed) -> None:
    await restart(bed, "vxlan")
    _, far_ips = await two_pods(bed)
    two = bed.nodes["two"]
    talk = await asyncio.to_thread(Talk, bed, "near", "far", far_ips[0])
    try:
        await ip(two, "addr", "add", "192.168.77.9/24", "dev", "underlay")
        v6, number = NODES["two"][1:]
        moved = node_object("two", "192.168.77.9", v6, number)
        await bed.supervisor.wait(bed.supervisor.put(moved, verb="MODIFIED"), "one", "two")
        await run(two, "sysctl", "-qw", "net.ipv4.conf.underlay.promote_secondaries=1")
        await ip(two, "addr", "del", f"{NODES['two'][0]}/24", "dev", "underlay")
        await asyncio.to_thread(talk.goes_on)
        assert "dst 192.168.77.9" in await routes(bed.nodes["one"])
    finally:
        talk.close()


async def test_pod_cidrs_with_nonsense_are_named_and_the_others_go_on(bed: Bed) -> None:
    one = bed.nodes["one"]
    nodes = []
    for number, cidrs in enumerate(
        (
            ["010.77.31.0/24", "10.77.31.0/24"],
            ["10.77.32.0"],
            ["10.77.33.7/24"],
        ),
        31,
    ):
        item = node_object(f"odd-{number}", f"192.168.77.{number}", f"fd77::{number}", number)
        nodes.append(item | {"spec": {"podCIDRs": cidrs}})
    mine = node_object("one", "192.168.77.1", "fd77::1", 1)
    mine["spec"]["podCIDRs"].insert(0, "nonsense")
    bed.supervisor.put(*nodes)
    await bed.supervisor.wait(bed.supervisor.put(mine, verb="MODIFIED"), "one")
    table = await routes(one)
    assert "10.77.31.0/24" in table and "10.77.33.0/24" in table and "10.77.32" not in table
    status = (await one.call("GET", "/v1/status"))[1]
    named = [text.partition(": not a")[0] for text in status["errors"] if "podCIDRs" in text]
    assert sorted(named) == [f"Node {name}: spec.podCIDRs" for name in ("odd-31", "odd-32", "one")]
    bed.supervisor.put(pod("near", "one"))
    assert (await one.add("near"))["ips"][0].startswith("10.77.1.")


async def test_a_cluster_moves_into_tunnels_and_out_of_them(bed: Bed) -> None:
    _, far_ips = await two_pods(bed)
    with ExitStack() as stack:
        talks = [await asyncio.to_thread(Talk, bed, "near", "far", ip) for ip in far_ips]
        for talk, routing in itertools.product(talks, ("vxlan", "auto")):
            stack.callback(talk.close)
            await restart(bed, routing)
            await until(lambda: hop(bed.nodes["one"], 8)["flags"] & HOP_MAC)
            await asyncio.to_thread(talk.goes_on)
            devices = await ip(bed.nodes["one"], "-br", "link")
            assert ("lg-vxlan" in devices) == (routing == "vxlan")


async def test_the_tunnel_may_be_of_ipv6(bed: Bed) -> None:
    six = [node_object(name, v6, "", number) for name, (_, v6, number) in NODES.items()]
    await bed.supervisor.wait(bed.supervisor.put(*six, verb="MODIFIED"), "one", "two")
    await restart(bed, "vxlan")
    _, far_ips = await two_pods(bed)
    assert hop(bed.nodes["one"], 8)["mtu"] == 1430
    assert "10.77.2.0/24 encap ip6" in await routes(bed.nodes["one"])
    for source, address in (("near", far_ips[0]), ("near", far_ips[1]), ("one", far_ips[1])):
        talk = await asyncio.to_thread(Talk, bed, source, "far", address)
        try:
            await asyncio.to_thread(talk.goes_on)
        finally:
            talk.close()


async def test_a_node_on_another_link_is_reached_through_a_tunnel(bed: Bed) -> None:
    beyond = node_object("beyond", "203.0.113.7", "2001:db8::7", 33)
    odd = node_object("odd", "2001:db8::8", "", 34)
    revision = bed.supervisor.put(beyond, odd)
    await bed.supervisor.wait(revision, "one", "two")
    one = bed.nodes["one"]
    found = await routes(one)
    assert "10.77.2.0/24 via 192.168.77.2" in found, "on the link: direct"
    assert "10.77.33.0/24 encap ip id 27751 src 192.168.77.1 dst 203.0.113.7" in found
    assert "10.77.34.0/24 encap ip6 id 27751 src fd77::1 dst 2001:db8::8" in found
    # One way is through IPv6, so the device has room for its headers.
    assert "mtu 1430" in await ip(one, "link", "show", "lg-vxlan")
    revision = bed.supervisor.put(beyond, odd, verb="DELETED")
    await bed.supervisor.wait(revision, "one", "two")
    assert "lg-vxlan" not in await ip(one, "-br", "link")


async def ip(node: Node, *arguments: str) -> str:
    return await run(node, "ip", *arguments)


async def run(node: Node, *command: str) -> str:
    process = await asyncio.create_subprocess_exec(
        *("nsenter", f"--net=/run/netns/{node.netns}", *command),
        stdout=asyncio.subprocess.PIPE,
    )
    out, _ = await process.communicate()
    assert process.returncode == 0
    return out.decode()


async def routes(node: Node) -> str:
    return " ".join((await ip(node, "route", "show")).split())
