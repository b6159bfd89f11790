"""Connections under way, while policies change and agents die."""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from lockgate.bpf import syscall
from lockgate.bpf.btf import Schema
from lockgate.bpf.pins import pin_names
from lockgate.cli.common import call
from lockgate.paths import bpf_object
from tests.system.harness import Cluster, connected, manifest, until
from tests.system.test_traffic import exchange, udp

# ---- Policies ------------------------------------------------------------------------------


def live_pod(name: str, node: str) -> str:
    ports = [{"containerPort": 8080, "protocol": p} for p in ("TCP", "UDP")]
    spec = {"nodeName": node, "containers": [{"name": "main", "ports": ports}]}
    return manifest("Pod", "live", name, spec, app=name)


def isolating(subject: str, direction: str) -> str:
    spec = {"podSelector": {"matchLabels": {"app": subject}}, "policyTypes": [direction]}
    return manifest("NetworkPolicy", "live", "isolate", spec)


def allowing(subject: str, direction: str, peer: str, name: str = "allow") -> str:
    word = "from" if direction == "Ingress" else "to"
    spec: dict[str, Any] = {
        "podSelector": {"matchLabels": {"app": subject}},
        "policyTypes": [direction],
        direction.lower(): [{word: [{"podSelector": {"matchLabels": {"app": peer}}}]}],
    }
    return manifest("NetworkPolicy", "live", name, spec)


@pytest.fixture(scope="module")
def live(traffic: Cluster) -> Iterator[Cluster]:
    """Namespace `live`: pods `client` and `near` on node-1, `far` on node-2; no policies."""
    traffic.save(
        "live.yaml",
        '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "live"}}',
        live_pod("client", "node-1"),
        live_pod("near", "node-1"),
        live_pod("far", "node-2"),
    )
    yield traffic
    traffic.save("live.yaml")


@pytest.fixture
def policies(live: Cluster) -> Iterator[Cluster]:
    yield live
    for path in live.folder.glob("policy-*.yaml"):
        path.unlink()
    live.wait()


# direction of the policy, server → who is isolated
CASES = {
    ("Ingress", "near"): "near",
    ("Ingress", "far"): "far",
    ("Egress", "near"): "client",
    ("Egress", "far"): "client",
}


@pytest.mark.parametrize("talks", ["client", "server"])
@pytest.mark.parametrize(("direction", "server"), CASES)
@pytest.mark.parametrize("family", [4, 6])
def test_a_connection_ends_with_the_policy_that_allowed_it(
    policies: Cluster, family: int, direction: str, server: str, talks: str
) -> None:
    """Whoever of the two talks first after the change."""
    cluster = policies
    subject = CASES[direction, server]
    peer = "client" if subject == server else server
    cluster.save("policy-isolate.yaml", isolating(subject, direction))
    cluster.save("policy-allow.yaml", allowing(subject, direction, peer))
    client, other = cluster.pod("live/client"), cluster.pod(f"live/{server}")
    with connected(client, other, other.ip(family), 0) as (near, far):
        exchange(near, far, 50_000)
        exchange(far, near, 50_000)
        # A policy about others changes nothing.
        cluster.save("policy-other.yaml", allowing("nobody", "Ingress", "anybody", "other"))
        exchange(near, far, 50_000)
        exchange(far, near, 50_000)
        cluster.save("policy-allow.yaml")
        port = near.getsockname()[1]
        first, second = (near, far) if talks == "client" else (far, near)
        for end in (first, second):
            end.sendall(b"still there?")
            until(lambda: denied(cluster, port), "a denial of the connection")
        for end in (near, far):
            end.setblocking(False)
            with pytest.raises(BlockingIOError):
                end.recv(100)
        # Both say it again and again; nothing gets through however often they try.
        until(lambda: len(denied(cluster, port)) >= 4, "denials of what is sent again")
        for end in (near, far):
            with pytest.raises(BlockingIOError):
                end.recv(100)


