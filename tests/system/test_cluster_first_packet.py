"""Pods are isolated before their first process runs: 200 of them begin with a packet that no policy
allows, and the receiver gets none of those."""

from __future__ import annotations

import os
import select
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.system.harness import Cluster, Place, family_of, manifest, unique_name, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

PODS = 200
PORT = 7777
BASH = "/bin/bash"


class Receiver:
    """Counts what arrives at a pod, before any filter of sockets: by raw packets on its eth0."""

    def __init__(self, place: Place) -> None:
        kind = socket.SOCK_RAW | socket.SOCK_NONBLOCK
        self._socket = place.socket(socket.AF_PACKET, kind, socket.htons(3))
        self._socket.bind(("eth0", 0))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        #: (source address, "tcp" or "udp") of each first packet to PORT.
        self.seen: set[tuple[str, str]] = set()

    def drain(self) -> None:
        while select.select([self._socket], [], [], 0)[0]:
            frame, where = self._socket.recvfrom(2048)
            if where[2] == socket.PACKET_OUTGOING:
                continue
            packet = frame[14:]
            if frame[12:14] == b"\x08\x00":
                protocol, header = packet[9], (packet[0] & 15) * 4
                source = socket.inet_ntop(socket.AF_INET, packet[12:16])
            elif frame[12:14] == b"\x86\xdd":
                protocol, header = packet[6], 40
                source = socket.inet_ntop(socket.AF_INET6, packet[8:24])
            else:
                continue
            name = {6: "tcp", 17: "udp"}.get(protocol)
            if name and int.from_bytes(packet[header + 2 : header + 4], "big") == PORT:
                self.seen.add((source, name))

    def close(self) -> None:
        self._socket.close()


@pytest.fixture
def target(tmp_path: Path) -> Iterator[Cluster]:
    """A pod that listens and admits friends only."""
    namespace = '{"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "first"}}'
    ports = [{"containerPort": PORT, "protocol": name} for name in ("TCP", "UDP")]
    containers = [{"name": "main", "ports": ports}]
    spec = {"nodeName": "node-1", "containers": containers}
    policy = {
        "podSelector": {"matchLabels": {"app": "target"}},
        "ingress": [{"from": [{"podSelector": {"matchLabels": {"friend": "yes"}}}]}],
    }
    texts = [
        namespace,
        manifest("Pod", "first", "target", spec, app="target"),
        manifest("NetworkPolicy", "first", "friends", policy),
    ]
    (tmp_path / "first.yaml").write_text("\n---\n".join(texts))
    with Cluster(tmp_path, unique_name("tf")) as cluster:
        yield cluster


def sender(name: str, where: list[str], first: str, **labels: str) -> str:
    """A pod whose first act, in its first container, is a SYN and a datagram to each address.
    `first`: "init" or "main"."""
    acts = "; ".join(
        f"(echo > /dev/{kind}/{address}/{PORT}) 2>/dev/null &"
        for address in where
        for kind in ("tcp", "udp")
    ).replace("&;", "&")
    act = {"name": "act", "command": [BASH, "-c", f"{acts} read -rt 0.2 <> <(:); exit 0"]}
    stay = {"name": "main", "command": ["/bin/sleep", "1000"]}
    if first == "init":
        spec = {"initContainers": [act], "containers": [stay]}
    else:
        acting = {"name": "act", "command": [BASH, "-c", f"{acts} exec sleep 1000"]}
        spec = {"containers": [acting]}
    return manifest("Pod", "first", name, spec, **labels)


def test_none_of_200_forbidden_first_packets_arrives_and_allowed_ones_do(target: Cluster) -> None:
    pod = target.pod("first/target")
    where = [pod.ip(4), pod.ip(6)]
    assert [family_of(address) for address in where] == [socket.AF_INET, socket.AF_INET6]
    receiver = Receiver(pod)
    senders = [sender(f"foe-{n}", where, "init" if n % 2 else "main") for n in range(PODS)]
    friends = [
        sender(f"friend-{n}", where, "init" if n % 2 else "main", friend="yes") for n in range(4)
    ]
    target.save("senders.yaml", *senders, *friends, wait=False)

    def all_run() -> bool:
        receiver.drain()
        pods = target.objects("pods")
        return len(pods) == PODS + 5 and all(p["status"]["phase"] == "Running" for p in pods)

    until(all_run, "every pod runs", deadline=55)
    addresses = {
        p["metadata"]["name"]: [entry["ip"] for entry in p["status"]["podIPs"]]
        for p in target.objects("pods")
    }
    allowed = {
        (ip, kind) for n in range(4) for ip in addresses[f"friend-{n}"] for kind in ("tcp", "udp")
    }
    foes = {
        (ip, kind)
        for name, ips in addresses.items()
        if name.startswith("foe-")
        for ip in ips
        for kind in ("tcp", "udp")
    }
    assert len(foes) == PODS * 4

    def denied() -> set[tuple[str, str]]:
        receiver.drain()
        found = target.flows(verdict="deny", port=PORT, limit=10_000)
        return {(record["source"]["ip"], record["protocol"].lower()) for record in found}

    # Every one of them did send: its denial is on record.
    until(lambda: denied() >= foes, "a denied flow of every pod", deadline=10)
    until(lambda: (receiver.drain(), receiver.seen >= allowed)[1], "what friends send arrives")
    assert not receiver.seen & foes
    receiver.close()
