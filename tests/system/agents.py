"""Agents as processes, on nodes of their own with pods that are bare namespaces."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import shutil
import signal
import socket
import sys
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web

from lockgate.bpf import links as bpf_links
from lockgate.net import cgroup, namespaces
from lockgate.net.links import Net

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 15.0
_NUMBERS = itertools.count()
NODES = {"one": ("192.168.77.1", "fd77::1", 1), "two": ("192.168.77.2", "fd77::2", 2)}


class Supervisor:
    """The side of the watch stream that the agent does not see: objects by key."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str, str], dict[str, Any]] = {}
        self.revision = 0
        self.applied: dict[str, tuple[int, str]] = {}
        self._queues: list[asyncio.Queue[bytes]] = []

    def app(self) -> web.Application:
        app = web.Application()
        app.add_routes([web.get("/v1/watch", self._watch), web.post("/v1/applied", self._applied)])
        return app

    def put(self, *objects: dict[str, Any], verb: str = "ADDED") -> int:
        lines = []
        for item in objects:
            meta = item["metadata"]
            key = item["kind"], meta.get("namespace", ""), meta["name"]
            if verb == "DELETED":
                self.objects.pop(key, None)
            else:
                self.objects[key] = item
            lines.append(json.dumps({"type": verb, "object": item}))
        self.revision += 1
        lines.append(json.dumps({"type": "BOOKMARK", "revision": self.revision}))
        for queue in self._queues:
            queue.put_nowait("".join(f"{line}\n" for line in lines).encode())
        return self.revision

    async def wait(self, revision: int, *nodes: str) -> None:
        await until(lambda: all(self.applied.get(n, (0, ""))[0] >= revision for n in nodes))

    async def _watch(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        queue: asyncio.Queue[bytes] = asyncio.Queue()
        for item in self.objects.values():
            queue.put_nowait(json.dumps({"type": "ADDED", "object": item}).encode() + b"\n")
        mark = json.dumps({"type": "BOOKMARK", "revision": self.revision})
        queue.put_nowait(mark.encode() + b"\n")
        self._queues.append(queue)
        try:
            while True:
                await response.write(await queue.get())
        finally:
            self._queues.remove(queue)

    async def _applied(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.applied[body["node"]] = body["revision"], body.get("error", "")
        return web.json_response({})


class Node:
    """One node: namespace, cgroup, agent process."""

    def __init__(self, name: str, folder: Path, cluster: str) -> None:
        self.name, self.folder, self.cluster = name, folder, cluster
        self.netns = f"lg-{cluster}-{name}"
        self.cgroup = cgroup.find() / "lockgate" / cluster / name
        self.pins = Path("/sys/fs/bpf/lockgate", cluster, name)
        self.process: asyncio.subprocess.Process | None = None
        #: More of the agent's configuration.
        self.settings: dict[str, Any] = {}

    @property
    def state(self) -> Path:
        return self.folder / self.name

    async def start(self) -> None:
        await self.launch()
        await until(self._answers)

    async def launch(self) -> None:
        """Start the agent; do not wait for it."""
        self.state.mkdir(exist_ok=True)
        config = {
            "cluster": self.cluster,
            "node": self.name,
            "netns": self.netns,
            "stateDir": str(self.state),
            "control": str(self.folder / "control.sock"),
            "cgroup": str(self.cgroup),
            "underlay": "underlay",
            "outside": "outside",
            "serviceCidrs": ["10.96.0.0/16", "fd96::/112"],
            **self.settings,
        }
        path = self.state / "config.json"
        path.write_text(json.dumps(config))
        with open(self.state / "agent.log", "ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "lockgate.agent",
                "--config",
                str(path),
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )

    async def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.returncode is None, (self.state / "agent.log").read_text()
        try:
            return bool((await self.call("GET", "/v1/status"))[0] == 200)
        except (OSError, aiohttp.ClientError):
            return False

    async def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)
            await self.process.wait()

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        folder = self.settings.get("runDir", self.state)
        connector = aiohttp.UnixConnector(str(Path(folder, "agent.sock")))
        async with aiohttp.ClientSession(connector=connector) as session:
            async with session.request(method, f"http://agent{path}", json=body) as response:
                return response.status, await response.json()

    async def add(self, uid: str) -> Any:
        path = namespaces.create(f"lg-{self.cluster}-{uid}")
        status, answer = await self.call("POST", "/v1/endpoints", {"uid": uid, "netns": str(path)})
        assert status == 200, (answer, (self.state / "agent.log").read_text())
        return answer


async def until(condition: Callable[[], Any]) -> None:
    """Wait for a condition, plain or awaitable."""
    async with asyncio.timeout(DEADLINE):
        while True:
            value = condition()
            if asyncio.iscoroutine(value):
                value = await value
            if value:
                return
            await asyncio.sleep(0.02)


class Bed:
    def __init__(self, folder: Path) -> None:
        self.cluster = f"t{os.getpid() % 100000}-{next(_NUMBERS)}"
        self.supervisor = Supervisor()
        self.nodes = {name: Node(name, folder, self.cluster) for name in NODES}
        self.pods: list[str] = []

    def exchange(self, source: str, address: str, port: int = 8080, patience: float = 5.0) -> str:
        """Connect from a pod or node namespace by TCP: "ok", "timeout" or "refused"."""
        with namespaces.inside(namespaces.path_of(f"lg-{self.cluster}-{source}")):
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            client = socket.socket(family)
        with client:
            client.settimeout(patience)
            try:
                client.connect((address, port))
                return client.recv(64).decode()
            except TimeoutError:
                return "timeout"
            except OSError as error:
                return f"{error}"

    def serve(self, uid: str, port: int = 8080) -> None:
        """Answer in a pod's namespace with its uid."""
        with namespaces.inside(namespaces.path_of(f"lg-{self.cluster}-{uid}")):
            listener = socket.create_server(
                ("::", port), family=socket.AF_INET6, dualstack_ipv6=True
            )

        def answer() -> None:
            while True:
                try:
                    client, _ = listener.accept()
                except OSError:
                    return
                with client:
                    client.sendall(uid.encode())

        threading.Thread(target=answer, daemon=True).start()


def pod(uid: str, node: str, **labels: str) -> dict[str, Any]:
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": uid, "namespace": "shop", "uid": uid, "labels": labels},
        "spec": {"nodeName": node, "containers": [{"name": "main"}]},
        "status": {"phase": "Pending"},
    }


