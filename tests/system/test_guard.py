"""Programs on pods' links that others remove, or come before: verdicts hold, and it is said."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from lockgate.bpf import links as bpf_links
from lockgate.bpf import syscall
from lockgate.net import dumps, filters, namespaces
from lockgate.net.dumps import FILTER_PARENTS, Direction, Filter
from lockgate.net.links import IFINDEX_BASE, sysctl
from lockgate.net.netlink import Batch, attribute, text
from tests.system.agents import Bed, Node, make_bed, pod, policy, until, with_ips

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SCHED_CLS = 3
PASS = bytes.fromhex("b700000000000000 9500000000000000")  # r0 = TCX_PASS; exit
NEXT = bytes.fromhex("b7000000ffffffff 9500000000000000")  # r0 = TCX_NEXT; exit
BOTH: tuple[Direction, ...] = ("ingress", "egress")
HOOKS = {"ingress": syscall.AttachType.TCX_INGRESS, "egress": syscall.AttachType.TCX_EGRESS}


class Shop:
    """A server that lets in only `far`, a client on its node, and that node, which forwards: what
    no program of ours sees gets through."""

    def __init__(self, bed: Bed, slots: dict[str, int], address: str) -> None:
        self.bed, self.address = bed, address
        self.node: Node = bed.nodes["one"]
        self.slots = slots
        self._foreign: list[int] = []

    async def reach(self, source: str, patience: float = 0.6) -> str:
        return await asyncio.to_thread(self.bed.exchange, source, self.address, 8080, patience)

    async def verdicts_hold(self) -> bool:
        return await self.reach("client") == "timeout" and await self.reach("far", 5) == "server"

    def index(self, name: str) -> int:
        return IFINDEX_BASE + self.slots[name]

    def here(self) -> Any:
        return namespaces.inside(namespaces.path_of(self.node.netns))

    def get_round(self, instructions: bytes = PASS, *, first: bool = False) -> list[int]:
        """Programs of somebody else on the client's way to the server, in tcx; their ids."""
        with self.here():
            found = []
            for name, direction in (("client", "ingress"), ("server", "egress")):
                program = syscall.prog_load(SCHED_CLS, instructions, "foreign")
                link = syscall.link_create(program, self.index(name), HOOKS[direction], first=first)
                self._foreign += [program, link]
                found.append(syscall.prog_info(program).id)
            return found

    def leave(self) -> None:
        """Somebody else's links end."""
        for fd in self._foreign:
            os.close(fd)
        self._foreign.clear()

    def filter(self, name: str, direction: Direction, priority: int, handle: int) -> Filter:
        """Somebody else's filter, which lets all pass."""
        program = syscall.prog_load(SCHED_CLS, PASS, "foreign")
        options = attribute(6, program) + attribute(7, text("foreign")) + attribute(8, 1)
        info = priority << 16 | socket.htons(3)
        payload = struct.pack(
            "=BxxxiIII", 0, self.index(name), handle, FILTER_PARENTS[direction], info
        )
        with self.here(), Batch() as batch:
            payload += attribute(1, text("bpf")) + attribute(2, options)
            batch.add("add a filter of somebody else", 44, payload, 0x400 | 0x200)
            batch.send()
        number = syscall.prog_info(program).id
        os.close(program)
        return Filter(priority, handle, number)

    def tcx(self, name: str, direction: Direction) -> list[int]:
        with self.here():
            return bpf_links.tcx_programs(self.index(name), direction)

    def filters(self, name: str, direction: Direction) -> list[Filter]:
        with self.here():
            return dumps.filters(self.index(name), direction)

    def seated(self) -> bool:
        """Are our programs where they usually are: first filters, and no links?"""
        with self.here():
            return (
                all(
                    filters.seat(self.index(name), direction)[1]
                    and not bpf_links.tcx_programs(self.index(name), direction)
                    for name in self.slots
                    for direction in BOTH
                )
                and not self.pins()
            )

    def pins(self) -> list[str]:
        found = bpf_links.links_in(str(self.node.pins / "links"))
        return [name for name in found if name.startswith(("from_pod", "to_pod"))]

    async def status(self) -> Any:
        return (await self.node.call("GET", "/v1/status"))[1]

    async def findings(self) -> list[Any]:
        found = (await self.node.call("GET", "/v1/doctor"))[1]["findings"]
        return [one for one in found if one["check"] == "programs"]

    def log(self) -> str:
        return (self.node.state / "agent.log").read_text()

    def tc(self, *commands: str) -> None:
        """On the links of both pods."""
        lines = [one.format(f"lg{slot}") for slot in self.slots.values() for one in commands]
        subprocess.run(
            ["nsenter", f"--net=/run/netns/{self.node.netns}", "tc", "-batch", "-"],
            input="\n".join(lines),
            text=True,
            check=True,
        )


