"""No connection breaks, whatever happens to the balancers in front of it, and none keeps a state.

Three nodes balance; what they remember of flows is switched off. The world's routers spread 1,000
connections over them, change their minds in the middle, and nodes, agents and backends come and
go. On each connection messages are answered with the digest of all that was sent on it so far, so
that a byte that is lost, or another server, would show.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import random
import signal
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from lockgate.access import Refused
from tests.system.harness import Cluster, need_root, unique_name
from tests.system.test_cluster import document, pod

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

CONNECTIONS = 1000
TARGET = 9000
NODES = ("a", "b", "c")
#: Messages on each connection that must be answered after each event.
ROUNDS = 2
PATIENCE = 60.0
#: Backends in the beginning; c is a balancer and nothing else. With those that come later they are
#: more than 16: numbers of owners take more bits in the tables' slots.
FIRST = {f"web-{n}": "ab"[n % 2] for n in range(15)}
LATER = {"web-15": "a", "web-16": "b"}


def backend(name: str, node: str) -> str:
    """Ready while the test listens; when it is deleted it takes its time to end."""
    spec = {
        "nodeName": node,
        "terminationGracePeriodSeconds": 600,
        "containers": [
            {
                "name": "main",
                "command": ["/bin/sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
                "readinessProbe": {
                    "tcpSocket": {"port": TARGET},
                    "periodSeconds": 1,
                    "failureThreshold": 30,
                },
            }
        ],
    }
    return pod(name, spec, app="web")


SERVICE = document(
    "Service",
    "web",
    spec={
        "type": "LoadBalancer",
        "selector": {"app": "web"},
        "ipFamilyPolicy": "PreferDualStack",
        "ports": [{"port": 80, "targetPort": TARGET}],
    },
)


@pytest.fixture(params=["auto", "off"], ids=["xdp", "tcx"])
def cluster(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Cluster]:
    folder = tmp_path / "manifests"
    folder.mkdir()
    for name in NODES:
        (folder / f"node-{name}.yaml").write_text(document("Node", name))
    (folder / "web.yaml").write_text("---\n".join((document("Namespace", "lab"), SERVICE)))
    options = ("--no-flows", "--xdp", request.param)
    with Cluster(folder, unique_name("tb"), options=options) as made:
        yield made


class Servers:
    """What listens in the backends: answers each message with the digest of the connection."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._running: list[asyncio.Server] = []
        #: Who has which client, by the client's address and port.
        self.served: dict[tuple[str, int], str] = {}

    async def start(self, *names: str) -> None:
        for name in names:
            place = self._cluster.pod(f"lab/{name}")
            listener = await asyncio.to_thread(place.socket, socket.AF_INET6)
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
            listener.bind(("::", TARGET))
            listener.listen(CONNECTIONS)
            listener.setblocking(False)

            async def serve(
                reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str = name
            ) -> None:
                with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                    await self._serve(reader, writer, name)
                writer.close()

            self._running.append(await asyncio.start_server(serve, sock=listener))

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str
    ) -> None:
        host, port = writer.get_extra_info("peername")[:2]
        digest = hashlib.sha256()
        while True:
            size = int.from_bytes(await reader.readexactly(4), "big")
            self.served[host.removeprefix("::ffff:"), port] = name
            digest.update(await reader.readexactly(size))
            writer.write(digest.digest())
            await writer.drain()

    async def stop(self) -> None:
        for one in self._running:
            one.close()


class Client:
    """One connection, on which messages go to and fro until `done`."""

    def __init__(self, number: int, wire: socket.socket, address: str) -> None:
        self._number, self._wire, self._address = number, wire, address
        self.rounds = 0
        self.own = ("", 0)
        self.task: asyncio.Task[None] | None = None

    async def open(self) -> None:
        loop = asyncio.get_running_loop()
        self._wire.setblocking(False)
        await asyncio.wait_for(loop.sock_connect(self._wire, (self._address, 80)), PATIENCE)
        host, port = self._wire.getsockname()[:2]
        self.own = host, port
        self._reader, self._writer = await asyncio.open_connection(sock=self._wire)
        self._digest = hashlib.sha256()
        self._random = random.Random(self._number)

    async def exchange(self) -> None:
        """One message; some are of several full packets."""
        size = self._random.choice((1, 100, 100, 100, 5000))
        data = self._random.randbytes(size)
        self._digest.update(data)
        self._writer.write(size.to_bytes(4, "big") + data)
        answer = await asyncio.wait_for(self._reader.readexactly(32), PATIENCE)
        assert answer == self._digest.digest(), f"connection {self._number} of {self._address}"
        self.rounds += 1

    async def talk(self) -> None:
        while True:
            await self.exchange()
            await asyncio.sleep(0.2 + self._random.random() / 5)

    async def close(self) -> None:
        if self.task is not None:
            self.task.cancel()
        self._writer.close()


