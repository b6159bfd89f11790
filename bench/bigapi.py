"""An agent on a node of a big cluster: what following it costs, how soon changes are in force.

A server (here, in another process than the agent) speaks the API server's list and watch with
objects of the size that real ones have. After the start pods come and go: one is deleted, one
is created in its place, it gets its address, each a change; and of each service concerned the
slice. A change is in force when the pinned table of peers has the new pod's address in the view
that packets read.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lockgate.bpf import links as bpf_links
from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import HashMap, MappedArray
from lockgate.bpf.pins import pin_names
from lockgate.net import namespaces
from lockgate.net.links import Net
from lockgate.objects.address import parse_address
from lockgate.paths import bpf_object
from tests.apiserver import ApiServer

CLUSTER = "bigapi"
ROOT = Path(__file__).resolve().parents[1]
APPS, NAMESPACES = 1000, 100
PATIENCE = 120.0


def address(node: int, place: int) -> str:
    return f"10.{node // 256}.{node % 256}.{place}"


def pod(name: str, app: int, node: int, ip: str) -> dict[str, Any]:
    """A pod as the API server has it: 3 KB, of which an agent uses a tenth."""
    owner = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": f"app-{app}-6d4cf56db6"}
    fields = {f"f:{key}": {"f:value": {}, "f:name": {}} for key in ("env", "ports", "image", "x")}
    return {
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": f"ns-{app % NAMESPACES}",
            "uid": f"0e3a7b52-0000-4000-8000-{name:>012}",
            "labels": {"app": f"app-{app}", "pod-template-hash": "6d4cf56db6"},
            "annotations": {"kubernetes.io/config.source": "api", "checksum/config": "x" * 64},
            "ownerReferences": [owner],
            "managedFields": [
                {"manager": manager, "operation": "Update", "fieldsV1": {"f:metadata": fields}}
                for manager in ("kube-controller-manager", "kubelet")
            ],
        },
        "spec": {
            "nodeName": f"node-{node}",
            "containers": [
                {
                    "name": "main",
                    "image": f"registry.example/app-{app}:1.0",
                    "env": [{"name": f"SETTING_{n}", "value": "x" * 20} for n in range(12)],
                    "ports": [{"name": "http", "containerPort": 8080, "protocol": "TCP"}],
                    "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}},
                    "volumeMounts": [{"name": "token", "mountPath": "/var/run/secrets"}],
                }
            ],
            "tolerations": [{"key": f"k{n}", "operator": "Exists"} for n in range(2)],
            "volumes": [{"name": "token", "projected": {"sources": [{"path": "token"}]}}],
        },
        "status": {
            "phase": "Running" if ip else "Pending",
            "podIP": ip,
            "podIPs": [{"ip": ip}] if ip else [],
            "conditions": [{"type": t, "status": "True"} for t in ("Ready", "Initialized")],
            "containerStatuses": [{"name": "main", "ready": True, "imageID": "x" * 71}],
        },
    }


def slice_of(service: int, app: int, ips: list[str]) -> dict[str, Any]:
    return {
        "kind": "EndpointSlice",
        "metadata": {
            "name": f"svc-{service}-abcde",
            "namespace": f"ns-{app % NAMESPACES}",
            "labels": {"kubernetes.io/service-name": f"svc-{service}"},
        },
        "addressType": "IPv4",
        "endpoints": [
            {
                "addresses": [ip],
                "conditions": {"ready": True, "serving": True, "terminating": False},
            }
            for ip in ips
        ],
        "ports": [{"name": "http", "port": 8080, "protocol": "TCP"}],
    }


def policy(number: int) -> dict[str, Any]:
    app = number % APPS
    return {
        "kind": "NetworkPolicy",
        "metadata": {"name": f"policy-{number}", "namespace": f"ns-{app % NAMESPACES}"},
        "spec": {
            "podSelector": {"matchLabels": {"app": f"app-{app}"}},
            "policyTypes": ["Ingress"],
            "ingress": [
                {
                    "from": [
                        {
                            "namespaceSelector": {"matchLabels": {"team": f"t-{number % 10}"}},
                            "podSelector": {"matchLabels": {"app": f"app-{(app + 7) % APPS}"}},
                        },
                        {"ipBlock": {"cidr": f"192.168.{number % 250}.0/24"}},
                    ],
                    "ports": [{"port": 8080 + number % 3}],
                }
            ],
        },
    }


class Big:
    """The cluster: its objects, and its changes."""

    def __init__(self, nodes: int, pods: int, services: int, policies: int) -> None:
        self.server = ApiServer()
        self.nodes, per_node = nodes, pods // nodes
        put = self.server.put
        for n in range(NAMESPACES):
            labels = {"team": f"t-{n % 10}"}
            put({"kind": "Namespace", "metadata": {"name": f"ns-{n}", "labels": labels}})
        for n in range(nodes):
            images = [{"names": ["x" * 90], "sizeBytes": 1} for _ in range(40)]
            ip = {"type": "InternalIP", "address": f"172.16.{n // 250}.{n % 250 + 1}"}
            put(
                {
                    "kind": "Node",
                    "metadata": {"name": f"node-{n}"},
                    "spec": {"podCIDRs": [f"{address(n, 0)}/24"]},
                    "status": {"addresses": [ip], "images": images},
                }
            )
        #: name, app, node, place
        self.live: list[tuple[str, int, int, int]] = []
        members: dict[int, list[int]] = {}
        for n in range(per_node * nodes):
            node, place, app = n // per_node, n % per_node + 2, n % APPS
            self.live.append((str(n), app, node, place))
            members.setdefault(n % services, []).append(n)
            put(pod(str(n), app, node, address(node, place)))
        self.members = members
        self.services = services
        for n in range(services):
            app = members[n][0] % APPS
            put(
                {
                    "kind": "Service",
                    "metadata": {"name": f"svc-{n}", "namespace": f"ns-{app % NAMESPACES}"},
                    "spec": {
                        "clusterIP": f"10.{100 + n // 65536}.{n // 256 % 256}.{n % 256}",
                        "ports": [{"name": "http", "port": 80, "targetPort": 8080}],
                    },
                }
            )
            self._slice(n)
        for n in range(policies):
            put(policy(n))
        for events in self.server.history.values():
            events.clear()
        self._serial, self._at = len(self.live), 0

    def _slice(self, service: int, without: int = -1) -> None:
        pods = [self.live[m] for m in self.members[service] if m != without]
        app = self.live[self.members[service][0]][1]
        self.server.put(
            slice_of(service, app, [address(node, place) for _, _, node, place in pods])
        )

    def steps(self) -> Iterator[str]:
        """Each makes one pod change; gives the address that is to be known after it, or ""."""
        used: dict[int, int] = {}
        while True:
            self._at = (self._at + 7919) % len(self.live)
            at = self._at
            old, app, node, _ = self.live[at]
            space = f"ns-{app % NAMESPACES}"
            self._slice(at % self.services, without=at)
            self.server.delete("Pod", space, old)
            yield ""
            name, self._serial = str(self._serial), self._serial + 1
            # Not the same address at once: the node's pool goes round.
            used[node] = used.get(node, 60) % 190 + 1
            fresh = 60 + used[node]
            self.live[at] = name, app, node, fresh
            self.server.put(pod(name, app, node, ""))
            yield ""
            ip = address(node, fresh)
            self.server.put(pod(name, app, node, ip))
            self._slice(at % self.services)
            yield ip


class Poller(threading.Thread):
    """Looks at the kernel's tables until the addresses are there."""

    def __init__(self, pins: Path) -> None:
        super().__init__(daemon=True)
        schema = Schema.from_object(bpf_object())
        names = pin_names(schema)
        self._epoch = MappedArray.open(str(pins / names["state"]), schema.dtype("node_state")).view[
            "epoch"
        ]
        dtype = schema.dtype
        self._peers = HashMap.open(str(pins / names["peers"]), dtype("addr"), dtype("peer"))
        self.waiting: dict[str, float] = {}
        self.times: list[float] = []
        self.stop = False

    def run(self) -> None:
        last = -1
        while not self.stop:
            epoch = int(self._epoch[0])
            if epoch != last:
                last = epoch
                now = time.monotonic()
                for ip, began in list(self.waiting.items()):
                    found = self._peers.get(np.frombuffer(parse_address(ip), np.uint8))
                    if found is not None and found["view"]["kind"][epoch & 1]:
                        self.times.append((now - began) * 1e3)
                        del self.waiting[ip]
            time.sleep(0.0005)


