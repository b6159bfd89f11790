"""The plugin under the real libcni, by cnitool, as container runtimes have it: configuration list,
cached results, version negotiation."""

from __future__ import annotations

import asyncio
import json
import subprocess
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cluster.binaries import Binaries
from lockgate.agent.install import CONFLIST, configuration
from lockgate.net import dumps, namespaces
from lockgate.paths import cni_plugin
from tests.system.agents import Bed, make_bed, pod

#: cnitool keeps its cache where libcni has it, whoever else does: our network has its own name.
VERSIONS = ("0.4.0", "1.0.0", "1.1.0")


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with make_bed(tmp_path, "one") as made:
        yield made
    # What libcni keeps of pods that had no DEL; the folder is cnitool's choice.
    for left in Path("/var/lib/cni/results").glob(f"lockgate-{made.cluster}-*"):
        left.unlink()


class CniTool:
    """cnitool with the installed configuration, of one version or as it is."""

    def __init__(self, bed: Bed, folder: Path, version: str = "") -> None:
        self._bed, self._program = bed, Binaries.get().path("cnitool")
        self.network = f"lockgate-{bed.cluster}"
        config = {**configuration([]), "name": self.network}
        if version:
            config |= {"cniVersion": version, "cniVersions": [version]}
        (folder / CONFLIST).write_text(json.dumps(config))
        self._folder = folder

    def netns(self, name: str) -> Path:
        return namespaces.path_of(f"lg-{self._bed.cluster}-{name}")

    async def __call__(self, command: str, name: str) -> tuple[int, str]:
        """(exit code, what it printed, errors too)."""
        process = await asyncio.create_subprocess_exec(
            str(self._program),
            command,
            self.network,
            str(self.netns(name)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env={
                "NETCONFPATH": str(self._folder),
                "CNI_PATH": str(cni_plugin().parent),
                "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name};"
                f"K8S_POD_UID={name}",
                "LOCKGATE_CNI_SOCKET": str(self._bed.nodes["one"].state / "cni.sock"),
            },
        )
        out, _ = await process.communicate()
        assert process.returncode is not None
        return process.returncode, out.decode()

    async def add(self, name: str) -> Any:
        self._bed.supervisor.put(pod(name, "one"))
        namespaces.create(self.netns(name).name)
        status, out = await self("add", name)
        assert status == 0, out
        return json.loads(out)


def interfaces(netns: Path) -> list[str]:
    with namespaces.inside(netns):
        return [one.name for one in dumps.interfaces()]


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_pods_life(bed: Bed, tmp_path: Path, version: str) -> None:
    tool = CniTool(bed, tmp_path, version)
    answer = await tool.add("a")
    assert answer["cniVersion"] == version
    assert len(answer["ips"]) == 2 and "eth0" in interfaces(tool.netns("a"))
    assert await tool("check", "a") == (0, "")
    assert await tool("del", "a") == (0, "")
    assert (await bed.nodes["one"].call("GET", "/v1/status"))[1]["endpoints"] == []
    assert await tool("del", "a") == (0, ""), "DEL is idempotent"


async def test_the_newest_version_that_both_know_is_spoken(bed: Bed, tmp_path: Path) -> None:
    assert (await CniTool(bed, tmp_path).add("a"))["cniVersion"] == VERSIONS[-1]


async def test_check_fails_when_the_wiring_is_damaged(bed: Bed, tmp_path: Path) -> None:
    tool = CniTool(bed, tmp_path)
    await tool.add("a")
    command = f"nsenter --net={tool.netns('a')} ip -6 route del default"
    subprocess.run(command.split(), check=True)
    status, out = await tool("check", "a")
    assert status != 0 and "no default route" in out


async def test_gc_takes_the_attachments_that_the_runtime_does_not_name(
    bed: Bed, tmp_path: Path
) -> None:
    tool = CniTool(bed, tmp_path)
    for name in ("a", "b"):
        await tool.add(name)
    assert await tool("gc", "a") == (0, ""), "nothing is valid: all go"
    assert (await bed.nodes["one"].call("GET", "/v1/status"))[1]["endpoints"] == []


async def test_status_tells_whether_an_add_could_be_served(bed: Bed, tmp_path: Path) -> None:
    tool = CniTool(bed, tmp_path)
    assert await tool("status", "a") == (0, "")
    await bed.nodes["one"].kill()
    status, out = await tool("status", "a")
    assert status != 0 and "the Lockgate agent does not answer" in out
