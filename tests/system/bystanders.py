"""Two nodes' pods and the world at work while something is done to the nodes: directly, by a
service at the socket and by each packet, through masquerade, over both families; and the account
of it all by the nodes' own flow records."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

from lockgate.net import cgroup, namespaces
from lockgate.net.links import Net
from tests.system.account import Begun, Pod, Reader, differences, reading
from tests.system.agents import Bed, make_bed, pod, policy, with_ips
from tests.system.harness import Place
from tests.system.load import BELL, SERVED, Client, Connection, Server, Stream, Way, Worker

__all__ = ["FICKLE_TOO", "ONLY_OK", "Traffic", "at_work", "rules"]

Sockets = Callable[[int, int], socket.socket]

# Pod: node, label. `server` is isolated: it lets in only `ok`, and may begin nothing, so that what
# it says passes as a reply or not at all. `fickle` comes and goes.
PODS = {
    "server": ("one", "server"),
    "near": ("one", "ok"),
    "far": ("two", "ok"),
    "foreign": ("one", "no"),
    "stranger": ("two", "no"),
    "fickle": ("two", "fickle"),
}
OUTSIDE = "outside"  # the world: it asks and answers, over both families
WORLD = {"one": ("198.18.1.1", "fd18:1::1"), "two": ("198.18.2.1", "fd18:2::1")}
SERVICE = ("10.96.0.7", "fd96::7")
ONLY_OK: dict[str, Any] = {
    "from": [
        {"podSelector": {"matchLabels": {"app": "ok"}}},
        {"ipBlock": {"cidr": f"{WORLD['one'][0]}/32"}},
    ]
}
FICKLE_TOO: dict[str, Any] = {"from": [{"podSelector": {"matchLabels": {"app": "fickle"}}}]}


class Traffic:
    """All pods of PODS and the world, at work. `mixed`: programs of two versions run at a moment.
    A connection that begins then by a translation of packets may break, when its first reply
    comes to one that does not know the translation (docs/cluster.md, the mixed moment): none does
    then, but those that began before go on."""

    def __init__(
        self, bed: Bed, ips: dict[str, tuple[str, str]], readers: Sequence[Reader], mixed: bool
    ) -> None:
        self.bed, self.ips, self._readers, self._mixed = bed, ips, readers, mixed
        self._pods = {ip: Pod(name, PODS[name][0]) for name, both in ips.items() for ip in both}
        self.server, self.world = Server(self._netns("server")), Server(self._netns(OUTSIDE))
        self._places: list[Place] = []
        four, six = ips["server"]
        near, far, world = self._sockets("near"), self._sockets("far"), self._sockets(OUTSIDE)
        by_near = [*self._server(near), self._service(self._sockets("near", hook=True), 4)]
        by_far = [*self._server(far), self._service(self._sockets("far", hook=True), 6)]
        if not mixed:
            by_near += [self._service(near, 6), *self._world(near, "one")]
            by_far += [self._service(far, 4), *self._world(far, "two")]
        self.workers: list[Worker] = [
            Stream("stream of near", Way(near, four)),
            Stream("stream of near to the service", self._service(near, 6)),
            Stream("stream of far", Way(far, six)),
            Stream("stream of far to the world", Way(far, WORLD["two"][0])),
            Client("near", by_near, True),
            Client("far", by_far, True),
            Client("foreign", self._server(self._sockets("foreign")), False),
            Client("stranger", self._server(self._sockets("stranger")), False),
            Client("fickle", self._server(self._sockets("fickle")), None),
            Client("the world, let in", [Way(world, four)], True),
            Client("the world, kept out", [Way(world, six)], False),
        ]
        self.quiet: dict[socket.socket, Connection] = {}
        for way in (Way(near, six, BELL), Way(far, four, BELL)):
            sock = way.socket(socket.SOCK_STREAM, 10)
            sock.connect((way.address, way.port))
            self.quiet[sock] = way.connection(sock)
        self.server.expect(len(self.quiet))
        for worker in self.workers:
            worker.start()

    def _sockets(self, pod: str, hook: bool = False) -> Sockets:
        """Makes sockets of a pod; `hook`: below the node's cgroup, where connect() is seen."""
        netns = self._netns(pod)
        if hook:
            folder = cgroup.create(self.bed.nodes[PODS[pod][0]].cgroup / pod)
            self._places.append(Place(netns, folder))
            return self._places[-1].socket

        def make(family: int, kind: int) -> socket.socket:
            with namespaces.inside(netns):
                return socket.socket(family, kind)

        return make

    def _server(self, sockets: Sockets) -> list[Way]:
        return [Way(sockets, ip) for ip in self.ips["server"]]

    def _service(self, sockets: Sockets, family: int) -> Way:
        number = (4, 6).index(family)
        return Way(sockets, SERVICE[number], 80, (self.ips["server"][number], SERVED))

    @staticmethod
    def _world(sockets: Sockets, node: str) -> list[Way]:
        return [Way(sockets, ip) for ip in WORLD[node]]

    async def rings(self) -> None:
        """The server, which may begin nothing, speaks first on connections that are silent."""
        self.server.ring()
        for sock in self.quiet:
            assert await asyncio.to_thread(sock.recv, 1) == b"!"

    def _netns(self, pod: str) -> Path:
        return namespaces.path_of(f"lg-{self.bed.cluster}-{pod}")

    @property
    def wrong(self) -> list[str]:
        found = [text for worker in self.workers for text in worker.wrong]
        kept_out = [*self.ips["foreign"], *self.ips["stranger"], WORLD["one"][1]]
        return found + [
            f"{ip} is denied and reached the server" for ip in kept_out if self.server.seen[ip]
        ]

    @property
    def masked(self) -> list[str]:
        """Pods' own addresses that the world has seen."""
        return sorted(set(self.world.seen) & {ip for ips in self.ips.values() for ip in ips})

    @property
    def begun(self) -> list[Begun]:
        made = [
            Begun(connection, times, worker.allowed)
            for worker in self.workers
            for connection, times in worker.begun.items()
        ]
        return made + [Begun(connection, 1, True) for connection in self.quiet.values()]

    async def ask_as_fickle(self) -> None:
        """Each of the server's addresses once, now that it is allowed for good."""
        ways = self._server(self._sockets("fickle"))
        client = Client("fickle, allowed", ways, True)
        self.workers.append(client)
        for _ in ways:
            await asyncio.to_thread(client.turn)

    async def end(self) -> None:
        for worker in self.workers:
            await asyncio.to_thread(worker.end)
        for worker in self.workers:
            print(worker.name, dict(worker.counts))
        await self.rings()
        assert not self.wrong, "\n".join(self.wrong)
        assert not self.masked, "\n".join(self.masked)
        for worker in self.workers:
            assert sum(worker.counts.values()) > 0, f"{worker.name} did nothing"

    def account(self) -> list[str]:
        """After the end: what flow records and connections do not agree in."""
        records: list[dict[str, Any]] = []
        lost = 0
        for reader in self._readers:
            told, not_told = reader.end()
            records += told
            lost += not_told
        begun = self.begun
        print(len(begun), "connections,", len(records), "records,", lost, "lost")
        return differences(self._pods, begun, records, lost, self._mixed)

    def close(self) -> None:
        for worker in self.workers:
            worker.cancel()
        for sock in self.quiet:
            sock.close()
        for server in (self.server, self.world):
            server.close()
        for place in self._places:
            place.close()


