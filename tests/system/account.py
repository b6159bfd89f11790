"""Flow records of a bed, and the account: each connection begun has its records, no verdict was
told of anything else, and what is missing is what the kernel counted as lost."""

from __future__ import annotations

import math
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

from lockgate.bpf.btf import Schema
from lockgate.observer.config import Config
from lockgate.observer.flows import Filter
from lockgate.observer.server import Observer
from lockgate.paths import bpf_object
from tests.system.agents import Node
from tests.system.load import SERVED, Connection

__all__ = ["Begun", "Pod", "Reader", "differences", "reading"]

_CAPACITY = 1 << 18


class Pod(NamedTuple):
    name: str
    node: str


class Verdict(NamedTuple):
    """One line of the account, beside its connection."""

    node: str
    direction: str
    verdict: str


@dataclass(frozen=True, slots=True)
class Begun:
    """A connection that was begun `times`, from ports that are free again. `allowed`: None = what
    was in force at the moment."""

    connection: Connection
    times: int
    allowed: bool | None

    def verdicts(self, pods: Mapping[str, Pod]) -> list[Verdict]:
        """What is told of it: at the client's node, and at the server's."""
        client, server = (
            pods.get(ip) for ip in (self.connection.source, self.connection.destination)
        )
        told = [Verdict(client.node, "egress", "allow")] if client else []
        if server:
            told.append(Verdict(server.node, "ingress", "allow" if self.allowed else "deny"))
        return told

    def bounds(self, verdict: Verdict) -> tuple[int, float]:
        """How often that is told. Where a packet from a port that was used a moment before passes,
        it is of a known connection, unless TCP closed that one. A SYN that is sent again is denied
        again."""
        tcp = self.connection.protocol == "TCP"
        closed = tcp and self.allowed
        low = 1 if verdict.verdict == "allow" and not closed else self.times
        return low, math.inf if tcp and not self.allowed else self.times


class Reader:
    """A node's observer but for its loop and its API: a thread of the test reads the rings."""

    def __init__(self, node: Node) -> None:
        config = Config(
            cluster=node.cluster, node=node.name, journal=str(node.state / "journal.jsonl")
        )
        schema = Schema.from_object(bpf_object())
        observer = Observer(config, schema, capacity=_CAPACITY)
        self.log, self.source = observer.log, observer.source
        self._over = threading.Event()
        assert self.source.open()
        self._before = self._not_told()
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while not self._over.wait(0.05):
            self.source.open()
            self.source.read()

    def _not_told(self) -> int:
        counts = self.source.counts()
        return counts["lost"] + counts["cut"]

    def end(self) -> tuple[list[dict[str, Any]], int]:
        """Every record, and how many verdicts more the kernel counted as not told."""
        self._over.set()
        self._thread.join()
        self.source.open()
        while self.source.read():
            pass
        lost = self._not_told() - self._before
        assert self.log.first == 0, "more records than are kept"
        return self.log.select(Filter()), lost

    def close(self) -> None:
        self._over.set()
        self._thread.join()
        self.source.close()
        self.log.journal.close()


@contextmanager
def reading(nodes: Iterable[Node]) -> Iterator[list[Reader]]:
    readers: list[Reader] = []
    try:
        for node in nodes:
            readers.append(Reader(node))
        yield readers
    finally:
        for reader in readers:
            reader.close()


def connection_of(record: Mapping[str, Any]) -> Connection:
    source, destination = record["source"], record["destination"]
    return Connection(
        record["protocol"],
        source["ip"],
        source.get("port", 0),
        destination["ip"],
        destination.get("port", 0),
    )


def differences(
    pods: Mapping[str, Pod],
    begun: Iterable[Begun],
    records: Iterable[dict[str, Any]],
    lost: int,
    mixed: bool,
) -> list[str]:
    """What does not add up, one sentence each. `pods` by address; `mixed`: programs of two versions
    ran, of which one may not know what the other began (docs/cluster.md, the mixed moment)."""
    mine = {one.connection: one for one in begun}
    told: dict[Connection, Counter[Verdict]] = defaultdict(Counter)
    wrong: list[str] = []
    for record in records:
        if record["type"] != "verdict":
            continue
        connection = connection_of(record)
        told[connection][Verdict(record["node"], record["direction"], record["verdict"])] += 1
        if connection in mine:
            wrong += _misnamed(record, connection, pods)
        elif not _of_a_reply(connection, mine, mixed):
            wrong.append(f"a verdict of nobody's connection: {record}")
    missing: list[str] = []
    for connection, one in mine.items():
        found = told[connection]
        if one.allowed is None:
            missing += [] if found else [f"{connection}"]
            continue
        expected = one.verdicts(pods)
        for verdict in expected:
            low = one.bounds(verdict)[0]
            missing += [f"{verdict} of {connection}"] * (low - found[verdict])
        for verdict, times in found.items():
            if verdict not in expected:
                wrong.append(f"judged otherwise: {verdict} of {connection}")
            elif times > one.bounds(verdict)[1] and not mixed:
                wrong.append(f"{times} of {one.times} {verdict} of {connection}")
    if len(missing) != lost:
        wrong.append(f"{lost} are counted as lost, and not told are {len(missing)}: {missing[:9]}")
    return wrong


def _misnamed(
    record: Mapping[str, Any], connection: Connection, pods: Mapping[str, Pod]
) -> Iterator[str]:
    """The record must name the ends, the policy that decided, and the service that was asked."""
    for end, ip in (("source", connection.source), ("destination", connection.destination)):
        name = pods[ip].name if ip in pods else None
        if record[end].get("pod") != name:
            yield f"{end} is not {name}: {record}"
    deciding = ["only-ok"] if record["direction"] == "ingress" else []
    if [one["name"] for one in record["policies"]] != deciding:
        yield f"not decided by {deciding}: {record}"
    # Beyond the client's node nobody knows what was asked.
    client = pods.get(connection.source)
    service = "web" if connection.dport == SERVED else None
    told = (record["service"] or {}).get("name")
    if client and client.node == record["node"] and told != service:
        yield f"service is not {service}: {record}"


def _of_a_reply(connection: Connection, mine: Mapping[Connection, Begun], mixed: bool) -> bool:
    """Is it the way back of one that a change cut off, or that programs of another version know?"""
    protocol, source, sport, destination, dport = connection
    one = mine.get(Connection(protocol, destination, dport, source, sport))
    return one is not None and (mixed or one.allowed is None)
