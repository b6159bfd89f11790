"""The agent as a process, on a node of its own with pods that are bare namespaces."""

from __future__ import annotations

import asyncio
import base64
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
import pytest
from aiohttp import web
from scapy.layers.inet import IP, TCP

from lockgate.bpf import links as bpf_links
from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import ArrayMap
from lockgate.net import cgroup, namespaces
from lockgate.net.links import Net
from lockgate.net.pods import remove
from lockgate.observer.journal import Journal
from lockgate.paths import bpf_object

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 15.0
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

    @property
    def state(self) -> Path:
        return self.folder / self.name

    async def start(self) -> None:
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
        await until(self._answers)

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
        connector = aiohttp.UnixConnector(str(self.state / "agent.sock"))
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
        self.cluster = f"t{os.getpid() % 100000}"
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


@pytest.fixture
async def bed(tmp_path: Path) -> AsyncIterator[Bed]:
    bed = Bed(tmp_path)
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
        for node in bed.nodes.values():
            cgroup.create(node.cgroup)
            await node.start()
        await bed.supervisor.wait(1, *NODES)
        yield bed
    finally:
        for node in bed.nodes.values():
            await node.kill()
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
                        net.route("0.0.0.0/0", index, gateway=f"198.18.{number}.1")
                        net.route("::/0", index, gateway=f"fd18:{number}::1")

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()


async def test_pods_are_wired_judged_and_kept_through_a_crash(bed: Bed) -> None:
    one, two = bed.nodes["one"], bed.nodes["two"]
    items = {
        "server": pod("server", "one", app="server"),
        "client": pod("client", "one", app="client"),
        "far": pod("far", "two", app="far"),
    }
    bed.supervisor.put(*items.values())
    server, client = await one.add("server"), await one.add("client")
    far = await two.add("far")
    assert await one.add("server") == server, "ADD is idempotent"
    assert server["ips"][0].startswith("10.77.1.") and server["ips"][1].startswith("fd77:1:")
    assert len({server["slot"], client["slot"]}) == 2
    bed.serve("server")
    answers = {"server": server, "client": client, "far": far}
    revision = bed.supervisor.put(
        *(with_ips(item, answers[uid]["ips"]) for uid, item in items.items()), verb="MODIFIED"
    )
    await bed.supervisor.wait(revision, "one", "two")

    async def reach(source: str, index: int = 0, patience: float = 5.0) -> str:
        address = server["ips"][index]
        return await asyncio.to_thread(bed.exchange, source, address, 8080, patience)

    for index in (0, 1):
        assert await reach("client", index) == "server", "local pod"
        assert await reach("one", index) == "server", "the node itself"
        assert await reach("far", index) == "server", "pod of another node"
        assert await reach("two", index) == "server", "another node"

    revision = bed.supervisor.put(
        policy("only-far", [{"from": [{"podSelector": {"matchLabels": {"app": "far"}}}]}])
    )
    await bed.supervisor.wait(revision, "one", "two")
    for index in (0, 1):
        assert await reach("client", index, 0.6) == "timeout"
        assert await reach("far", index) == "server"
        assert await reach("one", index) == "server"

    # Without an agent the kernel goes on; the next agent takes over without moving anything.
    before = (await one.call("GET", "/v1/status"))[1]
    await one.kill()
    assert await reach("client", 0, 0.6) == "timeout" and await reach("far") == "server"
    await one.start()
    await until(lambda: caught_up(one, revision))
    after = (await one.call("GET", "/v1/status"))[1]
    assert after["epoch"] == before["epoch"], "nothing differs, so nothing moves"
    assert after["endpoints"] == before["endpoints"]
    assert await reach("client", 0, 0.6) == "timeout" and await reach("far") == "server"
    assert await one.add("server") == server

    revision = bed.supervisor.put(policy("only-far", []), verb="DELETED")
    await bed.supervisor.wait(revision, "one")
    assert await reach("client") == "server"

    reader = Journal(one.state / "journal.jsonl")
    reader.refresh()
    assert reader.endpoints[server["endpoint"]].name == "server"

    # DEL, also with everything gone.
    assert (await one.call("DELETE", "/v1/endpoints/client"))[1] == {"deleted": True}
    namespaces.delete(f"lg-{bed.cluster}-server")
    assert (await one.call("DELETE", "/v1/endpoints/server"))[1] == {"deleted": True}
    assert (await one.call("DELETE", "/v1/endpoints/server"))[1] == {"deleted": False}
    status = (await one.call("GET", "/v1/status"))[1]
    assert status["endpoints"] == [] and not status["errors"]