class World:
    """The clients, and the events."""

    def __init__(self, cluster: Cluster, servers: Servers) -> None:
        self.cluster, self.servers = cluster, servers
        self.clients: list[Client] = []
        (told,) = cluster.objects("services")
        ingress = told["status"]["loadBalancer"]["ingress"]
        self.addresses = [one["ip"] for one in ingress]
        assert len(self.addresses) == 2
        self._outside = cluster.outside()

    async def connect(self, count: int) -> list[Client]:
        """So many more clients, half of them by IPv6."""
        made = []
        for number in range(len(self.clients), len(self.clients) + count):
            address = self.addresses[number % 2]
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            wire = await asyncio.to_thread(self._outside.socket, family)
            made.append(Client(number, wire, address))
        self.clients += made
        for part in range(0, count, 100):
            await asyncio.gather(*(one.open() for one in made[part : part + 100]))
        for one in made:
            await one.exchange()
            one.task = asyncio.create_task(one.talk())
        return made

    async def go_on(self) -> None:
        """Every connection has answers to what was sent after this."""
        wanted = [(one, one.rounds + ROUNDS) for one in self.clients]
        end = time.monotonic() + PATIENCE
        while behind := [one for one, rounds in wanted if one.rounds < rounds]:
            for one in self.clients:
                assert one.task is not None
                if one.task.done():
                    one.task.result()  # says what broke it
            assert time.monotonic() < end, f"{len(behind)} connections stand still"
            await asyncio.sleep(0.05)

    def backends(self, clients: list[Client]) -> Counter[str]:
        return Counter(self.servers.served[one.own] for one in clients)

    def spread(self, *numbers: int) -> None:
        """The routers' next hops from now on: nodes by number."""
        for net, family, prefix in (
            ("172.31.255.0/24", "-4", "172.31.0."),
            ("fd00:172:31:255::/64", "-6", "fd00:172:31::"),
        ):
            hops = [f"nexthop via {prefix}{10 + n} dev br0".split() for n in numbers]
            self._outside.run(
                "ip", family, "route", "replace", net, *(word for hop in hops for word in hop)
            )

    def balanced(self) -> dict[str, int]:
        """Packets that XDP sent on, by node."""
        nodes = self.cluster.node_names
        return {name: self.cluster.agent_status(name)["balanced"] for name in nodes}


@contextlib.asynccontextmanager
async def world(cluster: Cluster) -> AsyncIterator[World]:
    servers = Servers(cluster)
    for name, node in FIRST.items():
        cluster.save(f"{name}.yaml", backend(name, node), wait=False)
    await listen(cluster, servers, *FIRST)
    made = World(cluster, servers)
    try:
        yield made
    finally:
        for one in made.clients:
            with contextlib.suppress(Exception):
                await one.close()
        await servers.stop()


async def listen(cluster: Cluster, servers: Servers, *names: str) -> None:
    """Answer in pods that are starting, and wait until they are ready."""
    for name in names:
        await patiently(lambda name=name: cluster.pod(f"lab/{name}"))
    await servers.start(*names)
    await patiently(lambda: conditions(cluster, names, ready=True))
    await in_force(cluster)


async def patiently(what: Any) -> Any:
    end = time.monotonic() + PATIENCE
    while True:
        try:
            return await asyncio.to_thread(what)
        except (AssertionError, OSError, KeyError, Refused):
            if time.monotonic() > end:
                raise
            await asyncio.sleep(0.05)


async def drain(cluster: Cluster, *names: str) -> None:
    """Delete pods; they go on serving until their grace ends."""
    for name in names:
        cluster.save(f"{name}.yaml", wait=False)
    await patiently(lambda: conditions(cluster, names, serving=True, terminating=True))
    await in_force(cluster)


def conditions(cluster: Cluster, names: Iterable[str], **wanted: bool) -> None:
    """The endpoints of these pods, of both families, have these conditions."""
    found = Counter(
        one["targetRef"]["name"]
        for piece in cluster.objects("endpoints")
        for one in piece["endpoints"]
        if wanted.items() <= one["conditions"].items()
    )
    assert all(found[name] == 2 for name in names), found


async def in_force(cluster: Cluster) -> None:
    """Every agent has applied what the supervisor knows."""

    def applied() -> None:
        revision = cluster.status()["revision"]
        for name in cluster.node_names:
            assert cluster.agent_status(name)["applied"] >= revision

    await patiently(applied)


async def test_no_connection_breaks(cluster: Cluster) -> None:
    async with world(cluster) as here:
        await here.connect(CONNECTIONS)
        await here.go_on()
        first = here.backends(here.clients)
        assert set(first) == set(FIRST), "all backends serve"
        modes = {one["mode"] for n in NODES for one in cluster.agent_status(n)["xdp"]}
        balanced = here.balanced()
        if modes & {"native", "generic"}:
            assert min(balanced.values()) > 0, "each node is a balancer"
        else:
            assert not any(balanced.values())

        # The routers hash anew: most connections come by another balancer.
        here.spread(1, 2)
        await here.go_on()
        here.spread(3, 2, 1)
        await here.go_on()

        # Backends end, and go on with what they have.
        await drain(cluster, "web-0", "web-3")
        await here.go_on()
        for name, node in LATER.items():
            cluster.save(f"{name}.yaml", backend(name, node), wait=False)
        await listen(cluster, here.servers, *LATER)
        await in_force(cluster)
        await here.go_on()
        fresh = await here.connect(60)
        assert set(here.backends(fresh)) <= {*FIRST, *LATER} - {"web-0", "web-3"}
        assert set(here.backends(fresh)) & set(LATER)

        # An agent is killed; its node works on, and the next one takes it over.
        agent = cluster.status()["nodes"][1]["agent"]
        os.kill(agent["pid"], signal.SIGKILL)
        await here.go_on()
        await in_force(cluster)
        here.spread(2, 3)
        await here.go_on()

        # One more ends, and a balancer is switched off.
        await drain(cluster, "web-4")
        here.spread(1, 2)
        cluster.save("node-c.yaml", wait=False)
        await patiently(lambda: gone(cluster, "c"))
        await here.go_on()

        for one in here.clients:
            assert one.task is not None and not one.task.done()
        assert here.backends(here.clients[:CONNECTIONS]) == first, "nobody moved"


def gone(cluster: Cluster, node: str) -> None:
    assert node not in cluster.node_names