def denied(cluster: Cluster, port: int) -> list[dict[str, Any]]:
    return [
        flow
        for flow in cluster.flows(verdict="deny")
        if port in (flow["source"].get("port"), flow["destination"].get("port"))
    ]


@pytest.mark.parametrize("server", ["near", "far"])
def test_a_udp_exchange_ends_with_the_policy_that_allowed_it(
    policies: Cluster, server: str
) -> None:
    cluster = policies
    cluster.save("policy-isolate.yaml", isolating(server, "Ingress"))
    cluster.save("policy-allow.yaml", allowing(server, "Ingress", "client"))
    client, other = cluster.pod("live/client"), cluster.pod(f"live/{server}")
    with udp(client, 4) as near, udp(other, 4) as far:
        near.sendto(b"one", (other.ip(4), far.getsockname()[1]))
        _, sender = far.recvfrom(100)
        far.sendto(b"two", sender)
        assert near.recv(100) == b"two"
        cluster.save("policy-allow.yaml")
        far.sendto(b"three", sender)
        near.sendto(b"four", (other.ip(4), far.getsockname()[1]))
        until(lambda: denied(cluster, near.getsockname()[1]), "a denial")
        far.setblocking(False)
        with pytest.raises(BlockingIOError):
            far.recv(100)


# ---- Agents --------------------------------------------------------------------------------


class Stream:
    """A TCP connection that is never idle: numbered blocks with a digest, until stopped."""

    BLOCK = 4096

    def __init__(self, near: socket.socket, far: socket.socket) -> None:
        self.near, self.far = near, far
        self.sent = self.received = 0
        self.problem = ""
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._guard, args=(job,), daemon=True)
            for job in (self._send, self._receive)
        ]
        for thread in self._threads:
            thread.start()

    def _guard(self, job: Any) -> None:
        try:
            job()
        except Exception as error:
            self.problem = self.problem or repr(error)

    def _send(self) -> None:
        while not self._over.is_set():
            body = self.sent.to_bytes(8, "big") + os.urandom(self.BLOCK - 40)
            self.near.sendall(body + hashlib.sha256(body).digest())
            self.sent += 1
        self.near.shutdown(socket.SHUT_WR)

    def _receive(self) -> None:
        buffer = bytearray()
        while part := self.far.recv(1 << 16):
            buffer += part
            while len(buffer) >= self.BLOCK:
                block, buffer = bytes(buffer[: self.BLOCK]), buffer[self.BLOCK :]
                body, digest = block[:-32], block[-32:]
                assert hashlib.sha256(body).digest() == digest, "bytes were changed"
                assert int.from_bytes(body[:8], "big") == self.received, "a block is missing"
                self.received += 1

    def stop(self) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(10)
        assert not self.problem, self.problem
        assert not any(thread.is_alive() for thread in self._threads), "it hangs"
        assert self.received == self.sent


def may_connect(cluster: Cluster, client: str, server: str) -> bool:
    with cluster.pod(client).socket() as near:
        near.settimeout(0.3)
        try:
            near.connect((cluster.pod(server).ip(4), 8080))
        except TimeoutError:
            return False
        return True


def pinned_maps(cluster: Cluster, node: str) -> dict[str, int]:
    """The kernel's id of each map that the node's agent has pinned."""
    found = {}
    for name, pin in pin_names(Schema.from_object(bpf_object())).items():
        fd = syscall.obj_get(str(cluster.state.pins() / node / pin))
        found[name] = syscall.map_info(fd).id
        os.close(fd)
    return found


def agent_of(cluster: Cluster, node: str) -> dict[str, Any]:
    found = next(one for one in cluster.status()["nodes"] if one["name"] == node)
    agent = found["agent"]
    assert isinstance(agent, dict)
    return agent