async def caught_up(node: Node, revision: int) -> bool:
    status = (await node.call("GET", "/v1/status"))[1]
    return bool(status["applied"] >= revision)


async def test_services_hops_and_dry_runs(bed: Bed) -> None:
    one, two = bed.nodes["one"], bed.nodes["two"]
    server, far = pod("server", "one", app="server"), pod("far", "two", app="far")
    bed.supervisor.put(server, far)
    ips, far_ips = (await one.add("server"))["ips"], (await two.add("far"))["ips"]
    bed.serve("server")
    service = {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "web", "namespace": "shop"},
        "spec": {
            "clusterIP": "10.96.0.7",
            "clusterIPs": ["10.96.0.7"],
            "selector": {"app": "server"},
            "ports": [{"port": 80, "targetPort": 8080, "protocol": "TCP"}],
        },
    }
    slice_ = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": "web-1",
            "namespace": "shop",
            "labels": {"kubernetes.io/service-name": "web"},
        },
        "addressType": "IPv4",
        "endpoints": [{"addresses": ips[:1], "conditions": {"ready": True}}],
        "ports": [{"port": 8080, "name": "", "protocol": "TCP"}],
    }
    revision = bed.supervisor.put(
        with_ips(server, ips), with_ips(far, far_ips), service, slice_, verb="MODIFIED"
    )
    await bed.supervisor.wait(revision, "one", "two")
    assert await asyncio.to_thread(bed.exchange, "far", "10.96.0.7", 80) == "server"

    def hops(node: Node) -> list[Any]:
        with ArrayMap.open(str(node.pins / "hops"), schema.dtype("hop")) as table:
            return [table[8]]

    schema = Schema.from_object(bpf_object())
    await until(lambda: all(int(row["flags"]) == 1 and any(row["dmac"]) for row in hops(two)))

    bed.serve("outside")
    for address in ("198.18.2.1", "fd18:2::1", "198.18.1.1", "fd18:1::1"):
        answer = await asyncio.to_thread(bed.exchange, "far", address)
        assert answer == "outside", f"the world at {address}, near and behind the gateway"

    # A SYN from the far pod, asked and not sent.
    syn = bytes(IP(src=far_ips[0], dst=ips[0]) / TCP(sport=4000, dport=8080, flags="S"))
    status, answer = await one.call(
        "POST",
        "/v1/dryrun",
        {
            "packets": [
                {
                    "at": "from_net",
                    "packet": base64.b64encode(bytes(12) + b"\x08\x00" + syn).decode(),
                },
                {"at": "from_net", "packet": "AAAA"},
            ]
        },
    )
    assert status == 200
    assert answer["answers"][0]["verdict"] == 1 and answer["answers"][0]["targetKind"] == 1
    assert "error" in answer["answers"][1]


@pytest.mark.parametrize(
    ("uid", "netns", "status", "text"),
    [
        ("x", "/nowhere", 400, "no network namespace /nowhere"),
        ("far", "/proc/self/ns/net", 409, "spec.nodeName is 'two', not one"),
    ],
)
async def test_errors_of_one_pod_are_told_and_change_nothing(
    bed: Bed, uid: str, netns: str, status: int, text: str
) -> None:
    one = bed.nodes["one"]
    bed.supervisor.put(pod("far", "two"))
    found, answer = await one.call("POST", "/v1/endpoints", {"uid": uid, "netns": netns})
    assert found == status and text in answer["error"]
    assert (await one.call("GET", "/v1/status"))[1]["endpoints"] == []


async def test_a_pod_that_went_while_no_agent_ran_is_given_back(bed: Bed) -> None:
    one = bed.nodes["one"]
    bed.supervisor.put(pod("server", "one"))
    lease = await one.add("server")
    await one.kill()
    namespaces.delete(f"lg-{bed.cluster}-server")

    def sever() -> None:
        with namespaces.inside(namespaces.path_of(one.netns)):
            remove([lease["slot"]])

    await asyncio.to_thread(sever)
    await one.start()
    assert (await one.call("GET", "/v1/status"))[1]["endpoints"] == []
    assert not [n for n in bpf_links.links_in(str(one.pins / "links")) if n.startswith("from_pod")]
