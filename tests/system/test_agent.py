"""The agent as a process, on a node of its own with pods that are bare namespaces."""

from __future__ import annotations

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import IP, TCP

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import ArrayMap
from lockgate.bpf.pins import pin_names
from lockgate.net import namespaces
from lockgate.net.pods import remove
from lockgate.observer.journal import Journal
from lockgate.paths import bpf_object
from tests.system.agents import (
    Bed,
    Node,
    make_bed,
    pod,
    policy,
    until,
    with_ips,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with make_bed(tmp_path) as made:
        yield made


async def test_pods_are_wired_judged_and_kept_through_a_crash(bed: Bed) -> None:
    one, two = bed.nodes["one"], bed.nodes["two"]
    items = {
        "server": pod("server", "one", app="server"),
        "client": pod("client", "one", app="client"),
        "far": pod("far", "two", app="far"),
    }
    bed.supervisor.put(*items.values())
    server, client = await one.add("server"), await one.add("client")
    far = await two.add("far")
    assert await one.add("server") == server, "ADD is idempotent"
    assert server["ips"][0].startswith("10.77.1.") and server["ips"][1].startswith("fd77:1:")
    assert len({server["slot"], client["slot"]}) == 2
    bed.serve("server")
    answers = {"server": server, "client": client, "far": far}
    revision = bed.supervisor.put(
        *(with_ips(item, answers[uid]["ips"]) for uid, item in items.items()), verb="MODIFIED"
    )
    await bed.supervisor.wait(revision, "one", "two")

    async def reach(source: str, index: int = 0, patience: float = 5.0) -> str:
        address = server["ips"][index]
        return await asyncio.to_thread(bed.exchange, source, address, 8080, patience)

    for index in (0, 1):
        assert await reach("client", index) == "server", "local pod"
        assert await reach("one", index) == "server", "the node itself"
        assert await reach("far", index) == "server", "pod of another node"
        assert await reach("two", index) == "server", "another node"

    revision = bed.supervisor.put(
        policy("only-far", [{"from": [{"podSelector": {"matchLabels": {"app": "far"}}}]}])
    )
    await bed.supervisor.wait(revision, "one", "two")
    for index in (0, 1):
        assert await reach("client", index, 0.6) == "timeout"
        assert await reach("far", index) == "server"
        assert await reach("one", index) == "server"

    # Without an agent the kernel goes on; the next agent takes over without moving anything.
    before = (await one.call("GET", "/v1/status"))[1]
    await one.kill()
    assert await reach("client", 0, 0.6) == "timeout" and await reach("far") == "server"
    await one.start()
    await until(lambda: caught_up(one, revision))
    after = (await one.call("GET", "/v1/status"))[1]
    assert after["epoch"] == before["epoch"], "nothing differs, so nothing moves"
    assert after["endpoints"] == before["endpoints"]
    assert await reach("client", 0, 0.6) == "timeout" and await reach("far") == "server"
    assert await one.add("server") == server

    revision = bed.supervisor.put(policy("only-far", []), verb="DELETED")
    await bed.supervisor.wait(revision, "one")
    assert await reach("client") == "server"

    reader = Journal(one.state / "journal.jsonl")
    reader.refresh()
    assert reader.endpoints[server["endpoint"]].name == "server"

    # DEL, also with everything gone.
    assert (await one.call("DELETE", "/v1/endpoints/client"))[1] == {"deleted": True}
    namespaces.delete(f"lg-{bed.cluster}-server")
    assert (await one.call("DELETE", "/v1/endpoints/server"))[1] == {"deleted": True}
    assert (await one.call("DELETE", "/v1/endpoints/server"))[1] == {"deleted": False}
    status = (await one.call("GET", "/v1/status"))[1]
    assert status["endpoints"] == [] and not status["errors"]


async def caught_up(node: Node, revision: int) -> bool:
    status = (await node.call("GET", "/v1/status"))[1]
    return bool(status["applied"] >= revision)


async def test_services_hops_and_dry_runs(bed: Bed) -> None:
    one, two = bed.nodes["one"], bed.nodes["two"]
    server, far = pod("server", "one", app="server"), pod("far", "two", app="far")
    bed.supervisor.put(server, far)
    ips, far_ips = (await one.add("server"))["ips"], (await two.add("far"))["ips"]
    bed.serve("server")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7"],
            "selector": {"app": "server"},
            "ports": [{"port": 80, "targetPort": 8080, "protocol": "TCP"}],
        },
    }
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": ips[:1], "conditions": {"ready": True}}],
        "ports": [{"port": 8080, "name": "", "protocol": "TCP"}],
    }
    revision = bed.supervisor.put(
        with_ips(server, ips), with_ips(far, far_ips), service, slice_, verb="MODIFIED"
    )
    await bed.supervisor.wait(revision, "one", "two")
    assert await asyncio.to_thread(bed.exchange, "far", "10.96.0.7", 80) == "server"

    def hops(node: Node) -> list[Any]:
        pin = str(node.pins / pin_names(schema)["hops"])
        with ArrayMap.open(pin, schema.dtype("hop")) as table:
            return list(table[8]["view"])

    schema = Schema.from_object(bpf_object())
    await until(lambda: all(int(row["flags"]) == 1 and any(row["dmac"]) for row in hops(two)))

    bed.serve("outside")
    for address in ("198.18.2.1", "fd18:2::1", "198.18.1.1", "fd18:1::1"):
        answer = await asyncio.to_thread(bed.exchange, "far", address)
        assert answer == "outside", f"the world at {address}, near and behind the gateway"

    # A SYN from the far pod, asked and not sent.
    syn = bytes(IP(src=far_ips[0], dst=ips[0]) / TCP(sport=4000, dport=8080, flags="S"))
    status, answer = await one.call(
        "POST",
        "/v1/dryrun",
        {
            "packets": [
                {
                    "at": "from_net",
                    "packet": base64.b64encode(bytes(12) + b"\x08\x00" + syn).decode(),
                },
                {"at": "from_net", "packet": "AAAA"},
            ]
        },
    )
    assert status == 200
    assert answer["answers"][0]["verdict"] == 1 and answer["answers"][0]["targetKind"] == 1
    assert "error" in answer["answers"][1]


@pytest.mark.parametrize(
    ("uid", "netns", "status", "text"),
    [
        ("x", "/nowhere", 400, "no network namespace /nowhere"),
        ("far", "/proc/self/ns/net", 409, "spec.nodeName is 'two', not one"),
    ],
)
async def test_errors_of_one_pod_are_told_and_change_nothing(
    bed: Bed, uid: str, netns: str, status: int, text: str
) -> None:
    one = bed.nodes["one"]
    bed.supervisor.put(pod("far", "two"))
    found, answer = await one.call("POST", "/v1/endpoints", {"uid": uid, "netns": netns})
    assert found == status and text in answer["error"]
    assert (await one.call("GET", "/v1/status"))[1]["endpoints"] == []


async def test_a_pod_that_went_while_no_agent_ran_is_given_back(bed: Bed) -> None:
    one = bed.nodes["one"]
    bed.supervisor.put(pod("server", "one"))
    lease = await one.add("server")
    await one.kill()
    namespaces.delete(f"lg-{bed.cluster}-server")

    def sever() -> None:
        with namespaces.inside(namespaces.path_of(one.netns)):
            remove([lease["slot"]])

    await asyncio.to_thread(sever)
    await one.start()
    assert (await one.call("GET", "/v1/status"))[1]["endpoints"] == []