@pytest.fixture
async def shop(tmp_path: Path) -> AsyncIterator[Shop]:
    async with make_bed(tmp_path, guardSeconds=0.3) as bed:
        items = {
            "server": pod("server", "one", app="server"),
            "client": pod("client", "one", app="client"),
            "far": pod("far", "two", app="far"),
        }
        bed.supervisor.put(*items.values())
        answers = {
            name: await bed.nodes[n].add(name)
            for name, n in (("server", "one"), ("client", "one"), ("far", "two"))
        }
        bed.serve("server")
        bed.supervisor.put(
            policy("far", [{"from": [{"podSelector": {"matchLabels": {"app": "far"}}}]}])
        )
        revision = bed.supervisor.put(
            *(with_ips(item, answers[uid]["ips"]) for uid, item in items.items()), verb="MODIFIED"
        )
        await bed.supervisor.wait(revision, "one", "two")
        slots = {name: answers[name]["slot"] for name in ("server", "client")}
        made = Shop(bed, slots, answers["server"]["ips"][0])
        with made.here():
            sysctl("ipv4/ip_forward", 1)
        try:
            assert await made.verdicts_hold()
            assert made.seated()
            yield made
        finally:
            made.leave()


async def test_programs_of_others_that_come_first_do_not_get_round_verdicts(shop: Shop) -> None:
    client, server = shop.get_round()
    await until(
        lambda: len(shop.tcx("client", "ingress")) == len(shop.tcx("server", "egress")) == 2
    )
    assert await shop.verdicts_hold()
    assert shop.tcx("client", "ingress")[1] == client, "theirs stays, behind ours"
    assert shop.tcx("server", "egress")[1] == server
    assert not shop.filters("client", "ingress"), "nothing is judged twice"
    told = await shop.findings()
    assert {one["severity"] for one in told} == {"warning"} and len(told) == 2
    assert (
        f"foreign (id {client}, tcx ingress), Pod shop/client" in told[0]["text"] + told[1]["text"]
    )
    assert "put program from_pod in front of others" in shop.log()
    assert (await shop.status())["counts"]["repaired"] >= 1
    assert not (await shop.status())["errors"]

    # They come before ours a second time.
    last = shop.get_round(first=True)
    await until(lambda: [shop.tcx(*at)[1] for at in _WAYS] == last)
    assert await shop.verdicts_hold()

    # The next agent goes on with the links in place.
    await shop.node.kill()
    assert await shop.verdicts_hold()
    before = [shop.tcx(*at)[0] for at in _WAYS]
    await shop.node.start()
    await until(lambda: not set(before) & {shop.tcx(*at)[0] for at in _WAYS})
    assert await shop.verdicts_hold()
    shop.leave()
    await until(shop.seated)
    assert await shop.verdicts_hold()
    assert [one["severity"] for one in await shop.findings()] == ["ok"]


_WAYS: tuple[tuple[str, Direction], ...] = (("client", "ingress"), ("server", "egress"))


async def test_an_agent_that_starts_finds_others_that_came_first(shop: Shop) -> None:
    await shop.node.kill()
    shop.get_round()
    assert await shop.reach("client") == "server", "without an agent nobody looks"
    await shop.node.start()
    assert await shop.verdicts_hold()
    # The pod goes while its program is a link.
    await shop.node.call("DELETE", "/v1/endpoints/client")
    await until(lambda: shop.pins() == [f"to_pod-{shop.slots['server']}"])


@pytest.mark.parametrize(
    "commands",
    [
        ("filter del dev {} ingress",),
        ("filter del dev {} egress",),
        ("qdisc del dev {} clsact",),
        ("qdisc del dev {} clsact", "qdisc add dev {} ingress"),
    ],
    ids=["ingress", "egress", "both", "and no room left"],
)
async def test_programs_that_were_taken_away_are_put_back(
    shop: Shop, commands: tuple[str, ...]
) -> None:
    shop.tc(*commands)
    await until(lambda: _repaired(shop, 1))
    assert await shop.verdicts_hold()
    assert "Pod shop/client, link lg" in shop.log()
    if len(commands) > 1:
        await until(lambda: len(shop.pins()) == 4)
        shop.tc("qdisc del dev {} ingress")
    await until(shop.seated)
    assert await shop.verdicts_hold()


async def _repaired(shop: Shop, count: int) -> bool:
    return bool((await shop.status())["counts"]["repaired"] >= count)


async def test_filters_of_others_stay_behind_ours(shop: Shop) -> None:
    later = shop.filter("client", "ingress", 5, 1)
    assert shop.filters("client", "ingress")[1] == later
    # In the same priority the one that came last is first.
    same = [shop.filter(*at, 1, 1) for at in _WAYS]
    assert [shop.filters(*at)[0] for at in _WAYS] == same
    await until(shop.seated)
    assert await shop.verdicts_hold()
    await shop.node.kill()
    await shop.node.start()
    assert shop.seated() and await shop.verdicts_hold()
    assert shop.filters("client", "ingress")[1:] == [same[0], later]
    assert shop.filters("server", "egress")[1:] == [same[1]]


async def test_links_of_an_earlier_version_become_filters(shop: Shop) -> None:
    """Which attached all programs as tcx links."""
    await shop.node.kill()
    with shop.here():
        for slot in shop.slots.values():
            for direction, name in (("egress", "to_pod"), ("ingress", "from_pod")):
                number, _ = filters.seat(IFINDEX_BASE + slot, direction)
                fd = syscall.prog_fd_by_id(number)
                pin = str(shop.node.pins / "links" / f"{name}-{slot}")
                bpf_links.attach_tcx(fd, IFINDEX_BASE + slot, direction, pin).close()
                os.close(fd)
    shop.tc("qdisc del dev {} clsact")
    assert await shop.verdicts_hold() and len(shop.pins()) == 4
    await shop.node.start()
    assert shop.seated()
    assert await shop.verdicts_hold()
    assert not (await shop.status())["counts"]["repaired"]