def rules(*ingress: dict[str, Any]) -> dict[str, Any]:
    made = policy("only-ok", list(ingress))
    made["spec"]["policyTypes"].append("Egress")
    return made


def service(ips: tuple[str, str]) -> list[dict[str, Any]]:
    """`web`, whose one backend is the server."""
    ports = [(protocol, protocol.lower()) for protocol in ("TCP", "UDP")]
    meta = {"namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}}
    front = [
        {"port": 80, "targetPort": SERVED, "protocol": protocol, "name": name}
        for protocol, name in ports
    ]
    back = [{"port": SERVED, "protocol": protocol, "name": name} for protocol, name in ports]
    return [
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "web", "namespace": "shop"},
            "spec": {"clusterIP": SERVICE[0], "clusterIPs": list(SERVICE), "ports": front},
        },
        *(
            {
                "apiVersion": "discovery.k8s.io/v1",
                "kind": "EndpointSlice",
                "metadata": {**meta, "name": f"web-{family.lower()}"},
                "addressType": family,
                "endpoints": [{"addresses": [ip], "conditions": {"ready": True}}],
                "ports": back,
            }
            for family, ip in zip(("IPv4", "IPv6"), ips, strict=True)
        ),
    ]


@contextlib.asynccontextmanager
async def at_work(
    folder: Path, routing: str = "auto", mixed: bool = False
) -> AsyncIterator[Traffic]:
    async with make_bed(folder, guardSeconds=0.3, routing=routing) as bed:
        items = {name: pod(name, node, app=label) for name, (node, label) in PODS.items()}
        bed.supervisor.put(*items.values(), rules(ONLY_OK))
        ips: dict[str, tuple[str, str]] = {}
        for name, (node, _) in PODS.items():
            answer = await bed.nodes[node].add(name)
            items[name] = with_ips(items[name], answer["ips"])
            four, six = sorted(answer["ips"], key=lambda ip: ":" in ip)
            ips[name] = four, six
        bed.supervisor.put(*service(ips["server"]))
        revision = bed.supervisor.put(*items.values(), verb="MODIFIED")
        await bed.supervisor.wait(revision, *bed.nodes)
        await asyncio.to_thread(_know_pods, bed)
        with reading(bed.nodes.values()) as readers:
            made = Traffic(bed, ips, readers, mixed)
            try:
                yield made
            finally:
                made.close()


def _know_pods(bed: Bed) -> None:
    """The world has a way to the first node's pods, to ask them unasked."""
    with namespaces.inside(namespaces.path_of(f"lg-{bed.cluster}-{OUTSIDE}")), Net() as net:
        index = socket.if_nametoindex("node1")
        net._ip.route("replace", dst="10.77.1.0/24", oif=index, gateway="198.18.1.2")
        net._ip.route("replace", dst="fd77:1::/64", oif=index, gateway="fd18:1::2")
