"""CNI ADD and DEL, beside the distribution's bridge plugin with host-local.

Both plugins are run as a runtime runs them (a process, the configuration on stdin), on the same
kind of fresh namespaces, in the same run and interleaved: alone, one after the other, and 50 at
once. The bridge plugin gives an address, a bridge port and a default route; Lockgate both
families, its programs, and the pod's policy in force. A time is from before the process is
started to its end.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import select
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.setups import CNI
from lockgate.net import namespaces
from lockgate.paths import cni_plugin
from tests.system.agents import Bed, make_bed, pod

AT_ONCE = 50
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
Row = dict[str, Any]


class Plugin:
    """One of the two, called from the namespace `space`; what its calls took (ms), by (command,
    how many at once)."""

    def __init__(
        self, name: str, program: Path, folder: Path, space: Path, config: Row, **more: str
    ) -> None:
        self.name, self._program, self._space, self._more = name, str(program), space, more
        self._folder = folder / f"{name}-calls"
        self._folder.mkdir()
        self._config = self._folder / "config"
        self._config.write_text(json.dumps(config))
        self.times: dict[tuple[str, int], list[float]] = {}

    def call(self, command: str, pods: dict[str, Path]) -> None:
        """For each of the pods, by its namespace, at once. Processes are started and waited for
        with nothing in between that would count as the plugin's time."""
        running: dict[int, tuple[int, str, float]] = {}
        poll = select.epoll()
        with poll, namespaces.inside(self._space):
            for pod, netns in pods.items():
                variables = self._variables(command, pod, netns)
                began = time.perf_counter()
                pid = os.posix_spawn(
                    self._program,
                    [self._program],
                    variables,
                    file_actions=[
                        (os.POSIX_SPAWN_OPEN, 0, str(self._config), os.O_RDONLY, 0),
                        (os.POSIX_SPAWN_OPEN, 1, str(self._folder / pod), _WRITE, 0o600),
                    ],
                )
                fd = os.pidfd_open(pid)
                poll.register(fd, select.EPOLLIN)
                running[fd] = pid, pod, began
            while running:
                for fd, _ in poll.poll():
                    ended = time.perf_counter()
                    poll.unregister(fd)
                    pid, pod, began = running.pop(fd)
                    os.close(fd)
                    self.times.setdefault((command, len(pods)), []).append((ended - began) * 1e3)
                    _, status = os.waitpid(pid, 0)
                    if status:
                        said = (self._folder / pod).read_text().strip()
                        raise RuntimeError(f"{self.name} {command}: {said}")

    def _variables(self, command: str, pod: str, netns: Path) -> dict[str, str]:
        return {
            "CNI_COMMAND": command,
            "CNI_CONTAINERID": pod,
            "CNI_NETNS": str(netns),
            "CNI_IFNAME": "eth0",
            "CNI_PATH": str(CNI),
            "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={pod};"
            f"K8S_POD_UID={pod}",
            "PATH": os.environ["PATH"],
            **self._more,
        }


async def rounds(bed: Bed, plugins: list[Plugin], alone: int, groups: int) -> None:
    number = 0
    for at_once, count in ((1, alone), (AT_ONCE, groups)):
        for _ in range(count):
            for plugin in plugins:
                names = [f"{plugin.name}-{number + n}" for n in range(at_once)]
                number += at_once
                items = [pod(name, "one", app=f"app-{n % 10}") for n, name in enumerate(names)]
                revision = bed.supervisor.put(*items)
                await bed.supervisor.wait(revision, "one")
                pods = {name: namespaces.create(f"lg-{bed.cluster}-{name}") for name in names}
                for command in ("ADD", "DEL"):
                    await asyncio.to_thread(plugin.call, command, pods)
                for space in pods.values():
                    namespaces.delete(space.name)
                await bed.supervisor.wait(bed.supervisor.put(*items, verb="DELETED"), "one")


async def measure(folder: Path, stack: ExitStack, alone: int, groups: int) -> list[Plugin]:
    """The bridge is in a node of its own, as the agent is."""
    async with make_bed(folder, "one") as bed:
        node = bed.nodes["one"]
        space = namespaces.create(f"lg-{bed.cluster}-bridge")
        bridge = Plugin(
            "bridge",
            CNI / "bridge",
            folder,
            space,
            {
                "cniVersion": "1.0.0",
                "name": f"bench-{os.getpid()}",
                "type": "bridge",
                "bridge": "cni0",
                "isGateway": True,
                "ipam": {
                    "type": "host-local",
                    "dataDir": str(folder / "host-local"),
                    "ranges": [[{"subnet": "10.78.0.0/16"}], [{"subnet": "fd78::/64"}]],
                    "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
                },
            },
        )
        config = {"cniVersion": "1.0.0", "name": "lockgate", "type": "lockgate-cni"}
        ours = Plugin(
            "lockgate",
            cni_plugin(),
            folder,
            space,
            config,
            LOCKGATE_CNI_SOCKET=str(node.state / "cni.sock"),
        )
        await rounds(bed, [bridge, ours], 3, 1)  # warm
        for plugin in (bridge, ours):
            plugin.times.clear()
        await rounds(bed, [bridge, ours], alone, groups)
        return [bridge, ours]


def rows(plugins: list[Plugin]) -> list[Row]:
    found = []
    for command in ("ADD", "DEL"):
        for at_once in (1, AT_ONCE):
            row: Row = {"command": command, "at once": at_once}
            for plugin in plugins:
                times = plugin.times[command, at_once]
                cuts = statistics.quantiles(times, n=100, method="inclusive")
                row[f"{plugin.name} p50"], row[f"{plugin.name} p99"] = cuts[49], cuts[98]
            row["p50 ×"] = row["lockgate p50"] / row["bridge p50"]
            row["p99 ×"] = row["lockgate p99"] / row["bridge p99"]
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.cni")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    if not (CNI / "bridge").exists():
        raise SystemExit("containernetworking-plugins is not installed: run `make bench`")
    alone, groups = (20, 2) if options.quick else (100, 10)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockgate-bench-")))
        # The bed tells of its agents at its end; standard output is for the figures.
        with contextlib.redirect_stdout(sys.stderr):
            plugins = asyncio.run(measure(folder, stack, alone, groups))
    print(
        json.dumps(
            {
                "name": "cni",
                "title": "CNI calls, ms, and Lockgate's share of the bridge plugin's (aim: 0.5)",
                "columns": list(rows(plugins)[0]),
                "rows": rows(plugins),
                "notes": [
                    "bridge: bridge plugin with host-local, both families, no policies",
                    "lockgate: both families; ADD ends when the pod's policy is in the kernel",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