def cpu(pid: int) -> float:
    """Seconds of processor time of a process and all its threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> tuple[float, float]:
    """MB resident now, and at most so far."""
    found = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return int(found["VmRSS"].split()[0]) / 1024, int(found["VmHWM"].split()[0]) / 1024


async def applied(socket: Path) -> bool:
    """Is what the agent knows in force?"""
    with contextlib.suppress(OSError, ValueError, asyncio.IncompleteReadError):
        reader, writer = await asyncio.open_unix_connection(str(socket))
        writer.write(b"GET /v1/status HTTP/1.0\r\nHost: agent\r\n\r\n")
        answer = await reader.read()
        writer.close()
        status = json.loads(answer.partition(b"\r\n\r\n")[2])
        return bool(
            status["connected"] and status["applied"] and status["applied"] == status["revision"]
        )
    return False


async def measure(big: Big, folder: Path, seconds: float, rate: float) -> dict[str, Any]:
    path = namespaces.create(f"lg-{CLUSTER}-node-0")

    def up() -> None:
        with namespaces.inside(path), Net() as net:
            net._ip.link("set", index=1, state="up")

    await asyncio.to_thread(up)
    url = await big.server.start(netns=path)
    config = {
        "cluster": CLUSTER,
        "node": "node-0",
        "netns": f"lg-{CLUSTER}-node-0",
        "stateDir": str(folder),
        "kubernetes": {"apiServer": url},
        "web": "",
        "underlay": "",
        "outside": "",
    }
    (folder / "agent.json").write_text(json.dumps(config))
    pins = Path("/sys/fs/bpf/lockgate", CLUSTER, "node-0")
    log = open(folder / "agent.log", "wb")  # noqa: SIM115
    began = time.monotonic()
    command = [sys.executable, "-m", "lockgate.agent", "--config", str(folder / "agent.json")]
    agent = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
    poller = None
    try:
        schema = Schema.from_object(bpf_object())
        state, record = pins / pin_names(schema)["state"], schema.dtype("node_state")
        epoch = None
        while epoch is None or not epoch[0]:
            if time.monotonic() - began > PATIENCE or agent.poll() is not None:
                raise TimeoutError((folder / "agent.log").read_text()[-2000:])
            with contextlib.suppress(OSError):
                epoch = MappedArray.open(str(state), record).view["epoch"]
            await asyncio.sleep(0.01)
        start = time.monotonic() - began
        start_cpu = cpu(agent.pid)
        await asyncio.sleep(3)
        poller = Poller(pins)
        poller.start()
        steps = big.steps()
        used, first, moved = cpu(agent.pid), time.monotonic(), int(epoch[0])
        total = int(seconds * rate)
        for number in range(total):
            # Evenly, but not in step with anything.
            await asyncio.sleep(max(0.0, first + number / rate - time.monotonic()))
            now = time.monotonic()
            ip = next(steps)
            if ip:
                poller.waiting[ip] = now
        took = time.monotonic() - first
        used = cpu(agent.pid) - used
        until = time.monotonic() + 10
        while poller.waiting and time.monotonic() < until:
            await asyncio.sleep(0.05)
        now_mb, most_mb = memory(agent.pid)
        # Another agent, from the maps of this one: nothing moves, and the next change is as ever.
        agent.terminate()
        agent.wait()
        stood, began = int(epoch[0]), time.monotonic()
        agent = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
        while not await applied(folder / "agent.sock"):
            if time.monotonic() - began > PATIENCE or agent.poll() is not None:
                raise TimeoutError((folder / "agent.log").read_text()[-2000:])
            await asyncio.sleep(0.01)
        again, moves = time.monotonic() - began, int(epoch[0]) - stood
        late = Poller(pins)
        late.start()
        ip = ""
        while not ip:
            now, ip = time.monotonic(), next(steps)
        late.waiting[ip] = now
        while late.waiting and time.monotonic() < now + 10:
            await asyncio.sleep(0.01)
        late.stop = True
        cuts = statistics.quantiles(poller.times, n=100)
        return {
            "pods": len(big.live),
            "start s": start,
            "start CPU s": start_cpu,
            "CPU %": used / took * 100,
            "RSS MB": now_mb,
            "peak MB": most_mb,
            "p50 ms": cuts[49],
            "p99 ms": cuts[98],
            "max ms": max(poller.times),
            "epochs/s": (int(epoch[0]) - moved) / took,
            "lost": len(poller.waiting) + len(late.waiting),
            "restart s": again,
            "restart epochs": moves,
            "first change ms": late.times[0] if late.times else float("nan"),
        }
    finally:
        if poller is not None:
            poller.stop = True
            poller.join()
        agent.terminate()
        agent.wait()
        log.close()
        await big.server.stop()
        for name in bpf_links.links_in(str(pins / "links")):
            bpf_links.remove(str(pins / "links" / name))
        shutil.rmtree(pins.parent, ignore_errors=True)
        namespaces.delete(f"lg-{CLUSTER}-node-0")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.bigapi")
    parser.add_argument("--quick", action="store_true", help="a tenth of everything, 10 s")
    parser.add_argument("--pods", type=int, default=0, help="50,000")
    parser.add_argument("--seconds", type=float, default=0, help="30")
    parser.add_argument("--rate", type=float, default=100, help="pod changes a second")
    options = parser.parse_args()
    pods = options.pods or (5000 if options.quick else 50000)
    seconds = options.seconds or (10 if options.quick else 30)
    with tempfile.TemporaryDirectory(prefix="lockgate-bench-") as folder:
        big = Big(pods // 50, pods, pods // 5, pods // 25)
        row = asyncio.run(measure(big, Path(folder), seconds, options.rate))
        size = Path(folder, "journal.jsonl").stat().st_size / 1e6
    title = (
        "An agent in a big cluster (aims: CPU < 10 %, memory < 300 MB, p99 < 20 ms, start < 15 s)"
    )
    print(
        json.dumps(
            {
                "name": "bigapi",
                "title": title,
                "columns": list(row),
                "rows": [row],
                "notes": [
                    f"{pods // 50} nodes, {pods // 5} services with slices, {pods // 25} policies",
                    f"{options.rate:g} pod changes a second for {seconds:g} s, slices besides",
                    f"from the event's writing to the kernel's table; journal {size:.0f} MB",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