def with_ips(item: dict[str, Any], ips: list[str]) -> dict[str, Any]:
    return {**item, "status": {"phase": "Running", "podIPs": [{"ip": ip} for ip in ips]}}


def frontend(name: str, address: str, *backends: str) -> list[dict[str, Any]]:
    """A service at an external address, and its endpoints; for pods that are there."""
    meta = {"namespace": "shop", "name": name}
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {**meta, "uid": name},
        "spec": {
            "type": "ClusterIP",
            "clusterIPs": ["10.96.0.80"],
            "externalIPs": [address],
            "ports": [{"port": 80, "targetPort": 8080, "protocol": "TCP"}],
        },
    }
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {**meta, "labels": {"kubernetes.io/service-name": name}},
        "addressType": "IPv4",
        "ports": [{"port": 8080, "protocol": "TCP"}],
        "endpoints": [{"addresses": [ip], "conditions": {"ready": True}} for ip in backends],
    }
    return [service, endpoints]


def policy(name: str, sources: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": "shop"},
        "spec": {
            "podSelector": {"matchLabels": {"app": "server"}},
            "policyTypes": ["Ingress"],
            "ingress": sources,
        },
    }


@contextlib.asynccontextmanager
async def make_bed(tmp_path: Path, *agents: str, **settings: Any) -> AsyncIterator[Bed]:
    """Two nodes, joined with one another and the world; `agents` names those that have an
    agent, none means both; `settings` are of all."""
    bed = Bed(tmp_path)
    for node in bed.nodes.values():
        node.settings |= settings
    runner = web.AppRunner(bed.supervisor.app(), shutdown_timeout=0.1)
    await runner.setup()
    await web.UnixSite(runner, str(tmp_path / "control.sock")).start()
    objects: list[dict[str, Any]] = [
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "shop"}}
    ]
    for name, (v4, v6, number) in NODES.items():
        objects.append(
            {
                "apiVersion": "v1",
                "kind": "Node",
                "metadata": {"name": name},
                "spec": {"podCIDRs": [f"10.77.{number}.0/24", f"fd77:{number}::/64"]},
                "status": {
                    "addresses": [
                        {"type": "InternalIP", "address": v4},
                        {"type": "InternalIP", "address": v6},
                    ]
                },
            }
        )
    bed.supervisor.put(*objects)
    paths = {name: namespaces.create(node.netns) for name, node in bed.nodes.items()}
    try:
        join(paths, namespaces.create(f"lg-{bed.cluster}-outside"))
        for name in agents or NODES:
            cgroup.create(bed.nodes[name].cgroup)
            await bed.nodes[name].start()
        await bed.supervisor.wait(1, *(agents or NODES))
        yield bed
    finally:
        for node in bed.nodes.values():
            await node.kill()
            if node.process is None:
                continue
            if (node.state / "agent.log").exists():
                print((node.state / "agent.log").read_text())
            for name in bpf_links.links_in(str(node.pins / "links")):
                bpf_links.remove(str(node.pins / "links" / name))
            shutil.rmtree(node.pins, ignore_errors=True)
            cgroup.remove(node.cgroup)
        for entry in Path("/run/netns").glob(f"lg-{bed.cluster}-*"):
            namespaces.delete(entry.name)
        shutil.rmtree(Path("/sys/fs/bpf/lockgate", bed.cluster), ignore_errors=True)
        cgroup.remove(cgroup.find() / "lockgate" / bed.cluster)
        await runner.cleanup()


