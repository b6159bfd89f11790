"""The agent as a process with an API server as its source: what it writes back and answers when."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from lockgate.bpf import links as bpf_links
from lockgate.net import namespaces
from lockgate.net.links import Net
from tests.apiserver import ApiServer

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

ROOT = Path(__file__).resolve().parents[2]
DEADLINE = 60.0  # includes back-off
OF_A_FILE = "0123456789abcdef0123456789abcdef"


async def until(condition: Callable[[], Awaitable[Any]]) -> Any:
    async with asyncio.timeout(DEADLINE):
        while not (value := await condition()):
            await asyncio.sleep(0.02)
        return value


class Node:
    """A node with nothing but loopback, the API server there, and an agent."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cluster = f"k{os.getpid() % 100000}"
        self.netns = f"lg-{self.cluster}-one"
        self.path = namespaces.create(self.netns)
        self.pins = Path("/sys/fs/bpf/lockgate", self.cluster)
        self.server = ApiServer()
        self.process: asyncio.subprocess.Process | None = None

    async def start(self, **settings: Any) -> None:
        config = {
            "cluster": self.cluster,
            "netns": self.netns,
            "stateDir": str(self.folder / "state"),
            "runDir": str(self.folder / "run"),
            "kubernetes": {"apiServer": f"http://127.0.0.1:{self.server.port}"},
            "web": "127.0.0.1:9781",
            "underlay": "",
            "outside": "",
            **settings,
        }
        path = self.folder / "agent.json"
        path.write_text(json.dumps(config))
        command = [sys.executable, "-m", "lockgate.agent", "--config", str(path)]
        with open(self.folder / "agent.log", "ab") as log:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                cwd=ROOT,
                stdout=log,
                stderr=log,
                env={**os.environ, "NODE_NAME": "one"},
            )
        await until(self.status)

    async def stop(self) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(signal.SIGTERM)
            await self.process.wait()

    async def call(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """(status, answer) of the agent's socket."""
        connector = aiohttp.UnixConnector(str(self.folder / "run" / "agent.sock"))
        async with aiohttp.ClientSession(connector=connector) as session:
            async with session.request(method, f"http://agent{path}", json=body) as response:
                return response.status, await response.json()

    async def status(self) -> Any:
        assert self.process is not None
        assert self.process.returncode is None, (self.folder / "agent.log").read_text()
        try:
            return (await self.call("GET", "/v1/status"))[1]
        except (OSError, aiohttp.ClientError):
            return None

    def page(self, path: str) -> tuple[int, str]:
        """A page of port 9781, asked for in the node's namespace."""
        found: list[tuple[int, str]] = []

        async def ask() -> None:
            async with aiohttp.ClientSession() as session:
                async with session.get(f"http://127.0.0.1:9781{path}") as response:
                    found.append((response.status, await response.text()))

        def work() -> None:
            with namespaces.inside(self.path):
                asyncio.run(ask())

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        return found[0]

    async def fetch(self, path: str) -> tuple[int, str]:
        return await asyncio.to_thread(self.page, path)


def pod(name: str, ip: str, node: str = "two") -> dict[str, Any]:
    return {
        "kind": "Pod",
        "metadata": {"name": name, "namespace": "shop", "uid": f"uid-{name}"},
        "spec": {"nodeName": node, "containers": []},
        "status": {"phase": "Running", "podIPs": [{"ip": ip}]},
    }


def mirror(name: str, uid: str, claimed: str = OF_A_FILE, node: str = "one") -> dict[str, Any]:
    """As the kubelet of `node` writes it for a static pod."""
    static = pod(name, "", node)
    static["metadata"] |= {
        "uid": uid,
        "annotations": {"kubernetes.io/config.mirror": claimed},
        "ownerReferences": [{"kind": "Node", "name": node, "uid": "n", "controller": True}],
    }
    static["status"] = {"phase": "Pending"}
    return static


@pytest.fixture
async def node(tmp_path: Path) -> AsyncIterator[Node]:
    made = Node(tmp_path)

    def up() -> None:
        with namespaces.inside(made.path), Net() as net:
            net._ip.link("set", index=1, state="up")
            net._ip.addr("add", index=1, address="192.168.78.1", prefixlen=32)

    await asyncio.to_thread(up)
    spec = {"podCIDRs": ["10.78.1.0/24"]}
    addresses = [{"type": "InternalIP", "address": "192.168.78.1"}]
    made.server.put(
        {"kind": "Namespace", "metadata": {"name": "shop"}},
        {
            "kind": "Node",
            "metadata": {"name": "one", "uid": "node-uid"},
            "spec": spec,
            "status": {"addresses": addresses},
        },
        pod("a", "10.78.2.2"),
    )
    await made.server.start(netns=made.path)
    try:
        yield made
    finally:
        await made.stop()
        print((tmp_path / "agent.log").read_text())
        await made.server.stop()
        for name in bpf_links.links_in(str(made.pins / "one" / "links")):
            bpf_links.remove(str(made.pins / "one" / "links" / name))
        shutil.rmtree(made.pins, ignore_errors=True)
        namespaces.delete(made.netns)


async def test_what_is_written_back(node: Node) -> None:
    held = node.server.hold["NetworkPolicy"] = asyncio.Event()
    bad = {"podSelector": {"matchExpressions": [{"key": "a", "operator": "Sometimes"}]}}
    node.server.put(
        {
            "kind": "NetworkPolicy",
            "metadata": {"name": "odd", "namespace": "shop", "uid": "uid-odd"},
            "spec": bad,
        }
    )
    await node.start()
    assert (await node.fetch("/healthz"))[0] == 200
    status, text = await node.fetch("/readyz")
    assert status == 503 and "nothing is in force yet" in text
    assert node.server.patches == []
    held.set()

    async def ready() -> bool:
        return (await node.fetch("/readyz"))[0] == 200

    await until(ready)
    assert (await node.status())["counts"]["peers"] == 2  # a pod, and the node

    async def told() -> bool:
        return bool(node.server.patches and node.server.created)

    await until(told)
    name, patch = node.server.patches[0]
    condition = patch["status"]["conditions"][0]
    assert name == "one" and condition["type"] == "NetworkUnavailable"
    assert condition["status"] == "False" and condition["reason"] == "LockgateIsUp"
    event = node.server.created[0]
    assert event["reason"] == "ObjectUnreadable" and "operator" in event["note"]
    assert event["regarding"]["kind"] == "NetworkPolicy" and event["regarding"]["name"] == "odd"
    assert event["regarding"]["uid"] == "uid-odd"


@pytest.mark.parametrize("status", ["True", ""], ids=["said otherwise", "taken away"])
async def test_the_nodes_condition_is_put_right_and_then_left_alone(
    node: Node, status: str
) -> None:
    def conditions() -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = node.server.objects["Node"]["", "one"]["status"]["conditions"]
        return found

    await node.start()

    async def written() -> bool:
        return bool(node.server.patches)

    await until(written)
    assert [one["status"] for one in conditions()] == ["False"]
    me = node.server.objects["Node"]["", "one"]
    others = [{"type": "Ready", "status": "True"}]
    if status:
        others.append({"type": "NetworkUnavailable", "status": status})
    node.server.put({**me, "status": {**me["status"], "conditions": others}})

    async def right() -> bool:
        return {"NetworkUnavailable": "False"}.items() <= {
            one["type"]: one["status"] for one in conditions()
        }.items()

    await until(right)
    assert len(node.server.patches) == 2


async def test_events_are_of_the_objects_that_kubectl_describes(node: Node) -> None:
    """It looks for an object's uid, and for a node's name."""
    service = {"kind": "Service", "metadata": {"name": "s", "namespace": "shop", "uid": "uid-s"}}
    service["spec"] = {"clusterIPs": ["10.96.0.7"], "ports": [{"port": "eighty"}]}
    me = node.server.objects["Node"]["", "one"]
    node.server.put(me | {"spec": {}}, pod("full", "", "one"), service)
    await node.start(underlay="nothing0")
    inside = f"lg-{node.cluster}-full"
    netns = namespaces.create(inside)
    try:
        body = {"uid": "uid-full", "netns": str(netns)}
        assert (await node.call("POST", "/v1/endpoints", body))[0] >= 400
    finally:
        namespaces.delete(inside)
    expected = {
        ("NoAddress", "Pod", "full", "uid-full"),
        ("ObjectUnreadable", "Service", "s", "uid-s"),
        ("NoWay", "Node", "one", "one"),
    }

    async def told() -> bool:
        about = [(one["reason"], one["regarding"]) for one in node.server.created]
        return expected <= {(why, who["kind"], who["name"], who["uid"]) for why, who in about}

    await until(told)


async def test_an_api_server_that_is_away(node: Node) -> None:
    await node.start()

    async def in_force() -> bool:
        return bool((await node.status())["applied"])

    await until(in_force)
    epoch = (await node.status())["epoch"]
    await node.server.stop()

    async def says_so() -> bool:
        return any("API server away since" in e for e in (await node.status())["errors"])

    await until(says_so)
    # An agent that starts meanwhile has the snapshot, and changes nothing.
    await node.stop()
    await node.start()

    async def from_snapshot() -> bool:
        return any("working with a snapshot" in e for e in (await node.status())["errors"])

    await until(from_snapshot)
    status = await node.status()
    assert status["epoch"] == epoch and status["counts"]["peers"] == 2
    assert (await node.fetch("/readyz"))[0] == 200
    node.server.put(pod("b", "10.78.2.3"))
    await node.server.start(netns=node.path)

    async def caught_up() -> bool:
        status = await node.status()
        return bool(status["connected"] and status["counts"]["peers"] == 3)

    await until(caught_up)
    assert (await node.status())["epoch"] == epoch + 1, "one change, and no flap"
    assert (await node.status())["errors"] == []


async def test_a_static_pod_outlives_the_object_that_mirrors_it(node: Node) -> None:
    """As `kubectl delete pod` leaves it: the kubelet makes another object, and no other pod."""

    await node.start()
    inside = f"lg-{node.cluster}-static"
    netns = namespaces.create(inside)
    try:
        node.server.put(mirror("static", "first"))
        body = {"uid": OF_A_FILE, "netns": str(netns)}
        status, wired = await node.call("POST", "/v1/endpoints", body)
        assert status == 200, wired
        node.server.delete("Pod", "shop", "static")
        node.server.put(mirror("static", "second"), pod("later", "10.78.2.4"))

        async def seen() -> bool:
            return (await node.status())["counts"]["peers"] == 4

        await until(seen)
        (lease,) = (await node.status())["endpoints"]
        assert lease["uid"] == OF_A_FILE
        assert (await node.call("POST", "/v1/endpoints", body))[1] == wired
        assert (await node.call("DELETE", f"/v1/endpoints/{OF_A_FILE}"))[0] == 200
    finally:
        namespaces.delete(inside)


@pytest.mark.parametrize("uid", ["f7b7a3f4-0d0c-4a5b-8f0e-3f1d2c4b5a69", OF_A_FILE])
@pytest.mark.parametrize("on", ["one", "two"])
async def test_who_claims_a_pods_uid_takes_nothing_from_it(node: Node, uid: str, on: str) -> None:
    """`uid` is a pod's of the API server's, or a static pod's, and wired; then somebody with
    pods/create claims it, and goes again."""
    await node.start()
    inside = f"lg-{node.cluster}-db"
    netns = namespaces.create(inside)
    static = uid == OF_A_FILE
    try:
        true = mirror("db", "first") if static else pod("db", "", "one")
        if not static:
            true["metadata"]["uid"] = uid
        node.server.put(true)
        body = {"uid": uid, "netns": str(netns)}
        status, wired = await node.call("POST", "/v1/endpoints", body)
        assert status == 200, wired
        before = (await node.status())["endpoints"]
        forged = mirror("a-forged", "forged", uid, on)
        node.server.put(forged, pod("b", "10.78.2.5"))

        async def seen(peers: int) -> bool:
            return bool((await node.status())["counts"]["peers"] == peers)

        await until(lambda: seen(4))
        refused = [text for text in (await node.status())["errors"] if "a-forged" in text]
        assert ["Pod shop/db's, which keeps it" in text for text in refused] == [True] * static
        assert (await node.status())["endpoints"] == before
        assert (await node.call("POST", "/v1/endpoints", body)) == (200, wired)
        node.server.delete("Pod", "shop", "a-forged")
        node.server.put(pod("c", "10.78.2.6"))
        await until(lambda: seen(5))
        assert (await node.status())["errors"] == []
        assert (await node.status())["endpoints"] == before
        assert (await node.call("POST", "/v1/endpoints", body)) == (200, wired)
        assert (await node.call("DELETE", f"/v1/endpoints/{uid}"))[0] == 200
    finally:
        namespaces.delete(inside)


async def test_metrics_are_those_of_the_docs(node: Node) -> None:
    await node.start()
    status, text = await node.fetch("/metrics")
    assert status == 200
    found = set(re.findall(r"^# TYPE (lockgate_\w+)", text, re.M))
    found = {re.sub(r"_created$", "", name) for name in found}
    page = (ROOT / "docs" / "metrics.md").read_text().partition("\n## Agent\n")[2]
    page = page.replace("`…_skipped`", "`lockgate_api_objects_skipped`")
    rows = "\n".join(line.split("|")[1] for line in page.splitlines() if line.startswith("|"))
    documented = set(re.findall(r"lockgate_\w+", rows))
    assert found == documented
