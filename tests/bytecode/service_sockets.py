"""Sockets that ask for services, by the programs on a real cgroup: no test run can play them.

A process in a network namespace, the node's or a pod's, connects where it is told and says to
whom. It has a route to everywhere, and nobody is there: no packet is answered.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lockgate.bpf import links
from lockgate.net import namespaces
from lockgate.standalone.state import cgroup2
from tests.bytecode.service_nodes import Node
from tests.bytecode.world import World

__all__ = ["Sockets"]

#: Of every line [kind, address, port] the socket's peer, as it was given to the kernel, or errno.
ASKER = """
import errno, json, os, socket, sys
with open(sys.argv[1] + "/cgroup.procs", "w") as file:
    file.write("0")
print("ready", flush=True)

def peer_of(near):
    if near.type != socket.SOCK_STREAM:
        return near.getpeername()[:2]
    # As long as nobody answers, only the table of sockets says.
    six = near.family == socket.AF_INET6
    mine = f"{near.getsockname()[1]:04X}"
    for line in open("/proc/self/net/tcp6" if six else "/proc/self/net/tcp"):
        _, local, remote, *_ = line.split()
        if local.endswith(":" + mine):
            address, port = remote.split(":")
            raw = b"".join(bytes.fromhex(address[i:i + 8])[::-1] for i in range(0, len(address), 8))
            return socket.inet_ntop(near.family, raw), int(port, 16)

for line in sys.stdin:
    kind, address, port = json.loads(line)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM if kind == "TCP" else socket.SOCK_DGRAM) as near:
        near.setblocking(False)
        number = near.connect_ex((address, port))
        if number in (0, errno.EINPROGRESS):
            print(json.dumps(peer_of(near)), flush=True)
        else:
            print(number, flush=True)
"""
HOOKS = ("sock_connect4", "sock_connect6")  # not those that would hide the backend


class Sockets:
    """A node `a` whose cluster's services sockets can ask for. Close it."""

    def __init__(self, folder: Path) -> None:
        self._cgroup = cgroup2() / f"lockgate-asking-{os.getpid()}"
        self._cgroup.mkdir()
        self._places = {who: f"lg-asking-{who}-{os.getpid()}" for who in ("node", "pod")}
        for name in self._places.values():
            namespaces.create(name)
            with namespaces.inside(namespaces.path_of(name)):
                _give_way()
        with namespaces.inside(namespaces.path_of(self._places["node"])):
            cookie = namespaces.cookie()
        world = World(constants={"config_netns_cookie": cookie}, name="asking")
        self.node = Node("a", world)
        self._links = [
            links.attach_cgroup(
                world.object.prog_fd(name),
                str(self._cgroup),
                world.object.programs[name],
                str(folder / name),
            )
            for name in HOOKS
        ]
        self._askers = {who: self._start(place) for who, place in self._places.items()}

    def _start(self, place: str) -> subprocess.Popen[str]:
        path = namespaces.path_of(place)
        found = subprocess.Popen(
            [
                *("nsenter", f"--net={path}", "--"),
                *(sys.executable, "-I", "-S", "-c", ASKER, str(self._cgroup)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert found.stdout is not None and found.stdout.readline() == "ready\n"
        return found

    def ask(self, who: str, kind: str, address: str, port: int) -> tuple[str, int] | int:
        """The peer that a socket of the node or of a pod got, or the errno."""
        asker = self._askers[who]
        assert asker.stdin is not None and asker.stdout is not None
        print(json.dumps([kind, address, port]), file=asker.stdin, flush=True)
        answer: Any = json.loads(asker.stdout.readline())
        return answer if isinstance(answer, int) else (answer[0], answer[1])

    def close(self) -> None:
        for asker in self._askers.values():
            assert asker.stdin is not None and asker.stdout is not None
            asker.stdin.close()
            asker.wait()
            asker.stdout.close()
        for link in self._links:
            link.close()
        self.node.edge.close()
        self.node.world.close()
        for name in self._places.values():
            namespaces.delete(name)
        self._cgroup.rmdir()


def _give_way() -> None:
    """A route to everywhere."""
    commands = (
        "link add way type veth peer name nowhere",
        "link set nowhere up",
        "link set way up",
        "address add 192.0.2.77/32 dev way",
        "address add 2001:db8:77::1/128 dev way nodad",
        "route add default dev way",
        "-6 route add default dev way",
    )
    for command in commands:
        subprocess.run(["ip", *command.split()], check=True)
