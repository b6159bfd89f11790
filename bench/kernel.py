"""The programs in the kernel with a compiled cluster in view 1, without agent or pods.

For test runs: the interfaces exist in a network namespace of this process, so that a
program's context can name them, but no packet ever crosses them.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
from collections.abc import Iterable
from typing import Any

import numpy as np

from lockgate.agent.encode import Encoder, EndpointRecord
from lockgate.agent.limits import Limits
from lockgate.bpf import clock, syscall
from lockgate.bpf.maps import ArrayOfMaps, HashMap, MappedArray, PerCpuArray
from lockgate.bpf.object import Object
from lockgate.bpf.ring import Ring
from lockgate.compile import Tables, compile_node
from lockgate.objects.model import Cluster, Pod
from lockgate.paths import bpf_object

__all__ = ["IFINDEX_BASE", "Ids", "World", "empty_program", "own_namespace", "tcp"]

IFINDEX_BASE = 65536
CLONE_NEWNET = 0x40000000
TCP, SYN, RST, ACK = 6, 0x02, 0x04, 0x10


def own_namespace(slots: Iterable[int]) -> None:
    """Move this process into a new network namespace that has the interfaces of `slots`."""
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "cannot make a network namespace")
    for slot in slots:
        subprocess.run(
            [
                "ip",
                "link",
                "add",
                f"lg{slot}",
                "index",
                str(IFINDEX_BASE + slot),
                "type",
                "veth",
                "peer",
                "name",
                f"p{slot}",
            ],
            check=True,
        )


def empty_program() -> int:
    """A tc program that does nothing: its run time is the cost of a test run."""
    return syscall.prog_load(
        3, struct.pack("<BBhi", 0xB7, 0, 0, 0) + struct.pack("<BBhi", 0x95, 0, 0, 0), "empty"
    )


class Ids:
    """Numbers in the order of asking; pods of `node` get slots in the order of the cluster."""

    def __init__(self, cluster: Cluster, node: str) -> None:
        self._numbers: dict[object, int] = {}
        local = [p.metadata.uid for p in cluster.pods.values() if p.spec.node_name == node]
        self._slots = {uid: slot for slot, uid in enumerate(local)}

    def _number(self, key: object) -> int:
        return self._numbers.setdefault(key, len(self._numbers) + 1)

    def endpoint(self, pod: Pod) -> int:
        return self._number(pod.metadata.uid)

    def reason(self, verdict: str, direction: str, rules: Any) -> int:
        return self._number((verdict, direction, rules))

    def service(self, namespace: str, name: str, port_name: str, protocol: str, port: int) -> int:
        return self._number((namespace, name, port_name, protocol, port))

    def slot(self, uid: str) -> int | None:
        return self._slots.get(uid)

    def hop(self, node: str) -> int:
        return 1


class World:
    """One loaded object. `publish` puts tables into its view 1 and sets epoch 1."""

    def __init__(self, path: str | None = None) -> None:
        self.object = Object(path or str(bpf_object()))
        # The limits cost what they cost in use, and never bind.
        limits = Limits(answers=10**9, connections=10**9, events=10**9)
        self.object.set_rodata(limits.constants(0) | clock.constants())
        self.object.load()
        self.schema = self.object.schema

    def close(self) -> None:
        self.object.close()

    def ring(self) -> Ring:
        return Ring.of(self.object, "events", self.schema.dtype("event"))

    def counters(self) -> PerCpuArray:
        return PerCpuArray(os.dup(self.object.map_fd("counters")), "<u8", "counters")

    def publish(self, cluster: Cluster, node: str) -> Tables:
        ids = Ids(cluster, node)
        tables = compile_node(cluster, node, ids)
        if tables.errors:
            raise ValueError(tables.errors[0])
        dtype = self.schema.dtype
        images = ArrayOfMaps.of(self.object, "images", "<u8")
        for view in (0, 1):
            inner = images.create_inner(len(tables.image))
            inner.view[:] = tables.image
            images.replace(view, inner)
            inner.close()
        peers = np.zeros(len(tables.peers), dtype("peer"))
        keys = np.frombuffer(b"".join(tables.peers), np.uint8).reshape(-1, 16)
        peers["view"][:, 1] = np.array(
            [tuple(v) for v in tables.peers.values()], peers["view"].dtype
        )
        HashMap.of(self.object, "peers", dtype("addr"), dtype("peer")).update_many(keys, peers)
        endpoints = MappedArray.of(self.object, "endpoints", dtype("endpoint"))
        records = {
            slot: EndpointRecord(
                ids.endpoint(pod), mac(slot), HOST_MAC, 1500, (pod.status.pod_ips[0].ip,)
            )
            for pod in cluster.pods.values()
            if (slot := ids.slot(pod.metadata.uid)) is not None
        }
        slots, views = Encoder(self.schema, len(endpoints)).endpoints(tables, records)
        endpoints.view[:] = slots
        endpoints.view["view"][:, 1] = views
        state = MappedArray.of(self.object, "state", dtype("node_state"))
        state.view["epoch"][0] = 1
        return tables


HOST_MAC = bytes.fromhex("0a6c00ff0001")


def mac(slot: int) -> bytes:
    return b"\x0a\x6d\0\0" + slot.to_bytes(2, "big")


def mapped(address: str) -> bytes:
    return b"\0" * 10 + b"\xff\xff" + bytes(int(part) for part in address.split("."))


def tcp(slot: int, source: str, target: str, sport: int, dport: int, flags: int) -> bytes:
    """A TCP/IPv4 frame as the pod in `slot` sends it, without payload or TCP checksum."""
    ip = struct.pack(
        "!BBHHHBBH4s4s",
        0x45,
        0,
        40,
        1,
        0x4000,
        64,
        TCP,
        0,
        mapped(source)[12:],
        mapped(target)[12:],
    )
    total = sum(struct.unpack("!10H", ip))
    total = (total & 0xFFFF) + (total >> 16)
    total = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    ip = ip[:10] + struct.pack("!H", total) + ip[12:]
    segment = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 65535, 0, 0)
    return HOST_MAC + mac(slot) + b"\x08\0" + ip + segment
