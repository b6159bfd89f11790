"""The programs in the kernel, without a node around them: state in, packets in, answers out.

`World` loads the object with maps of its own and makes a network namespace whose
interfaces have the indices that the programs expect. `Scene` says what the node knows,
`World.publish` brings it in force with the agent's publisher, `World.run` runs a program
on one packet and collects everything that it did.
"""

from __future__ import annotations

import contextlib
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pyroute2 import IPRoute

from lockgate.agent.publish import EndpointRecord, Publisher
from lockgate.bpf import clock, syscall
from lockgate.bpf.maps import ArrayOfMaps, HashMap, LpmTrie, MappedArray, PerCpuArray
from lockgate.bpf.object import Object
from lockgate.bpf.ring import Ring
from lockgate.compile.balance import number_bits
from lockgate.compile.tables import (
    CELL_ALLOW,
    IMAGE_CIDRS,
    IMAGE_PORT_WORDS,
    OWNERS,
    PORT_TABLE_BY_NUMBER,
    EndpointView,
    PeerView,
    ServiceView,
    Tables,
)
from lockgate.compile.trie import trie
from lockgate.net import namespaces
from lockgate.objects.address import format_address, parse_address
from lockgate.observer.records import events_of

OBJECT = Path(__file__).parents[2] / "build" / "lockgate.bpf.o"
IFINDEX_BASE = 65536
SLOTS = 16  # pods' interfaces in the namespace
UNDERLAY, OUTSIDE = 100, 101  # interface indices of the network cards
CARD_MAC = "02:00:00:00:00:bb"
DRY_MARK = 0x6C6B6761
NEXT, DROP, REDIRECT = -1, 2, 7  # what a program may answer (enum tcx_action_base)

LOCAL, REMOTE, NODE, HOST = 1, 2, 3, 4  # enum peer_kind
HOP_MAC, HOP_MASQ, HOP_DROP, HOP_TUNNEL, HOP_XDP = 1, 2, 4, 8, 16
SVC_PRESENT, SVC_FRONTEND, SVC_SNAT, SVC_LOCAL, SVC_RANGES, SVC_HOST_ONLY = 1, 2, 4, 8, 16, 64
SVC_OPEN, SVC_INTERNAL_LOCAL = 32, 128
TO_NOWHERE, TO_LOCAL, TO_HOP, TO_HOST = 0, 1, 2, 3  # enum target_kind
OWNER_ENDS = 1
LIVE_INSIDE, LIVE_LOCAL, LIVE_OUTSIDE, LIVE_KEEPS = 1, 2, 4, 8  # enum liveness
LINK_UNDERLAY, LINK_OUTSIDE = 1, 2
INGRESS, EGRESS = 1, 2  # enum isolation; the order of Scene.cells
TCP, UDP, SCTP = 6, 17, 132


def pod_mac(slot: int) -> str:
    return f"0a:70:00:00:00:{slot:02x}"


def host_mac(slot: int) -> str:
    return f"0a:6c:00:00:00:{slot:02x}"


def mac_bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace(":", ""))


@dataclass(frozen=True)
class Peer:
    kind: int
    target: int = 0  # slot or hop
    id: int = 0
    cls: int = 0


@dataclass(frozen=True)
class Hop:
    ifindex: int
    flags: int = 0
    dmac: str = "00:00:00:00:00:00"
    smac: str = "00:00:00:00:00:00"
    mtu: int = 1500
    via: tuple[str, ...] = ()
    masquerade: tuple[str, ...] = ()
    remote: str = ""
    local: str = ""


@dataclass(frozen=True)
class Owner:
    """A backend as a table's owner: `kind` of enum target_kind, and slot or hop."""

    address: str
    port: int
    kind: int
    index: int = 0
    flags: int = 0


@dataclass(frozen=True)
class Service:
    """With `owners`: a frontend, whose table is `slots`, each the numbers of its owners."""

    id: int
    backends: tuple[tuple[str, int], ...] = ()
    affinity: int = 0
    flags: int = 0
    owners: tuple[Owner, ...] = ()
    slots: tuple[tuple[int, ...], ...] = ((0,),)
    #: (family, first address, prefix length) of the sources that it serves, with SVC_RANGES.
    ranges: tuple[tuple[int, int, int], ...] = ()


