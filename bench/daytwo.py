"""Day two: what an agent costs a node with 110 pods, and the API server, when nothing happens and
when pods come and go.

The real agent with real pods: network namespaces that the CNI plugin wired. The API server is one
that speaks its list and watch, with objects of the size that real ones have; the cluster has ten
such nodes. CPU is that of all the agent's threads, by the scheduler's clock.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp

from bench.bigapi import memory, pod, policy, slice_of
from lockgate.bpf import links as bpf_links
from lockgate.net import namespaces
from lockgate.paths import cni_plugin
from tests.apiserver import ApiServer

CLUSTER = "daytwo"
NODE = "node-0"
ROOT = Path(__file__).resolve().parents[1]
NODES, PODS, APPS = 10, 110, 100
PATIENCE = 60.0
#: Who asks, how often (s): the kubelet, as deploy/ tells it, and Prometheus.
ASKED = {"/readyz": 2.0, "/healthz": 10.0, "/metrics": 15.0}


class Cluster:
    """The objects. `here` are the pods of the node: name → address."""

    def __init__(self) -> None:
        self.server = ApiServer()
        self.here: dict[str, str] = {}
        self._serial = 0
        put = self.server.put
        for n in range(100):
            labels = {"team": f"t-{n % 10}"}
            put({"kind": "Namespace", "metadata": {"name": f"ns-{n}", "labels": labels}})
        for n in range(NODES):
            ip = {"type": "InternalIP", "address": f"172.16.0.{n + 1}"}
            put(
                {
                    "kind": "Node",
                    "metadata": {"name": f"node-{n}"},
                    "spec": {"podCIDRs": [f"10.0.{n}.0/24"]},
                    "status": {"addresses": [ip]},
                }
            )
        for n in range(1, NODES):
            for place in range(PODS):
                self._serial += 1
                name, ip = str(self._serial), f"10.0.{n}.{place + 2}"
                put(pod(name, self._serial % APPS, n, ip))
        for n in range(APPS):
            put(
                {
                    "kind": "Service",
                    "metadata": {"name": f"svc-{n}", "namespace": f"ns-{n}"},
                    "spec": {
                        "clusterIP": f"10.100.0.{n + 1}",
                        "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
                    },
                }
            )
            self._slice(n)
            put(policy(n))

    def _slice(self, app: int) -> None:
        ips = [ip for name, ip in self.here.items() if ip and int(name) % APPS == app]
        ips += [f"10.0.{n}.{app + 2}" for n in range(1, NODES)]
        self.server.put(slice_of(app, app, ips))

    @staticmethod
    def namespace(name: str) -> str:
        return f"ns-{int(name) % APPS}"

    @staticmethod
    def uid(name: str) -> str:
        return f"0e3a7b52-0000-4000-8000-{name:>012}"

    def begin(self) -> str:
        """A pod is bound to the node."""
        self._serial += 1
        name = str(self._serial)
        self.here[name] = ""
        self.server.put(pod(name, int(name) % APPS, 0, ""))
        return name

    def run(self, name: str, ip: str) -> None:
        """It has its address and serves."""
        self.here[name] = ip
        self.server.put(pod(name, int(name) % APPS, 0, ip))
        self._slice(int(name) % APPS)

    def end(self) -> str:
        """The oldest pod of the node goes."""
        name = next(iter(self.here))
        del self.here[name]
        self._slice(int(name) % APPS)
        self.server.delete("Pod", self.namespace(name), name)
        return name


class Agent:
    """The process, its plugin, and the pods' namespaces."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder = cluster, folder
        self.netns = f"lg-{CLUSTER}-{NODE}"
        self.pins = Path("/sys/fs/bpf/lockgate", CLUSTER, NODE)
        self.pid = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[Agent]:
        path = namespaces.create(self.netns)
        with contextlib.ExitStack() as stack:
            stack.callback(namespaces.delete, self.netns)
            for words in ("link set lo up", "address add 172.16.0.1/32 dev lo"):
                subprocess.run(["ip", "-n", self.netns, *words.split()], check=True)
            url = await self.cluster.server.start(netns=path)
            log = stack.enter_context(open(self.folder / "agent.log", "wb"))
            process = subprocess.Popen(self._command(url), cwd=ROOT, stdout=log, stderr=log)
            self.pid = process.pid
            try:
                await self._ready()
                yield self
            finally:
                process.terminate()
                process.wait()
                await self.cluster.server.stop()
                for name in bpf_links.links_in(str(self.pins / "links")):
                    bpf_links.remove(str(self.pins / "links" / name))
                shutil.rmtree(self.pins.parent, ignore_errors=True)
                for name in self.cluster.here:
                    namespaces.delete(f"lg-{CLUSTER}-{name}")

    def _command(self, url: str) -> list[str]:
        config = {
            "cluster": CLUSTER,
            "node": NODE,
            "netns": self.netns,
            "stateDir": str(self.folder),
            "kubernetes": {"apiServer": url},
            "web": "127.0.0.1:9781",
            "underlay": "",
            "outside": "",
        }
        (self.folder / "agent.json").write_text(json.dumps(config))
        words = ["-m", "lockgate.agent", "--config", str(self.folder / "agent.json")]
        return [sys.executable, *words]

    async def _ready(self) -> None:
        until = time.monotonic() + PATIENCE
        while True:
            with contextlib.suppress(OSError, aiohttp.ClientError):
                if (await self.status())["applied"]:
                    return
            if time.monotonic() > until:
                raise TimeoutError((self.folder / "agent.log").read_text()[-2000:])
            await asyncio.sleep(0.05)

    async def status(self) -> Any:
        connector = aiohttp.UnixConnector(str(self.folder / "agent.sock"))
        async with aiohttp.ClientSession(connector=connector) as session:
            async with session.get("http://agent/v1/status") as response:
                return await response.json()

    async def received(self) -> int:
        """Bytes that lists and watches brought so far."""
        kinds = (await self.status())["api"]["kinds"]
        return sum(one["bytes"] for one in kinds.values())

    async def add(self) -> None:
        """A pod comes: bound, wired, running."""
        name = self.cluster.begin()
        await asyncio.to_thread(namespaces.create, f"lg-{CLUSTER}-{name}")
        answer = json.loads(await self._cni("ADD", name))
        self.cluster.run(name, answer["ips"][0]["address"].partition("/")[0])

    async def delete(self) -> None:
        """A pod goes."""
        name = self.cluster.end()
        await self._cni("DEL", name)
        await asyncio.to_thread(namespaces.delete, f"lg-{CLUSTER}-{name}")

    async def _cni(self, command: str, name: str) -> bytes:
        netns = namespaces.path_of(f"lg-{CLUSTER}-{name}")
        who = self.cluster.namespace(name), name, self.cluster.uid(name)
        return await cni(command, self.folder / "cni.sock", netns, *who)

    def asker(self) -> subprocess.Popen[bytes]:
        """A process that asks as the kubelet and Prometheus do."""
        program = (
            "import threading, time, urllib.request, sys\n"
            "def ask(path, every):\n"
            "    while True:\n"
            "        urllib.request.urlopen('http://127.0.0.1:9781' + path).read()\n"
            "        time.sleep(every)\n"
            f"for one in {ASKED!r}.items():\n"
            "    threading.Thread(target=ask, args=one, daemon=True).start()\n"
            "sys.stdin.read()\n"
        )
        netns = f"--net=/run/netns/{self.netns}"
        return subprocess.Popen(
            ["nsenter", netns, sys.executable, "-c", program], stdin=subprocess.PIPE
        )


