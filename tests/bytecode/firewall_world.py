"""The XDP object with a firewall, on its own: tables, test runs, and the answers by name."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from socket import AF_INET, AF_INET6, inet_pton

import numpy as np

from cluster.commands import run, until
from lockgate.agent.firewall_maps import FirewallMaps, sizes
from lockgate.agent.firewall_tables import Change, FirewallTables
from lockgate.bpf import clock, syscall
from lockgate.bpf.maps import HashMap, MappedArray, PerCpuArray
from lockgate.bpf.object import Object
from lockgate.bpf.ring import Ring
from lockgate.compile.firewall import Rule
from lockgate.compile.prefixes import parse
from lockgate.net import namespaces
from lockgate.paths import xdp_object

__all__ = ["XDP_DROP", "XDP_PASS", "FirewallWorld", "frame"]

XDP_DROP, XDP_PASS = 1, 2
_CONTEXT = struct.Struct("<6I")
_LO = 1


@dataclass(frozen=True)
class Outcome:
    """`cause` "" passed."""

    cause: str
    reason: int = 0


class FirewallWorld:
    """One loaded object. The card of all frames is `lo` of this process's namespace."""

    def __init__(self, entries: int = 1000, *, object_: Object | None = None) -> None:
        obj = self.object = object_ or Object(xdp_object())
        if object_ is None:
            obj.set_rodata({"config_firewall": 1, **clock.constants()})
            for name, count in sizes(entries).items():
                obj.set_max_entries(name, count)
            obj.load()
        dtype = obj.schema.dtype
        self.schema = obj.schema
        self.reasons: dict[Rule | None, int] = {}
        self.maps = FirewallMaps.of(obj)
        self.tables = self.open_tables()
        self.link_roles = HashMap.of(obj, "link_roles", "<u4", "<u4")
        self.peers = HashMap.of(obj, "peers", dtype("addr"), dtype("peer"))
        self.connections = HashMap.of(obj, "connections", dtype("ct_key"), dtype("ct"))
        self.half_open = HashMap.of(obj, "half_open", dtype("ct_key"), dtype("ct"))
        self.nat = HashMap.of(obj, "nat", dtype("tuple"), dtype("nat"))
        self.state = MappedArray.of(obj, "state", dtype("node_state"))
        self.state.view["epoch"][0] = 1
        self.counters_map = PerCpuArray.of(obj, "counters", np.dtype("<u8"))
        self.ring = Ring.of(obj, "events", dtype("event"))
        self.causes = {
            number: name.removeprefix("CAUSE_").lower().replace("_", "-")
            for name, number in obj.schema.enum("cause").items()
        }
        self._program = obj.prog_fd("xdp_net")

    def close(self) -> None:
        self.maps.close()
        self.object.close()

    def reason(self, rule: Rule | None) -> int:
        return self.reasons.setdefault(rule, len(self.reasons) + 1)

    def open_tables(self) -> FirewallTables:
        """As an agent that starts does."""
        return FirewallTables(
            self.maps, self.schema, self.reason, [one for one in self.reasons if one]
        )

    def add(self, rule: Rule, *prefixes: str, expires: float = 0.0) -> None:
        change = Change()
        change.added.append((rule, parse(prefixes)[0].unique(), expires))
        self.tables.apply(change)

    def remove(self, rule: Rule, *prefixes: str) -> None:
        change = Change()
        change.removed.append(self.tables.find(parse(prefixes)[0].unique(), rule))
        self.tables.apply(change)

    def clear(self) -> None:
        change = Change()
        change.removed.append(self.tables.all())
        self.tables.apply(change)
        self.tables.settle()
        self.tables.rules.set_default(False)
        for map_ in (self.connections, self.half_open, self.nat, self.peers, self.link_roles):
            map_.delete_many(map_.keys())
        self.ring.read()

    def inside(self, yes: bool) -> None:
        """Does the card lead to other nodes?"""
        roles = self.schema.enum("link_role")
        self.link_roles.set(_LO, roles["LINK_UNDERLAY" if yes else "LINK_OUTSIDE"])

    @contextlib.contextmanager
    def addresses(self, *addresses: str) -> Iterator[None]:
        """This thread in a namespace of its own, whose lo has these addresses."""
        name = f"lg-firewall-{os.getpid()}"
        namespaces.create(name)
        try:
            with namespaces.inside(namespaces.path_of(name)):
                subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
                for address in addresses:
                    length = ["128", "nodad"] if ":" in address else ["32"]
                    block, *more = f"{address}/{length[0]}", *length[1:]
                    subprocess.run(["ip", "addr", "add", block, "dev", "lo", *more], check=True)
                # The kernel makes routes to IPv6 addresses afterwards, in work of its own.
                for address in addresses:
                    until("a route", lambda a=address: run("ip", "route", "get", a), 10)
                yield
        finally:
            namespaces.delete(name)

    def run(self, packet: bytes) -> Outcome:
        context = _CONTEXT.pack(0, len(packet), 0, _LO, 0, 0)
        done = syscall.prog_test_run(self._program, packet, context, name="xdp_net")
        events = self.ring.read()
        if done.retval == XDP_PASS:
            assert not len(events), "a packet that passed was told as dropped"
            return Outcome("")
        assert done.retval == XDP_DROP, done.retval
        event = events[-1]
        return Outcome(self.causes[int(event["cause"])], int(event["reason"]))


def _address(text: str) -> bytes:
    return inet_pton(AF_INET6 if ":" in text else AF_INET, text)


def frame(
    source: str,
    destination: str,
    protocol: int = 17,
    *,
    sport: int = 40000,
    dport: int = 80,
    flags: int = 0x02,
    later: bool = False,
    payload: bytes | None = None,
) -> bytes:
    """A frame as it comes from outside, without checksums. `payload`: in place of the upper
    protocol's header."""
    if payload is None:
        if protocol == 6:
            payload = struct.pack("!HHIIBBHHH", sport, dport, 1, 1, 0x50, flags, 65535, 0, 0)
        elif protocol in (17, 132):
            payload = struct.pack("!HHHH", sport, dport, 8, 0)
        elif protocol in (1, 58):
            payload = struct.pack("!BBHHH", 8 if protocol == 1 else 128, 0, 0, 7, 1)
        else:
            payload = bytes(8)
    if ":" in source:
        following, body = protocol, payload
        if later:
            body = struct.pack("!BBHI", protocol, 0, 0x80, 99) + payload
            following = 44
        head = struct.pack("!IHBB", 0x60000000, len(body), following, 64)
        return bytes(12) + b"\x86\xdd" + head + _address(source) + _address(destination) + body
    head = struct.pack(
        "!BBHHHBBH", 0x45, 0, 20 + len(payload), 99, 16 if later else 0, 64, protocol, 0
    )
    return bytes(12) + b"\x08\0" + head + _address(source) + _address(destination) + payload
