"""Agents that are killed at any moment, and upgrades, under traffic: no connection is lost, no
verdict changes, nothing is left behind.

LOCKGATE_KILLS=N kills N times as often (CONTRIBUTING.md); LOCKGATE_SEED repeats the moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lockgate.bpf import links as bpf_links
from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import HashMap
from lockgate.bpf.pins import other_pins, pin_names
from lockgate.net import dumps, filters, namespaces, pods
from lockgate.net.links import IFINDEX_BASE
from lockgate.paths import bpf_object
from tests.system.agents import Bed, Node, make_bed, pod, policy, until, with_ips
from tests.system.load import BELL, Client, Server, Stream, Worker

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BOTH: tuple[filters.Direction, ...] = ("ingress", "egress")
KILLS = int(os.environ.get("LOCKGATE_KILLS", "1"))
SEED = os.environ.get("LOCKGATE_SEED", str(time.time_ns()))

# Pod: node, label. `server` is isolated: it lets in only `ok`, and may begin nothing, so that what
# it says passes as a reply or not at all. `fickle` comes and goes.
PODS = {
    "server": ("one", "server"),
    "near": ("one", "ok"),
    "far": ("two", "ok"),
    "foreign": ("one", "no"),
    "stranger": ("two", "no"),
    "fickle": ("two", "fickle"),
}
ONLY_OK: dict[str, Any] = {"from": [{"podSelector": {"matchLabels": {"app": "ok"}}}]}
FICKLE_TOO: dict[str, Any] = {"from": [{"podSelector": {"matchLabels": {"app": "fickle"}}}]}


class Traffic:
    """All pods of PODS, at work."""

    def __init__(self, bed: Bed, ips: dict[str, str]) -> None:
        self.bed, self.ips = bed, ips
        self.server = Server(self._netns("server"))
        to = ips["server"]
        self.workers: list[Worker] = [
            *(Stream(f"stream of {name}", self._netns(name), to) for name in ("near", "far")),
            *(Client(name, self._netns(name), to, True) for name in ("near", "far")),
            *(Client(name, self._netns(name), to, False) for name in ("foreign", "stranger")),
            Client("fickle", self._netns("fickle"), to, None),
        ]
        self.quiet = []
        for name in ("near", "far"):
            with namespaces.inside(self._netns(name)):
                self.quiet.append(socket.create_connection((to, BELL), 10))
        self.server.expect(len(self.quiet))
        for worker in self.workers:
            worker.start()

    async def rings(self) -> None:
        """The server, which may begin nothing, speaks first on connections that are silent."""
        self.server.ring()
        for sock in self.quiet:
            assert await asyncio.to_thread(sock.recv, 1) == b"!"

    def _netns(self, pod: str) -> Path:
        return namespaces.path_of(f"lg-{self.bed.cluster}-{pod}")

    @property
    def wrong(self) -> list[str]:
        found = [text for worker in self.workers for text in worker.wrong]
        for name in ("foreign", "stranger"):
            if self.server.seen[self.ips[name]]:
                found.append(f"{name} is denied and reached the server")
        return found

    async def end(self) -> None:
        for worker in self.workers:
            await asyncio.to_thread(worker.end)
        for worker in self.workers:
            print(worker.name, dict(worker.counts))
        await self.rings()
        assert self.wrong == []
        for worker in self.workers:
            assert sum(worker.counts.values()) > 0, f"{worker.name} did nothing"


def rules(*ingress: dict[str, Any]) -> dict[str, Any]:
    made = policy("only-ok", list(ingress))
    made["spec"]["policyTypes"].append("Egress")
    return made


@pytest.fixture
async def traffic(tmp_path: Path) -> AsyncIterator[Traffic]:
    async with make_bed(tmp_path, guardSeconds=0.3) as bed:
        items = {name: pod(name, node, app=label) for name, (node, label) in PODS.items()}
        bed.supervisor.put(*items.values(), rules(ONLY_OK))
        ips = {}
        for name, (node, _) in PODS.items():
            answer = await bed.nodes[node].add(name)
            items[name] = with_ips(items[name], answer["ips"])
            ips[name] = next(ip for ip in answer["ips"] if ":" not in ip)
        revision = bed.supervisor.put(*items.values(), verb="MODIFIED")
        await bed.supervisor.wait(revision, *bed.nodes)
        made = Traffic(bed, ips)
        try:
            yield made
        finally:
            for worker in made.workers:
                worker._over.set()
            for sock in made.quiet:
                sock.close()
            made.server.close()


class Changes:
    """Policies and pods that come and go, whether an agent runs or not."""

    def __init__(self, bed: Bed) -> None:
        self.bed = bed
        self.added = self.deleted = 0
        self._over = False

    async def policies(self) -> None:
        while not self._over:
            for ingress in ([ONLY_OK, FICKLE_TOO], [ONLY_OK]):
                self.bed.supervisor.put(rules(*ingress), verb="MODIFIED")
                await asyncio.sleep(0.15)

    async def pods(self, node: Node) -> None:
        """ADD and DEL as a kubelet does: again until it worked."""
        number = 0
        while not self._over:
            number += 1
            uid = f"guest-{node.name}-{number}"
            guest = pod(uid, node.name, app="guest")
            self.bed.supervisor.put(guest)
            path = namespaces.create(f"lg-{self.bed.cluster}-{uid}")
            body = {"uid": uid, "netns": str(path)}
            await self._insist(node, "POST", "/v1/endpoints", body)
            self.added += 1
            if number % 2:
                namespaces.delete(path.name)  # DEL works with everything gone
            self.bed.supervisor.put(guest, verb="DELETED")
            await self._insist(node, "DELETE", f"/v1/endpoints/{uid}")
            self.deleted += 1
            if not number % 2:
                namespaces.delete(path.name)

    async def _insist(self, node: Node, method: str, path: str, body: Any = None) -> None:
        async with asyncio.timeout(120):
            while True:
                with contextlib.suppress(OSError, TimeoutError, Exception):
                    async with asyncio.timeout(5):
                        status, _ = await node.call(method, path, body)
                    if status == 200:
                        return
                await asyncio.sleep(0.05)

    def end(self) -> None:
        self._over = True


async def restless(node: Node, kills: int, objects: list[Path], dice: random.Random) -> None:
    """Start an agent and kill it at a random moment, `kills` times; leave it dead."""
    began = time.monotonic()
    await node.kill()
    await node.start()
    usual = time.monotonic() - began
    for _ in range(kills):
        await node.kill()
        node.settings["object"] = str(dice.choice(objects))
        await node.launch()
        # Most within the start, some soon after it.
        await asyncio.sleep(dice.uniform(0, 1.2 * usual))
    await node.kill()


def census(node: Node, path: Path) -> dict[str, Any]:
    """All that an agent makes in the kernel: pins, links that lead nowhere, devices, routes."""
    names = pin_names(Schema.from_object(path))
    links = bpf_links.links_in(str(node.pins / "links"))
    with namespaces.inside(namespaces.path_of(node.netns)):
        devices = sorted(one.name for one in dumps.interfaces())
        routes = len(dumps.own_routes())
        on_pods = {
            filters.seat(IFINDEX_BASE + slot, direction)
            for slot in pods.seals()
            for direction in BOTH
        }
    return {
        "maps": sorted(one.name for one in node.pins.iterdir() if one.is_file()),
        "of other versions": other_pins(node.pins, names),
        "links": sorted(links),
        "severed": [n for n, i in links.items() if not i.ifindex and not i.cgroup_id],
        # One per hook, however many pods there are: none is left of an agent before.
        "programs": len({i.prog_id for i in links.values()}),
        "programs on pods": len(on_pods),
        "devices": devices,
        "routes": routes,
    }


async def settled(node: Node) -> None:
    """The agent runs, and uses its own maps only."""
    await node.start()
    names = pin_names(Schema.from_object(Path(node.settings.get("object") or bpf_object())))
    await until(lambda: not other_pins(node.pins, names))


async def check_end(traffic: Traffic, before: dict[str, Any]) -> None:
    """All is as before, and the last policy is in force."""
    bed = traffic.bed
    for node in bed.nodes.values():
        node.settings["object"] = str(bpf_object())
        await node.kill()
        await settled(node)
    revision = bed.supervisor.put(rules(ONLY_OK, FICKLE_TOO), verb="MODIFIED")
    await bed.supervisor.wait(revision, *bed.nodes)
    fickle = Client("fickle", traffic._netns("fickle"), traffic.ips["server"], True)
    assert await asyncio.to_thread(fickle.connects)
    await traffic.end()
    for name, node in bed.nodes.items():
        with contextlib.suppress(TimeoutError):
            await until(lambda: census(node, bpf_object()) == before[name])  # noqa: B023
        assert census(node, bpf_object()) == before[name]
        _, status = await node.call("GET", "/v1/status")
        assert not status["errors"], status["errors"]
        drops = status["drops"]
        assert "not-ready" not in drops, "programs ran on maps that were not complete"


@pytest.mark.parametrize(("versions", "kills"), [(1, 35), (2, 15)], ids=["one", "two"])
async def test_killed_agents_lose_nothing(
    traffic: Traffic, other_object: Path, versions: int, kills: int
) -> None:
    print("LOCKGATE_SEED", SEED)
    bed = traffic.bed
    before = {name: census(node, bpf_object()) for name, node in bed.nodes.items()}
    objects = [bpf_object(), other_object][:versions]
    changes = Changes(bed)
    tasks = [asyncio.create_task(changes.policies())]
    guests = [asyncio.create_task(changes.pods(node)) for node in bed.nodes.values()]
    try:
        async with asyncio.TaskGroup() as group:
            for node in bed.nodes.values():
                dice = random.Random(f"{SEED} {node.name}")
                group.create_task(restless(node, kills * KILLS, objects, dice))
        assert traffic.wrong == []
        for node in bed.nodes.values():
            await settled(node)
        changes.end()
        await asyncio.gather(*tasks, *guests)
        assert changes.added and changes.deleted
        print("pods added and deleted meanwhile:", changes.added)
    finally:
        for task in (*tasks, *guests):
            task.cancel()
    await check_end(traffic, before)


async def test_an_upgrade_and_a_downgrade_lose_nothing(
    traffic: Traffic, other_object: Path
) -> None:
    bed = traffic.bed
    before = {name: census(node, bpf_object()) for name, node in bed.nodes.items()}
    for path in (other_object, bpf_object()):
        schema = Schema.from_object(path)
        for node in bed.nodes.values():
            await node.kill()
            node.settings["object"] = str(path)
            await settled(node)
            with HashMap.open(
                str(node.pins / pin_names(schema)["connections"]),
                schema.dtype("ct_key"),
                schema.dtype("ct"),
            ) as table:
                keys, values = table.items()
            streams = values[(keys["proto"] == 6) & (values["state"] == 2)]
            assert len(streams), "the streams' connections were carried over"
            await traffic.rings()
            assert traffic.wrong == []
    await check_end(traffic, before)