async def cni(
    command: str, socket: Path, netns: Path, namespace: str, name: str, uid: str
) -> bytes:
    """Run our plugin as a runtime does; its answer."""
    variables = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": name,
        "CNI_NETNS": str(netns),
        "CNI_IFNAME": "eth0",
        "CNI_PATH": "/opt/cni/bin",
        "CNI_ARGS": f"IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};"
        f"K8S_POD_NAME={name};K8S_POD_UID={uid}",
        "LOCKGATE_CNI_SOCKET": str(socket),
    }
    process = await asyncio.create_subprocess_exec(
        str(cni_plugin()), stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=variables
    )
    out, _ = await process.communicate(
        b'{"cniVersion": "1.0.0", "name": "lockgate", "type": "lockgate-cni"}'
    )
    if process.returncode:
        raise RuntimeError(f"{command}: {out.decode().strip()}")
    return out


def cpu(pid: int) -> float:
    """Seconds of processor time of all threads so far (Documentation/scheduler/sched-stats.rst)."""
    total = 0
    for path in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(OSError):
            total += int((path / "schedstat").read_text().split()[0])
    return total / 1e9


async def measured(agent: Agent, name: str, seconds: float, rate: float = 0) -> dict[str, Any]:
    """A row: what `seconds` with `rate` pod changes a second cost."""
    await asyncio.sleep(3)
    used, bytes_, first = cpu(agent.pid), await agent.received(), time.monotonic()
    tasks = set()
    for number in range(int(seconds * rate)):
        await asyncio.sleep(max(0.0, first + number / rate - time.monotonic()))
        # Not one after the other: a node does not wait either.
        tasks.add(asyncio.create_task(agent.add() if number % 2 else agent.delete()))
    await asyncio.sleep(max(0.0, first + seconds - time.monotonic()))
    await asyncio.gather(*tasks)
    took = time.monotonic() - first
    used, bytes_ = cpu(agent.pid) - used, await agent.received() - bytes_
    now, most = memory(agent.pid)
    return {
        "110 pods": name,
        "CPU %": used / took * 100,
        "RSS MB": now,
        "peak MB": most,
        "API bytes/s": bytes_ / took,
    }


async def measure(folder: Path, seconds: float, rate: float) -> tuple[list[dict[str, Any]], int]:
    cluster = Cluster()
    async with Agent(cluster, folder).running() as agent:
        for _ in range(PODS):
            await agent.add()
        start = await agent.received()
        rows = [await measured(agent, "idle", seconds)]
        with agent.asker() as asker:
            try:
                rows.append(await measured(agent, "idle, probed and scraped", seconds))
                rows.append(await measured(agent, f"{rate:g} changes/s", seconds, rate))
            finally:
                asker.kill()
        return rows, start


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.daytwo")
    parser.add_argument("--quick", action="store_true", help="10 s each")
    parser.add_argument("--seconds", type=float, default=0, help="of each row: 60")
    parser.add_argument("--rate", type=float, default=10, help="pod changes a second")
    options = parser.parse_args()
    seconds = options.seconds or (10 if options.quick else 60)
    os.umask(0o022)
    with tempfile.TemporaryDirectory(prefix="lockgate-bench-") as folder:
        rows, start = asyncio.run(measure(Path(folder), seconds, options.rate))
    print(
        json.dumps(
            {
                "name": "daytwo",
                "title": "An agent on a node with 110 pods (aim: idle CPU < 1 % of a core)",
                "columns": list(rows[0]),
                "rows": rows,
                "notes": [
                    f"{NODES} such nodes, pods of 3 KB, {APPS} services, {APPS} policies",
                    f"a change: a pod and its slice go, or come and are wired; {seconds:g} s a row",
                    "probed: /readyz every 2 s, /healthz every 10 s, /metrics every 15 s",
                    f"until all pods ran the API server had sent {start / 1e6:.1f} MB",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