def join(paths: dict[str, Path], outside: Path) -> None:
    """A cable between the two nodes, and one from each to the world, which knows no pods."""

    def work() -> None:
        with namespaces.inside(paths["one"]), Net() as net:
            other = os.open(paths["two"], os.O_RDONLY)
            net._ip.link(
                "add",
                ifname="underlay",
                kind="veth",
                peer={"ifname": "underlay", "net_ns_fd": other},
            )
            os.close(other)
        for name, path in paths.items():
            v4, v6, _ = NODES[name]
            with namespaces.inside(path), Net() as net:
                index = socket.if_nametoindex("underlay")
                net._ip.link("set", index=1, state="up")
                net._ip.link("set", index=index, state="up")
                net._add_address(index, f"{v4}/24")
                net._add_address(index, f"{v6}/64")
        for number, path in enumerate(paths.values(), 1):
            with namespaces.inside(path), Net() as net:
                other = os.open(outside, os.O_RDONLY)
                net._ip.link(
                    "add",
                    ifname="outside",
                    kind="veth",
                    peer={"ifname": f"node{number}", "net_ns_fd": other},
                )
                os.close(other)
            for place, name, host in ((outside, f"node{number}", 1), (path, "outside", 2)):
                with namespaces.inside(place), Net() as net:
                    index = socket.if_nametoindex(name)
                    net._ip.link("set", index=index, state="up")
                    net._add_address(index, f"198.18.{number}.{host}/24")
                    net._add_address(index, f"fd18:{number}::{host}/64")
                    if host == 2:
                        for gateway in (f"198.18.{number}.1", f"fd18:{number}::1"):
                            default = "::/0" if ":" in gateway else "0.0.0.0/0"
                            net._ip.route("replace", dst=default, oif=index, gateway=gateway)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
