"""TCP through balancers that remember nothing of it, while routes, backends and owners change.

Three nodes; outside, a route to the frontend leads by one of them at a time, as after a re-hash of
routers in front. Backends come and go by their readiness probe: the test's own socket.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import threading
from collections.abc import Iterator

import pytest

from tests.system.harness import Cluster, Pod, manifest, need_root, unique_name, until

pytestmark = pytest.mark.skipif(need_root(), reason="needs root")

ADDRESS = {4: "203.0.113.77", 6: "2001:db8:113::77"}
GATEWAY = {4: "172.31.0.1{}", 6: "fd00:172:31::1{}"}
FAMILIES = (4, 6)
PORT, TARGET, READY = 80, 9000, 9100
#: Pod → node. `late` comes when connections are there already.
PODS = {"one": "node-1", "two": "node-2", "three": "node-3", "late": "node-2"}
CONNECTIONS = 150  # of each family


def pod(name: str, node: str) -> str:
    probe = {"tcpSocket": {"port": READY}, "periodSeconds": 1, "failureThreshold": 1}
    container = {"name": "main", "readinessProbe": probe}
    return manifest(
        "Pod", "chain", name, {"nodeName": node, "containers": [container]}, app="chain"
    )


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("chain")
    spec = {
        "selector": {"app": "chain"},
        "ipFamilyPolicy": "PreferDualStack",
        "externalIPs": list(ADDRESS.values()),
        "ports": [{"port": PORT, "protocol": "TCP", "targetPort": TARGET}],
    }
    documents = ['{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "chain"}}']
    documents += [pod(name, node) for name, node in PODS.items()]
    documents.append(manifest("Service", "chain", "chain", spec))
    (folder / "chain.yaml").write_text("\n---\n".join(documents))
    with Cluster(folder, unique_name("tn"), nodes=3) as cluster:
        yield cluster


class Echo:
    """A pod's server: every connection gets back what it says. Its probe answers while `ready`."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod
        self._probe: list[socket.socket] = []
        self._selector = selectors.DefaultSelector()
        self._ended = False
        self.connections = 0
        for family in FAMILIES:
            listener = self._listen(family, TARGET)
            self._selector.register(listener, selectors.EVENT_READ, "listener")
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _listen(self, family: int, port: int) -> socket.socket:
        kind = socket.AF_INET6 if family == 6 else socket.AF_INET
        made = self.pod.socket(kind)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind((self.pod.ip(family), port))
        made.listen(1024)
        return made

    def ready(self, yes: bool) -> None:
        for one in self._probe:
            one.close()
        self._probe = [self._listen(family, READY) for family in FAMILIES] if yes else []

    def _serve(self) -> None:
        while not self._ended:
            for key, _ in self._selector.select(0.1):
                near = key.fileobj
                assert isinstance(near, socket.socket)
                if key.data == "listener":
                    far, _ = near.accept()
                    far.settimeout(10)
                    self.connections += 1
                    self._selector.register(far, selectors.EVENT_READ, "connection")
                    continue
                with contextlib.suppress(OSError):
                    data = near.recv(65536)
                    if data:
                        near.sendall(data)
                        continue
                self._selector.unregister(near)
                near.close()

    def close(self) -> None:
        self._ended = True
        self._thread.join()
        self.ready(False)
        for key in list(self._selector.get_map().values()):
            key.fileobj.close()  # type: ignore[union-attr]


def route(cluster: Cluster, node: int) -> None:
    for family in FAMILIES:
        via = GATEWAY[family].format(node)
        cluster.outside().run("ip", "route", "replace", ADDRESS[family], "via", via)


def ready(cluster: Cluster) -> set[str]:
    return {
        endpoint["targetRef"]["name"]
        for one in cluster.objects("endpoints")
        for endpoint in one["endpoints"]
        if endpoint.get("conditions", {}).get("ready", True)
    }


def serve_by(cluster: Cluster, servers: dict[str, Echo], *names: str) -> None:
    for name, server in servers.items():
        server.ready(name in names)
    until(lambda: ready(cluster) == set(names), f"{names} are ready", 20)
    cluster.wait()


class Clients:
    """Connections from outside, each with what it said last."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self.open: list[socket.socket] = []

    def connect(self, count: int) -> None:
        for family in FAMILIES:
            kind = socket.AF_INET6 if family == 6 else socket.AF_INET
            for _ in range(count):
                near = self._cluster.outside().socket(kind)
                near.connect((ADDRESS[family], PORT))
                self.open.append(near)

    def all_live(self, size: int = 2000) -> None:
        said = []
        for near in self.open:
            data = os.urandom(size)
            near.sendall(data)
            said.append(data)
        for near, data in zip(self.open, said, strict=True):
            got = b""
            while len(got) < size:
                part = near.recv(size - len(got))
                assert part, "the connection was ended"
                got += part
            assert got == data

    def close(self) -> None:
        for near in self.open:
            near.close()
        self.open = []


@pytest.fixture
def clients(chain: Cluster) -> Iterator[Clients]:
    made = Clients(chain)
    yield made
    made.close()


@pytest.fixture(scope="module")
def servers(chain: Cluster) -> Iterator[dict[str, Echo]]:
    made = {name: Echo(chain.pod(f"chain/{name}")) for name in PODS}
    yield made
    for one in made.values():
        one.close()


def test_connections_outlive_a_rehash_and_changes_of_backends(
    chain: Cluster, servers: dict[str, Echo], clients: Clients
) -> None:
    serve_by(chain, servers, "one", "two", "three")
    route(chain, 1)
    clients.connect(CONNECTIONS)
    clients.all_live()
    assert all(servers[name].connections > CONNECTIONS / 4 for name in ("one", "two", "three"))
    # Another node's card: it has seen nothing of them.
    for node in (2, 3):
        route(chain, node)
        clients.all_live()
    # One more backend takes slots of the others, whose connections it does not know.
    serve_by(chain, servers, "one", "two", "three", "late")
    for node in (1, 2, 3):
        route(chain, node)
        clients.all_live()
    # One that is ready no more keeps what it has, and gets nothing new.
    before = servers["one"].connections
    serve_by(chain, servers, "two", "three", "late")
    for node in (1, 2, 3):
        route(chain, node)
        clients.all_live()
    clients.connect(CONNECTIONS // 3)
    clients.all_live()
    assert servers["one"].connections == before
    # And back.
    serve_by(chain, servers, "one", "two", "three", "late")
    for node in (3, 2, 1):
        route(chain, node)
        clients.all_live()