def test_connections_and_verdicts_outlive_a_killed_agent(policies: Cluster) -> None:
    cluster = policies
    cluster.save("policy-isolate.yaml", isolating("near", "Ingress"))
    cluster.save("policy-allow.yaml", allowing("near", "Ingress", "client"))
    client = cluster.pod("live/client")
    running: list[Stream] = []
    ends: list[Any] = []
    for name in ("live/near", "live/far", "outside"):
        server = cluster.outside() if name == "outside" else cluster.pod(name)
        address = cluster.outside_ip() if name == "outside" else cluster.pod(name).ip(4)
        context = connected(client, server, address, 0)
        running.append(Stream(*context.__enter__()))
        ends.append(context)
    before = {node: cluster.agent_status(node) for node in cluster.node_names}
    maps = {node: pinned_maps(cluster, node) for node in cluster.node_names}
    observers = {one["name"]: one["observer"]["pid"] for one in cluster.status()["nodes"]}
    pids = {node: agent_of(cluster, node)["pid"] for node in cluster.node_names}
    for pid in pids.values():
        os.kill(pid, signal.SIGKILL)
    # While no agent runs, and while new ones take over, verdicts are as they were.
    asked = 0
    while not all(back(cluster, node, pids) for node in cluster.node_names) or asked < 2:
        assert may_connect(cluster, "live/client", "live/near")
        assert not may_connect(cluster, "live/far", "live/near")
        asked += 1
    cluster.wait()
    counts = [one.received for one in running]
    until(
        lambda: all(s.received > c + 50 or s.problem for s, c in zip(running, counts, strict=True)),
        "traffic with the new agents",
    )
    for one in running:
        one.stop()
    for context in ends:
        context.__exit__(None, None, None)
    for node, status in before.items():
        after = cluster.agent_status(node)
        assert after["epoch"] in (status["epoch"], status["epoch"] + 1)
        assert pinned_maps(cluster, node) == maps[node], "taken over, none made anew"
    # The observers went on.
    assert observers == {one["name"]: one["observer"]["pid"] for one in cluster.status()["nodes"]}
    with client.socket() as near:
        near.connect((cluster.pod("live/near").ip(4), 8080))
        port = near.getsockname()[1]
        until(
            lambda: any(f["source"].get("port") == port for f in cluster.flows("node-1")),
            "a record of a connection made after",
        )
    # And the new agents follow what is saved.
    cluster.save("policy-allow.yaml")
    assert not may_connect(cluster, "live/client", "live/near")


def test_a_killed_observer_leaves_nothing_unread(policies: Cluster) -> None:
    cluster = policies
    cluster.save("policy-isolate.yaml", isolating("near", "Ingress"))
    cluster.save("policy-allow.yaml", allowing("near", "Ingress", "client"))
    [observer] = [one["observer"] for one in cluster.status()["nodes"] if one["name"] == "node-1"]
    os.kill(observer["pid"], signal.SIGSTOP)
    client, ports = cluster.pod("live/client"), set()
    for _ in range(20):
        with client.socket() as near:
            near.connect((cluster.pod("live/near").ip(4), 8080))
            ports.add(near.getsockname()[1])
    os.kill(observer["pid"], signal.SIGKILL)

    def told() -> bool:
        with contextlib.suppress(Exception):  # nobody listens yet
            flows = cluster.flows("node-1", pod="live/client")
            return ports <= {flow["source"].get("port") for flow in flows}
        return False

    until(told, "records of what was connected while it did not read", deadline=20)
    status = call(cluster.state.observer("node-1"), "GET", "/v1/status")
    assert status["lost"] == 0
    cluster.save("policy-allow.yaml")


def back(cluster: Cluster, node: str, pids: dict[str, int]) -> bool:
    agent = agent_of(cluster, node)
    if not agent["up"] or agent["pid"] == pids[node]:
        return False
    try:
        return bool(cluster.agent_status(node)["epoch"])
    except OSError:
        return False