def slot_words(slots: Sequence[Sequence[int]], bits: int) -> list[int]:
    """The words of a table of slots, for numbers of so many bits: see bpf/types.h."""
    found, none = 0, (1 << bits) - 1
    for at, of in enumerate(slots):
        for rank, number in enumerate((*of, *[none] * OWNERS)[:OWNERS]):
            found |= number << (at * OWNERS + rank) * bits
    return np.frombuffer(
        found.to_bytes(-(-len(slots) * OWNERS * bits // 64) * 8, "little"), "<u8"
    ).tolist()


@dataclass(frozen=True)
class Scene:
    """What a node knows.

    `cells` of an isolated pod: slot → direction → {(peer class, port class): cell}; what is
    not named denies with the direction's `reason`.
    """

    peers: Mapping[str, Peer]
    pods: Mapping[int, tuple[int, tuple[str, ...]]]  # slot → id, addresses
    hops: Mapping[int, Hop] = field(default_factory=dict)
    routes: Mapping[str, int] = field(default_factory=dict)
    services: Mapping[tuple[str, int, int], Service] = field(default_factory=dict)
    #: Flags of services' addresses themselves, where they have any.
    addresses: Mapping[str, int] = field(default_factory=dict)
    ports: Mapping[tuple[int, int], int] = field(default_factory=dict)
    cells: Mapping[int, Mapping[int, Mapping[tuple[int, int], int]]] = field(default_factory=dict)
    #: (family, first address, prefix length, peer class), as the CIDR trie takes them
    leaves: tuple[tuple[int, int, int, int], ...] = ()
    reason: int = 77
    classes: int = 8
    port_classes: int = 4

    def but(self, **changes: Any) -> Scene:
        return replace(self, **changes)

    def isolate(
        self, slot: int, direction: int, allow: Mapping[tuple[int, int], int] | None = None
    ) -> Scene:
        """Isolated in one direction; `allow`: {(peer class, port class): reason}."""
        cells = {key: CELL_ALLOW | reason for key, reason in (allow or {}).items()}
        own = {**self.cells.get(slot, {}), direction: cells}
        return replace(self, cells={**self.cells, slot: own})

    def without(self, *addresses: str) -> Scene:
        return replace(self, peers={a: p for a, p in self.peers.items() if a not in addresses})

    def tables(self) -> Tables:
        ports = np.zeros(3 * 65536, "<u2")
        for (proto, port), cls in self.ports.items():
            ports[PORT_TABLE_BY_NUMBER[proto] * 65536 + port] = cls
        words: list[int] = []
        cidrs = np.frombuffer(trie(self.leaves), "<u8")
        start = IMAGE_PORT_WORDS + len(cidrs)

        def add(new: list[int]) -> int:
            at = start + len(words)
            words.extend(new)
            return at

        endpoints = {}
        for slot in self.pods:
            own = self.cells.get(slot, {})
            size = self.classes * self.port_classes
            first = {
                direction: add(
                    [
                        own.get(direction, {}).get(
                            (n // self.port_classes, n % self.port_classes), self.reason
                        )
                        for n in range(size)
                    ]
                )
                for direction in (INGRESS, EGRESS)
            }
            rows = add(
                [
                    first[INGRESS] + c * self.port_classes
                    | first[EGRESS] + c * self.port_classes << 32
                    for c in range(self.classes)
                ]
            )
            cols = add([c | c << 32 for c in range(self.port_classes)])
            endpoints[slot] = EndpointView(rows, cols, sum(own))
        tables = Tables(np.zeros(0, np.uint64), endpoints=endpoints)
        for address, peer in self.peers.items():
            view = PeerView(peer.cls, peer.id, peer.kind, peer.target)
            tables.peers[parse_address(address)] = view
        for (address, port, proto), service in self.services.items():
            packed = parse_address(address)
            raw = b"".join(
                struct.pack("!16sH", parse_address(backend), number) + bytes(6)
                for backend, number in service.backends
            )
            at = add(np.frombuffer(raw, "<u8").tolist()) if raw else 0
            raw = b"".join(
                struct.pack("!16sH", parse_address(one.address), one.port)
                + struct.pack("<HI", one.flags, one.kind << 28 | one.index)
                for one in service.owners
            )
            owners = add(np.frombuffer(raw, "<u8").tolist()) if raw else 0
            # Where a slot has fewer than it could, all ones must be nobody's number.
            short = any(len(of) < OWNERS for of in service.slots)
            bits = number_bits(len(service.owners) + short)
            own = SVC_PRESENT | self.addresses.get(address, 0)
            tables.services[packed, 0, 0] = ServiceView(0, 0, 0, own)
            leaves = [(*block, 1) for block in service.ranges]
            ranges = trie(leaves, start + len(words) - IMAGE_CIDRS)
            ranged = add(np.frombuffer(ranges, "<u8").tolist())
            tables.services[packed, port, proto] = ServiceView(
                service.id,
                at,
                len(service.backends),
                SVC_PRESENT | service.flags | (SVC_FRONTEND if service.owners else 0),
                service.affinity,
                add(slot_words(service.slots, bits)) if service.owners else 0,
                owners,
                len(service.slots).bit_length() - 1 if service.owners else 0,
                bits,
                len(service.owners),
                ranged,
            )
            inside = LIVE_LOCAL if service.flags & SVC_INTERNAL_LOCAL else LIVE_INSIDE
            live = [(*backend, inside) for backend in service.backends]
            live += [
                (one.address, one.port, LIVE_KEEPS if one.flags & OWNER_ENDS else LIVE_OUTSIDE)
                for one in service.owners
            ]
            for backend, number, bits in live:
                key = parse_address(backend), service.id, number, proto
                tables.backends[key] = tables.backends.get(key, 0) | bits
        tables.image = np.concatenate((ports.view("<u8"), cidrs, np.array(words, "<u8")))
        return tables

    def records(self) -> dict[int, EndpointRecord]:
        return {
            slot: EndpointRecord(
                id, mac_bytes(pod_mac(slot)), mac_bytes(host_mac(slot)), 1500, addresses
            )
            for slot, (id, addresses) in self.pods.items()
        }


@dataclass(frozen=True)
class Outcome:
    """What a run did: its answer, the packet and context afterwards, and its events."""

    verdict: int
    packet: bytes
    cb: tuple[int, ...]
    events: list[dict[str, Any]]


# The maps that only programs write.
REMEMBERED = (
    *("connections", "half_open", "crowd", "nat", "fragments", "sockets", "affinities"),
    "flows",
)


class FlowTable:
    """`flows` as if it were a hash: what is remembered, by its place."""

    def __init__(self, map_: MappedArray) -> None:
        self._ways = map_.view["way"]
        self.sets = len(self._ways)

    def __len__(self) -> int:
        return len(self.keys())

    def keys(self) -> NDArray[Any]:
        return np.argwhere(self._ways["epoch"] != 0)

    def items(self) -> tuple[NDArray[Any], NDArray[Any]]:
        keys = self.keys()
        return keys, self._ways[keys[:, 0], keys[:, 1]]

    def update_many(self, keys: NDArray[Any], values: NDArray[Any]) -> None:
        self._ways[keys[:, 0], keys[:, 1]] = values

    def delete_many(self, keys: NDArray[Any]) -> None:
        self._ways[keys[:, 0], keys[:, 1]] = np.zeros((), self._ways.dtype)


class World:
    """Programs and maps under the names that the agent's Datapath has, for the publisher."""

    def __init__(
        self,
        path: Path = OBJECT,
        constants: Mapping[str, int] | None = None,
        name: str = "test",
        room: int = 4096,
    ) -> None:
        """`constants` of bpf/config.h; worlds at the same time need different names. `room`:
        elements of each map that remembers."""
        self.namespace = f"lg-{name}-{os.getpid()}"
        self.object = Object(path)
        self.object.set_rodata({**clock.constants(), **(constants or {})})
        for name in REMEMBERED:
            self.object.set_max_entries(name, room)
        for name in ("events", "events_raw"):
            self.object.set_max_entries(name, 1 << 16)
        self.object.load()
        obj, dtype, u32 = self.object, self.object.schema.dtype, np.dtype("<u4")
        self.dtype = dtype
        self.state = MappedArray.of(obj, "state", dtype("node_state"))
        self.images = ArrayOfMaps.of(obj, "images", np.dtype("<u8"))
        self.peers = HashMap.of(obj, "peers", dtype("addr"), dtype("peer"))
        self.endpoints = MappedArray.of(obj, "endpoints", dtype("endpoint"))
        self.services = HashMap.of(obj, "services", dtype("service_key"), dtype("service"))
        self.backends = HashMap.of(
            obj, "service_backends", dtype("backend_key"), dtype("backend_state")
        )
        self.hops = MappedArray.of(obj, "hops", dtype("hop"))
        self.routes = LpmTrie.of(obj, "routes", dtype("route_key"), u32)
        self.link_roles = HashMap.of(obj, "link_roles", u32, u32)
        self.beyond = 0  # no other version
        self.connections = HashMap.of(obj, "connections", dtype("ct_key"), dtype("ct"))
        self.half_open = HashMap.of(obj, "half_open", dtype("ct_key"), dtype("ct"))
        self.crowd = HashMap.of(obj, "crowd", dtype("ct_key"), dtype("ct"))
        self.nat = HashMap.of(obj, "nat", dtype("tuple"), dtype("nat"))
        self.fragments = HashMap.of(obj, "fragments", dtype("frag_key"), dtype("frag"))
        self.sockets = HashMap.of(obj, "sockets", dtype("socket_key"), dtype("socket_peer"))
        self.affinities = HashMap.of(obj, "affinities", dtype("affinity_key"), dtype("affinity"))
        self.flows = FlowTable(MappedArray.of(obj, "flows", dtype("flow_set")))
        self.peer_bits = MappedArray.of(obj, "peer_bits", np.dtype("<u8"))
        self.frontend_bits = MappedArray.of(obj, "frontend_bits", np.dtype("<u8"))
        self.counters_map = PerCpuArray.of(obj, "counters", np.dtype("<u8"))
        self.ring = Ring.of(obj, "events", dtype("event"))
        self.ring_raw = Ring.of(obj, "events_raw", dtype("event_raw"))
        self.causes = {
            number: name.removeprefix("CAUSE_").lower().replace("_", "-")
            for name, number in obj.schema.enum("cause").items()
        }
        self.publisher = Publisher(self)  # type: ignore[arg-type]
        self._routes: list[bytes] = []
        namespaces.create(self.namespace)
        with self.inside():
            self._make_links()
        self.link_roles.set(UNDERLAY, LINK_UNDERLAY)
        self.link_roles.set(OUTSIDE, LINK_OUTSIDE)

    def close(self) -> None:
        namespaces.delete(self.namespace)
        self.object.close()

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """The calling thread in the namespace: test runs look for the interface there."""
        with namespaces.inside(namespaces.path_of(self.namespace)):
            yield

    @staticmethod
    def _make_links() -> None:
        wanted = {IFINDEX_BASE + slot: f"lg{slot}" for slot in range(SLOTS)}
        wanted |= {UNDERLAY: "underlay", OUTSIDE: "outside"}
        with IPRoute() as ip:
            for index, name in wanted.items():
                ip.link(
                    "add", ifname=name, index=index, kind="veth", peer={"ifname": f"{name}-peer"}
                )
                own = {"address": CARD_MAC} if index in (UNDERLAY, OUTSIDE) else {}
                ip.link("set", index=index, state="up", **own)

    # ---- State -----------------------------------------------------------------------

    def publish(self, scene: Scene) -> None:
        """Bring the scene in force, in the next epoch if policies or addresses differ."""
        self.write_routes(scene)
        self.publisher.publish(scene.tables(), scene.records(), self.hop_table(scene))

    def hop_table(self, scene: Scene) -> NDArray[Any]:
        """The hops as the publisher takes them."""
        table = np.zeros(len(self.hops), self.dtype("hop_view"))
        for index, hop in scene.hops.items():
            record = table[index]
            record["ifindex"], record["flags"], record["mtu"] = hop.ifindex, hop.flags, hop.mtu
            record["dmac"] = np.frombuffer(mac_bytes(hop.dmac), np.uint8)
            record["smac"] = np.frombuffer(mac_bytes(hop.smac), np.uint8)
            for address in hop.via:
                name = "via6" if ":" in address else "via4"
                record[name] = np.frombuffer(parse_address(address), np.uint8)
            for address in hop.masquerade:
                name = "masq6" if ":" in address else "masq4"
                record[name] = np.frombuffer(parse_address(address), np.uint8)
            for name, address in (("remote", hop.remote), ("local", hop.local)):
                if address:
                    record[name] = np.frombuffer(parse_address(address), np.uint8)
        return table

    def write_routes(self, scene: Scene) -> None:
        """Routes have no views."""
        for key in self._routes:
            self.routes.delete(key)
        self._routes = []
        for block, hop in scene.routes.items():
            address, _, length = block.partition("/")
            bits = int(length) + (0 if ":" in address else 96)
            key = struct.pack("<I", bits) + parse_address(address)
            self.routes.set(key, hop)
            self._routes.append(key)

    def next_epoch(self) -> None:
        """Move the epoch with nothing changed: bring the idle view up to date first."""
        view = self.publisher.epoch & 1
        for map_ in (self.peers, self.services, self.backends):
            self._copy_view(map_, view)
        inner = self.publisher._inner[view]
        assert inner is not None
        self.publisher._write_image(1 - view, inner.view.copy())
        self.endpoints.view["view"][:, 1 - view] = self.endpoints.view["view"][:, view]
        self.hops.view["view"][:, 1 - view] = self.hops.view["view"][:, view]
        self.publisher.read_back()
        self.state.view["epoch"][0] += 1

    @staticmethod
    def _copy_view(map_: HashMap, view: int) -> None:
        keys, values = map_.items()
        values = values.copy()
        name = "live" if "live" in (values.dtype.names or ()) else "view"
        values[name][:, 1 - view] = values[name][:, view]
        map_.update_many(keys, values)

    def clear(self) -> None:
        """Forget connections, translations, fragments and events."""
        for name in REMEMBERED:
            map_ = getattr(self, name)
            map_.delete_many(map_.keys())
        self.state.view["capture"][0] = self.state.view["host_backends"][0] = 0
        self.events()
        self.ring_raw.read()
        self._base = self.counters_map.values().sum(axis=1)

    def counters(self) -> np.ndarray:
        """Totals since `clear`."""
        return self.counters_map.values().sum(axis=1) - self._base

    # ---- Runs ------------------------------------------------------------------------

    def run(
        self,
        program: str,
        packet: bytes,
        ifindex: int,
        mark: int = 0,
        cb: tuple[int, ...] = (),
    ) -> Outcome:
        """One packet through one program; call it `inside`."""
        context = syscall.skb_context(mark=mark, ifindex=ifindex, cb=cb)
        result = syscall.prog_test_run(
            self.object.prog_fd(program), bytes(packet), context, name=program
        )
        return Outcome(result.retval, result.data, result.cb, self.events())

    def events(self) -> list[dict[str, Any]]:
        return [self.plain(event) for event in events_of(self.ring.read())[0]]

    def plain(self, record: Any) -> dict[str, Any]:
        """An event as Python values, causes by name."""
        found: dict[str, Any] = {}
        for name in record.dtype.names:
            if name.startswith("egress_"):
                continue  # the other verdict of the record that this event was in
            value = record[name]
            if name in ("saddr", "daddr"):
                found[name] = format_address(value.tobytes())
            else:
                found[name] = int(value)
        found["cause"] = self.causes[found["cause"]]
        return found

    def tracked(self) -> list[tuple[str, dict[str, Any]]]:
        """All connections as (map, fields)."""
        found = []
        for map_ in (self.half_open, self.crowd, self.connections):
            for key, value in zip(*map_.items(), strict=True):
                fields = {name: value[name].tolist() for name in value.dtype.names}
                fields["lo"] = format_address(key["lo"].tobytes())
                fields["hi"] = format_address(key["hi"].tobytes())
                fields["ports"] = {int(key["lo_port"]), int(key["hi_port"])}
                found.append((map_.name, fields))
        return found


def set_seen(map_: HashMap, seconds: int) -> None:
    """Entries were seen that much later than they were (earlier, if below 0)."""
    keys, values = map_.items()
    values = values.copy()
    values["seen"] = values["seen"].astype(np.int64) + seconds
    map_.update_many(keys, values)
