"""The capabilities of deploy/lockgate.yaml: with exactly those the agent and the observer do their
work, and without any one of them they do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lockgate.net import namespaces
from tests.cluster.containers import Containerd, container
from tests.system import test_agent
from tests.system.agents import frontend, with_ips
from tests.system.test_agent import Bed, Node, pod

DEADLINE = 60.0
bed = test_agent.bed
AGENT, OBSERVER = container("agent"), container("observer")


class Machine:
    """Node "one" of a test bed, its agent and observer in containers."""

    def __init__(self, daemon: Containerd, bed: Bed) -> None:
        self._daemon, self._bed = daemon, bed
        self.node: Node = bed.nodes["one"]
        self._running: list[tuple[str, asyncio.subprocess.Process]] = []

    async def run(self, role: str, without: str = "", instead: tuple[str, ...] = ()) -> None:
        """Start one of the two; `without` one capability, with others `instead`."""
        spec = AGENT if role == "agent" else OBSERVER
        folder = self.node.folder / f"{role}-config"
        folder.mkdir(exist_ok=True)
        shared = {"cluster": self.node.cluster, "node": self.node.name}
        config: dict[str, Any] = {**shared, "bpffs": "/host/sys/fs/bpf"}
        if role == "agent":
            config |= {
                "runDir": "/run/lockgate",
                "control": "/control/control.sock",
                "cgroup": str(self.node.cgroup),
                "outside": "outside",
            }
        (folder / f"{role}.json").write_text(json.dumps(config))
        empty = self.node.folder / "empty"
        empty.mkdir(exist_ok=True)
        command = self._daemon.run_command(
            f"{self.node.cluster}-{role}",
            spec,
            {
                "config": folder,
                "run": self.node.state,
                "state": self.node.state,
                "cni-bin": empty,
                "cni-conf": empty,
                "token": empty,
            },
            netns=namespaces.path_of(self.node.netns),
            extra=[(self.node.folder, "/control"), (Path("/run/netns"), "/run/netns")],
            without=without,
            instead=instead,
        )
        with open(self.node.folder / f"{role}.log", "wb") as log:
            process = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log)
        self._running.append((role, process))

    async def answers(self, role: str) -> bool:
        """Wait until it does its work (True) or has ended (False)."""
        async with asyncio.timeout(DEADLINE):
            while (found := await self.status(role)) and not found.get("ready", True):
                await asyncio.sleep(0.05)
        return bool(found)

    async def status(self, role: str) -> dict[str, Any]:
        """Its first answer on its socket; {} if it ends without one."""
        process = next(process for name, process in self._running if name == role)
        path = self.node.state / f"{role}.sock"
        async with asyncio.timeout(DEADLINE):
            while process.returncode is None:
                try:
                    connector = aiohttp.UnixConnector(str(path))
                    async with aiohttp.ClientSession(connector=connector) as session:
                        async with session.get("http://node/v1/status") as response:
                            return dict(await response.json())
                except (OSError, aiohttp.ClientError):
                    await asyncio.sleep(0.05)
        return {}

    def log(self, role: str) -> str:
        return (self.node.folder / f"{role}.log").read_text()

    async def add(self, uid: str) -> tuple[int, Any]:
        """Wire a pod, as the CNI plugin asks for it."""
        self._bed.supervisor.put(pod(uid, self.node.name))
        path = namespaces.path_of(f"lg-{self.node.cluster}-{uid}")
        return await self.node.call("POST", "/v1/endpoints", {"uid": uid, "netns": str(path)})

    async def balances(self) -> bool:
        """Attach XDP for a frontend whose backend is on the other node."""
        far = with_ips(pod("far", "two"), ["10.77.2.9"])
        self._bed.supervisor.put(far, *frontend("web", "203.0.113.80", "10.77.2.9"))
        async with asyncio.timeout(DEADLINE):
            while found := await self.status("agent"):
                if any(one["mode"] != "none" for one in found["xdp"]):
                    return True
                await asyncio.sleep(0.05)
        return False

    async def close(self) -> None:
        for role, process in reversed(self._running):
            name = f"{self.node.cluster}-{role}"
            self._daemon.ctr("task", "kill", "--signal", "SIGKILL", name, check=False)
            await process.wait()
            self._daemon.ctr("container", "rm", name, check=False)


@pytest.fixture
async def machine(daemon: Containerd, bed: Bed) -> AsyncIterator[Machine]:
    machine = Machine(daemon, bed)
    await machine.node.kill()
    namespaces.create(f"lg-{machine.node.cluster}-pod")
    try:
        yield machine
    finally:
        await machine.close()


async def test_with_the_capabilities_of_the_manifest_all_works(machine: Machine) -> None:
    await machine.run("agent")
    assert await machine.answers("agent"), machine.log("agent")
    status, answer = await machine.add("pod")
    assert status == 200, answer
    assert await machine.balances(), machine.log("agent")
    await machine.run("observer")
    assert await machine.answers("observer"), machine.log("observer")


async def test_without_net_admin_the_agent_says_what_is_missing(machine: Machine) -> None:
    await machine.run("agent", without="NET_ADMIN")
    assert not await machine.answers("agent")
    assert "permission to use BPF" in machine.log("agent")


async def test_without_sys_admin_the_agent_says_what_is_missing(machine: Machine) -> None:
    await machine.run("agent", without="SYS_ADMIN")
    assert not await machine.answers("agent")
    assert "permission to use BPF" in machine.log("agent")


async def test_bpf_and_perfmon_do_not_stand_in_for_sys_admin(machine: Machine) -> None:
    await machine.run("agent", without="SYS_ADMIN", instead=("BPF", "PERFMON"))
    assert not await machine.answers("agent")
    assert "or with CAP_SYS_ADMIN and CAP_NET_ADMIN" in machine.log("agent")


async def test_without_bpf_the_observer_may_not_open_the_rings(machine: Machine) -> None:
    await machine.run("agent")
    assert await machine.answers("agent"), machine.log("agent")
    await machine.run("observer", without="BPF")
    found = await machine.status("observer")
    assert not found["ready"]
    assert "Operation not permitted" in found["error"]
