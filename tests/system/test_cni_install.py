"""The CNI plugin and its configuration on a node, and leaving the node as it was."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from lockgate.agent import install
from lockgate.bpf.links import CGROUP_HOOKS, Direction, tcx_programs
from lockgate.bpf.syscall import prog_query
from lockgate.net import dumps, namespaces
from tests.system.agents import ROOT, Bed, Node, make_bed, pod, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


BOTH: tuple[Direction, ...] = ("ingress", "egress")


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    async with make_bed(tmp_path, "one") as made:
        yield made


def test_files_appear_whole_and_go_again(tmp_path: Path) -> None:
    plugin = tmp_path / "plugin"
    plugin.write_bytes(b"\x7fELF")
    folders = tmp_path / "bin", tmp_path / "net.d"
    chain = [{"type": "portmap", "capabilities": {"portMappings": True}}]
    install.install(plugin, *folders, chain)
    put, conf = folders[0] / install.PLUGIN, folders[1] / install.CONFLIST
    assert put.read_bytes() == b"\x7fELF" and put.stat().st_mode & 0o777 == 0o755
    written = json.loads(conf.read_text())
    assert [one["type"] for one in written["plugins"]] == ["lockgate-cni", "portmap"]
    assert written["cniVersion"] == "1.0.0" and "1.1.0" in written["cniVersions"]
    before = put.stat().st_ino, conf.stat().st_ino
    install.install(plugin, *folders, chain)
    assert (put.stat().st_ino, conf.stat().st_ino) == before, "what is right is left alone"
    plugin.write_bytes(b"\x7fELF2")
    install.install(plugin, *folders, chain)
    assert put.stat().st_ino != before[0], "another file, by rename"
    assert install.remove(*folders) == [str(conf), str(put)]
    assert install.remove(*folders) == []
    assert [list(folder.iterdir()) for folder in folders] == [[], []]


def test_those_that_come_first_are_named(tmp_path: Path) -> None:
    for name in ("00-multus.conf", "04-x.conflist", "10-calico.conflist", "01-notes.txt"):
        (tmp_path / name).touch()
    assert install.rivals(tmp_path) == ["00-multus.conf", "04-x.conflist"]
    assert install.rivals(tmp_path / "none") == []


def snapshot(node: Node) -> dict[str, object]:
    """What the node is made of, as far as Lockgate touches it. Without what the kernel gives the
    cables by itself, in its own time."""

    def ip(*arguments: str) -> str:
        command = ["ip", "-n", node.netns, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    settings = subprocess.run(
        ["nsenter", f"--net=/run/netns/{node.netns}", "sysctl", "-a", "-r", "^net.ipv[46].conf"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return {
        "addresses": [
            (one["ifname"], [a["local"] for a in one["addr_info"] if a["local"][:4] != "fe80"])
            for one in json.loads(ip("-j", "address"))
        ],
        "routes": sorted(
            line
            for line in (ip("route") + ip("-6", "route")).splitlines()
            if "proto kernel" not in line
        ),
        "sysctls": sorted(settings.splitlines()),
        "links": sorted(one["ifname"] for one in json.loads(ip("-j", "link"))),
        "rules": ip("rule") + ip("-6", "rule"),
        "neighbours": sorted(
            one["dst"] for one in json.loads(ip("-j", "neigh", "show", "nud", "permanent"))
        ),
        "programs": programs(node),
        "pins": node.pins.exists(),
        "state": sorted(path.name for path in node.state.glob("*") if path.name != "agent.log"),
    }


def programs(node: Node) -> dict[str, list[int]]:
    """On the cards and on the cgroup."""
    found = {}
    with namespaces.inside(namespaces.path_of(node.netns)):
        for one in dumps.interfaces():
            for direction in BOTH:
                found[f"{one.name} {direction}"] = tcx_programs(one.index, direction)
    cgroup = os.open(node.cgroup, os.O_RDONLY)
    for section, hook in CGROUP_HOOKS.items():
        found[section] = prog_query(cgroup, hook)
    os.close(cgroup)
    return found


def uninstall(node: Node, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lockgate.cli.main", "uninstall", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )


async def test_a_node_is_installed_last_and_left_as_it_was(tmp_path: Path) -> None:
    async with make_bed(tmp_path, "two") as bed:
        node = bed.nodes["one"]
        bin_dir, conf_dir = tmp_path / "host" / "bin", tmp_path / "host" / "net.d"
        conf_dir.mkdir(parents=True)
        (conf_dir / "10-other.conflist").write_text("{}")
        (conf_dir / "00-early.conf").write_text("{}")
        node.settings = {
            "cniBin": str(bin_dir),
            "cniConf": str(conf_dir),
            "runDir": str(tmp_path / "run"),
        }
        node.cgroup.mkdir(parents=True)
        before = snapshot(node)
        # Not before an ADD could be served: there is no podCIDR yet.
        bed.supervisor.put({**bed.supervisor.objects["Node", "", "one"], "spec": {}})
        real = {"podCIDRs": ["10.77.1.0/24", "fd77:1::/64"]}
        await node.start()
        await bed.supervisor.wait(bed.supervisor.revision, "one")
        assert not (conf_dir / install.CONFLIST).exists()
        bed.supervisor.put({**bed.supervisor.objects["Node", "", "one"], "spec": real})
        await until(lambda: (conf_dir / install.CONFLIST).exists())
        assert (bin_dir / install.PLUGIN).exists()
        status = (await node.call("GET", "/v1/status"))[1]
        assert any("00-early.conf comes before" in text for text in status["errors"])
        bed.supervisor.put(pod("a", "one"))
        await node.add("a")

        config = str(tmp_path / "kept.json")
        (node.state / "config.json").rename(config)
        refused = await asyncio.to_thread(uninstall, node, "--config", config)
        assert refused.returncode == 3 and "still runs" in refused.stderr
        await node.kill()
        refused = await asyncio.to_thread(uninstall, node, "--config", config)
        assert refused.returncode == 3 and "1 pods of node one" in refused.stderr
        assert (conf_dir / install.CONFLIST).exists()
        (node.state / "agent.log").rename(tmp_path / "agent.log")
        done = await asyncio.to_thread(uninstall, node, "--config", config, "--force")
        assert done.returncode == 0, done.stderr
        for what in (install.CONFLIST, install.PLUGIN, "programs", "1 links of pods", "routes"):
            assert what in done.stdout
        node.state.mkdir(exist_ok=True)
        (tmp_path / "agent.log").rename(node.state / "agent.log")
        assert snapshot(node) == before
        assert sorted(path.name for path in conf_dir.iterdir()) == [
            "00-early.conf",
            "10-other.conflist",
        ]
        again = await asyncio.to_thread(uninstall, node, "--config", config)
        assert again.returncode == 0 and "There is no trace of Lockgate" in again.stdout


async def test_uninstalling_leaves_what_is_not_ours(tmp_path: Path) -> None:
    async with make_bed(tmp_path, "two") as bed:
        node = bed.nodes["one"]
        ip = ("ip", "-n", node.netns)
        for command in (
            "address add 169.254.1.1/32 dev lo",
            "route add 10.250.0.0/16 dev underlay",
            "link add lg7 type bridge",
        ):
            subprocess.run([*ip, *command.split()], check=True)
        node.settings = {"runDir": str(tmp_path / "run")}
        node.cgroup.mkdir(parents=True)
        before = snapshot(node)
        await node.start()
        await bed.supervisor.wait(bed.supervisor.revision, "one")
        (tmp_path / "run" / "notes").write_text("somebody's")
        (tmp_path / "run" / "folder").mkdir()
        await node.kill()
        config = tmp_path / "config.json"
        settings = json.loads((node.state / "config.json").read_bytes())
        for field, folder in (
            ("stateDir", "/"),
            ("stateDir", "/var/lib"),
            ("runDir", "/run/../tmp"),
        ):
            config.write_text(json.dumps({**settings, field: folder}))
            told = await asyncio.to_thread(uninstall, node, "--config", str(config))
            assert told.returncode == 3, told
            assert f"field {field}: {folder} is no folder of Lockgate's own" in told.stderr
        assert node.pins.exists(), "nothing was removed"
        config.write_text(json.dumps(settings))
        done = await asyncio.to_thread(uninstall, node, "--config", str(config))
        assert done.returncode == 0, done.stderr
        assert f"left, for it is not ours: {tmp_path / 'run'}: folder, notes" in done.stdout
        assert sorted(one.name for one in (tmp_path / "run").iterdir()) == ["folder", "notes"]
        after = snapshot(node)
        assert after.pop("state") == ["config.json"] and before.pop("state") == []
        assert after == before


async def test_a_restart_of_the_agent_leaves_the_configuration_in_place(bed: Bed) -> None:
    node, conf_dir = bed.nodes["one"], bed.nodes["one"].folder / "net.d"
    await node.kill()
    node.settings = {"cniConf": str(conf_dir)}
    await node.start()
    await until(lambda: (conf_dir / install.CONFLIST).exists())
    inode = (conf_dir / install.CONFLIST).stat().st_ino
    await node.kill(15)
    assert (conf_dir / install.CONFLIST).stat().st_ino == inode
    assert namespaces.path_of(node.netns).exists()
