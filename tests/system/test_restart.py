"""Agents that are killed at any moment, and upgrades, under traffic: no connection is lost, no
verdict changes, nothing is left behind.

LOCKGATE_KILLS=N kills N times as often (CONTRIBUTING.md); LOCKGATE_SEED repeats the moments.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import time
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
from tests.system.agents import Bed, Node, pod, until
from tests.system.bystanders import FICKLE_TOO, ONLY_OK, Traffic, at_work, rules

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

BOTH: tuple[filters.Direction, ...] = ("ingress", "egress")
KILLS = int(os.environ.get("LOCKGATE_KILLS", "1"))
SEED = os.environ.get("LOCKGATE_SEED", str(time.time_ns()))


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
    """All that an agent makes: pins, links that lead nowhere, devices, routes; and what it gave
    away."""
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
        "leases": sorted(json.loads(Path(node.state, "ipam.json").read_text())["endpoints"]),
    }


async def settled(node: Node) -> None:
    """The agent runs, and uses its own maps only."""
    await node.start()
    names = pin_names(Schema.from_object(Path(node.settings.get("object") or bpf_object())))
    await until(lambda: not other_pins(node.pins, names))


async def check_end(traffic: Traffic, before: dict[str, Any]) -> None:
    """All is as before, the last policy is in force, and everything was told."""
    bed = traffic.bed
    for node in bed.nodes.values():
        node.settings["object"] = str(bpf_object())
        await node.kill()
        await settled(node)
    revision = bed.supervisor.put(rules(ONLY_OK, FICKLE_TOO), verb="MODIFIED")
    await bed.supervisor.wait(revision, *bed.nodes)
    await traffic.ask_as_fickle()
    await traffic.end()
    for name, node in bed.nodes.items():
        with contextlib.suppress(TimeoutError):
            await until(lambda: census(node, bpf_object()) == before[name])  # noqa: B023
        assert census(node, bpf_object()) == before[name]
        _, status = await node.call("GET", "/v1/status")
        assert not status["errors"], status["errors"]
        drops = status["drops"]
        assert "not-ready" not in drops, "programs ran on maps that were not complete"
    differing = await asyncio.to_thread(traffic.account)
    assert differing == [], f"{len(differing)} differ, the first: {differing[:9]}"


@pytest.mark.parametrize(
    ("versions", "routing", "kills"),
    [(1, "auto", 20), (1, "vxlan", 15), (2, "auto", 15)],
    ids=["one", "one, by VXLAN", "two"],
)
async def test_killed_agents_lose_nothing(
    tmp_path: Path, other_object: Path, versions: int, routing: str, kills: int
) -> None:
    objects = [bpf_object(), other_object][:versions]
    async with at_work(tmp_path, routing, mixed=versions > 1) as traffic:
        await endure(traffic, objects, kills * KILLS)


async def endure(traffic: Traffic, objects: list[Path], kills: int) -> None:
    print("LOCKGATE_SEED", SEED)
    bed = traffic.bed
    before = {name: census(node, bpf_object()) for name, node in bed.nodes.items()}
    changes = Changes(bed)
    tasks = [asyncio.create_task(changes.policies())]
    guests = [asyncio.create_task(changes.pods(node)) for node in bed.nodes.values()]
    try:
        async with asyncio.TaskGroup() as group:
            for node in bed.nodes.values():
                dice = random.Random(f"{SEED} {node.name}")
                group.create_task(restless(node, kills, objects, dice))
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


async def test_an_upgrade_and_a_downgrade_lose_nothing(tmp_path: Path, other_object: Path) -> None:
    async with at_work(tmp_path, mixed=True) as traffic:
        before = {n: census(node, bpf_object()) for n, node in traffic.bed.nodes.items()}
        for path in (other_object, bpf_object()):
            for node in traffic.bed.nodes.values():
                await node.kill()
                node.settings["object"] = str(path)
                await settled(node)
                assert streams(node, path), "their connections were carried over"
                await traffic.rings()
                assert traffic.wrong == []
        await check_end(traffic, before)


def streams(node: Node, path: Path) -> int:
    """TCP connections that the node knows as answered."""
    schema = Schema.from_object(path)
    with HashMap.open(
        str(node.pins / pin_names(schema)["connections"]),
        schema.dtype("ct_key"),
        schema.dtype("ct"),
    ) as table:
        keys, values = table.items()
    return int(((keys["proto"] == 6) & (values["state"] == 2)).sum())
