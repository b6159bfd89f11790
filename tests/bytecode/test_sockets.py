"""What the socket programs leave to others, by who asks: processes in a cgroup, in the network
namespace of the node or of a pod, with backends on loopback."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockgate.bpf import links
from lockgate.net import namespaces
from lockgate.standalone.state import cgroup2
from tests.bytecode.goldens import base
from tests.bytecode.world import (
    SVC_HOST_ONLY,
    SVC_INTERNAL_LOCAL,
    SVC_OPEN,
    SVC_RANGES,
    TCP,
    UDP,
    Service,
    World,
)

BACKEND = {4: "127.0.0.5", 6: "::1"}
RANGED = {4: "203.0.113.1", 6: "2001:db8:113::1"}
LOCAL = {4: "10.96.0.9", 6: "fd00:96::9"}
STICKY = {4: "10.96.0.8", 6: "fd00:96::8"}
OPEN = {4: "192.0.2.2", 6: "fd00:ff::2"}
LOOPBACK = {4: "127.0.0.1", 6: "::1"}

# Says what came of asking, and who the peer is.
CLIENT = """
import os, socket, sys
cgroup, netns, kind, backend, address, port = sys.argv[1:]
with open(cgroup + "/cgroup.procs", "w") as file:
    file.write("0")
family = socket.AF_INET6 if ":" in address else socket.AF_INET
type = socket.SOCK_STREAM if kind == "tcp" else socket.SOCK_DGRAM
with socket.socket(family, type) as server, socket.socket(family, type) as near:
    server.bind((backend, 8080))
    if kind == "tcp":
        server.listen()
    near.settimeout(5)
    try:
        if kind == "tcp":
            near.connect((address, int(port)))
        else:
            near.sendto(b"x", (address, int(port)))
    except OSError as error:
        print(error.errno)
        sys.exit()
    if kind == "udp":
        server.settimeout(0.5)
        try:
            server.sendto(b"y", server.recvfrom(10)[1])
            print(*near.recvfrom(10)[1][:2])
        except TimeoutError:
            print("nothing")
    else:
        print(*near.getpeername()[:2])
"""


class Sockets:
    """The programs on a cgroup, and two namespaces: `node` is the one that they were told of."""

    def __init__(self, folder: Path) -> None:
        self.cgroup = cgroup2() / f"lockgate-sockets-{os.getpid()}"
        self.cgroup.mkdir()
        self.places = {who: f"lg-sockets-{who}-{os.getpid()}" for who in ("node", "pod")}
        for name in self.places.values():
            namespaces.create(name)
            with namespaces.inside(namespaces.path_of(name)):
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        with namespaces.inside(namespaces.path_of(self.places["node"])):
            cookie = namespaces.cookie()
        self.world = World(constants={"config_netns_cookie": cookie}, name="sockets")
        self.links = [
            links.attach_cgroup(
                self.world.object.prog_fd(name), str(self.cgroup), section, str(folder / name)
            )
            for name, section in self.world.object.programs.items()
            if section.startswith("cgroup/")
        ]

    def ask(self, who: str, kind: str, family: int, address: str, port: int) -> str:
        place = namespaces.path_of(self.places[who])
        return subprocess.run(
            [
                *("nsenter", f"--net={place}", "--"),
                *(sys.executable, "-I", "-S", "-c", CLIENT, str(self.cgroup), str(place)),
                *(kind, BACKEND[family], address, str(port)),
            ],
            check=True,
            capture_output=True,
            text=True,
            timeout=20,
        ).stdout.strip()

    def close(self) -> None:
        for link in self.links:
            link.close()
        self.world.close()
        for name in self.places.values():
            namespaces.delete(name)
        self.cgroup.rmdir()


@pytest.fixture(scope="module")
def sockets() -> Iterator[Sockets]:
    folder = Path("/sys/fs/bpf") / f"lockgate-sockets-{os.getpid()}"
    folder.mkdir()
    made = Sockets(folder)
    scene = base()
    services = {
        (address, 80, proto): Service(id + proto, backends, flags=flags)
        for family in (4, 6)
        for id, address, flags, backends in (
            (100, RANGED[family], SVC_RANGES, ((BACKEND[family], 8080),)),
            (200, LOCAL[family], SVC_INTERNAL_LOCAL, ()),
            (300, LOOPBACK[family], SVC_HOST_ONLY, ((BACKEND[family], 8080),)),
            (400, OPEN[family], 0, ((BACKEND[family], 8080),)),
        )
        for proto in (TCP, UDP)
    }
    services |= {
        (STICKY[family], 80, proto): Service(500 + proto, ((BACKEND[family], 8080),), 60)
        for family in (4, 6)
        for proto in (TCP, UDP)
    }
    addresses = dict.fromkeys((*OPEN.values(), *LOOPBACK.values()), SVC_OPEN)
    made.world.publish(scene.but(services=services, addresses=addresses))
    yield made
    made.close()
    for pin in folder.iterdir():
        pin.unlink()
    folder.rmdir()


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_node_port_on_loopback_is_the_nodes_own(sockets: Sockets, kind: str, family: int) -> None:
    address = LOOPBACK[family]
    assert sockets.ask("node", kind, family, address, 80) == f"{address} 80"
    found = sockets.ask("pod", kind, family, address, 80)
    assert found == (str(errno.ECONNREFUSED) if kind == "tcp" else "nothing")


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_whom_a_service_serves_is_asked_of_pods_by_packet(
    sockets: Sockets, kind: str, family: int
) -> None:
    address = RANGED[family]
    assert sockets.ask("node", kind, family, address, 80) == f"{address} 80"
    # It kept the service's address, where this pod has no route to.
    assert sockets.ask("pod", kind, family, address, 80) == str(errno.ENETUNREACH)


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_port_that_no_service_has_at_its_address(
    sockets: Sockets, kind: str, family: int
) -> None:
    address = LOCAL[family]
    assert sockets.ask("node", kind, family, address, 81) == str(errno.ECONNREFUSED)
    assert sockets.ask("pod", kind, family, address, 81) == str(errno.ENETUNREACH)
    # A host's own address: what is there is its stack's business.
    found = sockets.ask("node", kind, family, OPEN[family], 81)
    assert found == str(errno.ENETUNREACH)


@pytest.mark.parametrize("families", [(4, 6), (6, 4)], ids=["IPv4 first", "IPv6 first"])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_a_client_keeps_a_backend_in_each_family(
    sockets: Sockets, kind: str, families: tuple[int, int]
) -> None:
    """A service of both has backends of both."""
    sockets.world.clear()
    for family in (*families, *families):
        address = STICKY[family]
        assert sockets.ask("node", kind, family, address, 80) == f"{address} 80"


@pytest.mark.parametrize("family", [4, 6])
@pytest.mark.parametrize("kind", ["tcp", "udp"])
def test_no_backend_here_with_internal_traffic_policy_local(
    sockets: Sockets, kind: str, family: int
) -> None:
    wanted = errno.ETIMEDOUT if kind == "tcp" else errno.EPERM
    assert sockets.ask("node", kind, family, LOCAL[family], 80) == str(wanted)
    assert sockets.ask("pod", kind, family, LOCAL[family], 80) == str(errno.ENETUNREACH)
