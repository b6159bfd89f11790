"""Services by Lockgate and by kube-proxy, in its modes nftables and iptables.

The same pods, server and objects in namespaces of the same kind (bench/proxies.py). Three tables:

    connections  from a pod to services, of which there are 10 to 30,000: a second, and how long
                 one takes; both ends on one processor
    change       a slice's write at the API → the first new connection to the new backend, one
                 change at a time and at 10 a second; processor and memory then, and at rest
    start        a node without anything, 10,000 services, 50,000 endpoints → services answer

kube-proxy is the real one, built from its Go module, and talks to the same API server.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.proxies import (
    BACKEND_PORT,
    KINDS,
    PATIENCE,
    PORT,
    RR,
    Iptables,
    Lockgate,
    Nftables,
    Node,
    address,
    service,
    slice_of,
)
from bench.proxy_changes import changes, starts
from bench.setups import Namespaces, run
from cluster.binaries import Binaries

COUNTS = (10, 1_000, 10_000, 30_000)
Row = dict[str, Any]


# ---- Connections ---------------------------------------------------------------------


class Way:
    """A client's way to services: what was measured, by (where to, what)."""

    def __init__(self, name: str, node: Node, count: int, client: list[str]) -> None:
        self.name, self.node, self.count = name, node, count
        self._client = [*client, "taskset", "-c", "0", str(RR)]
        self.found: dict[tuple[str, str], list[tuple[float, ...]]] = {}

    def ask(self, kind: str, to: str, seconds: float, port: int = PORT) -> tuple[float, ...]:
        """A second; µs, median and 99th percentile."""
        answer = run(*self._client, kind, to, str(port), str(seconds))
        return tuple(map(float, answer.split()))

    def places(self) -> dict[str, tuple[str, int]]:
        first, last = self.node.ends(self.count)
        every = f"{address(0)}/{self.count}"
        return {
            "first": (first, PORT),
            "last": (last, PORT),
            "all by turns": (every, PORT),
            "no service": (self.node.ip, BACKEND_PORT),
        }

    def round(self, places: dict[str, tuple[str, int]], seconds: float) -> None:
        for place, (to, port) in places.items():
            self.found.setdefault((place, "crr"), []).append(self.ask("crr", to, seconds, port))
        answer = self.ask("rr", *places["last"][:1], seconds)
        self.found.setdefault(("last", "rr"), []).append(answer)

    def median(self, place: str, kind: str = "crr") -> tuple[float, ...]:
        return tuple(map(statistics.median, zip(*self.found[place, kind], strict=True)))


async def settled(way: Way) -> None:
    """Until all services answer."""
    late = time.monotonic() + PATIENCE
    while True:
        way.node.check()
        try:
            await asyncio.to_thread(way.places)
            await asyncio.to_thread(way.ask, "crr", f"{address(0)}/{way.count}", 1)
            return
        except RuntimeError:
            if time.monotonic() > late:
                raise
            await asyncio.sleep(0.5)


async def connections(
    folder: Path, stack: ExitStack, counts: list[int], rounds: int, seconds: float
) -> list[Row]:
    """Every set-up with every count is there at once, so that rounds can be interleaved."""
    spaces, ways = Namespaces(stack), []
    nodes: list[Node] = []
    try:
        for count in counts:
            for kind in KINDS:
                node = kind(f"{kind.kind}-{count}", spaces, stack, folder)
                nodes.append(node)
                await node.start()
                await node.wire()
                for number in range(count):
                    node.api.put(service(number), slice_of(number, [node.ip], BACKEND_PORT))
                ways.append(Way(kind.kind, node, count, node.client))
                if isinstance(node, Lockgate):
                    ways.append(Way("by packet", node, count, node.unhooked()))
        for way in ways:
            await settled(way)
        places = [await asyncio.to_thread(way.places) for way in ways]
        pairs = list(zip(ways, places, strict=True))
        for number in range(rounds):
            for way, to in pairs if number % 2 else reversed(pairs):
                await asyncio.to_thread(way.round, to, seconds)
        # Were first and last the same all the time?
        for way, to in pairs:
            if await asyncio.to_thread(way.places) != to:
                raise RuntimeError(f"{way.node.name} has put its rules in another order meanwhile")
    finally:
        for node in nodes:
            await node.stop()
    return _connection_rows(ways, counts)


def _connection_rows(ways: list[Way], counts: list[int]) -> list[Row]:
    found = {(way.name, way.count): way for way in ways}
    rows = []
    for place in ("no service", "first", "last", "all by turns"):
        for count in counts if place != "no service" else counts[:1]:
            for way in ways:
                if way.count != count:
                    continue
                rate, half, most = way.median(place)
                row: Row = {"to": place, "services": count, "set-up": way.name}
                row |= {"new k/s": rate / 1e3, "p50 µs": half, "p99 µs": most}
                for other in (Nftables, Iptables):
                    base = found[other.kind, count].median(place)[0]
                    row[f"x {other.kind[:3]}"] = rate / base
                row["of 10"] = rate / found[way.name, counts[0]].median(place)[0]
                if place == "last":
                    rate, _, most = way.median(place, "rr")
                    row |= {"rr k/s": rate / 1e3, "rr p99": most}
                rows.append(row)
    return rows


def _print(name: str, title: str, rows: list[Row], *notes: str) -> None:
    columns: dict[str, None] = {}
    for row in rows:
        columns |= dict.fromkeys(row)
    print(
        json.dumps(
            {"name": name, "title": title, "columns": list(columns), "rows": rows, "notes": notes}
        ),
        flush=True,
    )


def _version(program: str) -> str:
    return run(program, "--version").splitlines()[0]


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


TABLES = ("connections", "change", "start")


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.proxy")
    parser.add_argument("--quick", action="store_true", help="fewer services, fewer rounds")
    parser.add_argument("--only", choices=TABLES, action="append", help="these tables")
    parser.add_argument(
        "--services", type=_numbers, default=[], help="of connections: 10,1000,10000,30000"
    )
    parser.add_argument("--changes", type=_numbers, default=[], help="services there: 1000,10000")
    parser.add_argument("--rounds", type=int, default=0, help="of connections and starts: 7, 3")
    options = parser.parse_args()
    quick, tables = options.quick, options.only or TABLES
    Binaries.get()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockgate-bench-")))
        if "connections" in tables:
            counts = options.services or (list(COUNTS[:2]) if quick else list(COUNTS))
            rounds, seconds = options.rounds or (2 if quick else 7), 0.2 if quick else 0.4
            with ExitStack() as inner:
                rows = asyncio.run(connections(folder, inner, counts, rounds, seconds))
            _print(
                "proxy",
                "A pod to services, one CPU (aims: ahead of kube-proxy at 10; at 30,000 as at 10)",
                rows,
                f"medians of {rounds} interleaved rounds of {seconds} s",
                "x: connections/s over kube-proxy's of that mode with as many services",
                "of 10: share of the set-up's own connections/s with the fewest services",
                "first, last: in iptables' chain; by packet: sockets outside the hooked cgroup",
                "pods of kube-proxy's nodes: veth, routes, no bridge; iptables not over nf_tables",
            )
        for count in options.changes or ([1_000] if quick else [1_000, 10_000]):
            if "change" in tables:
                with ExitStack() as inner:
                    seconds = 10 if quick else 60
                    rows = asyncio.run(changes(folder, inner, count, seconds))
                _print(
                    "proxy",
                    f"A slice changes, of {count:,} services (aim: p99 < 10 ms)",
                    rows,
                    "p50, p99: ms, from a write at the API to the first connection there",
                    f"apart: one at a time, 1.2 s after the last; 10/s: for {seconds} s",
                    "%: of a core; kube-proxy with its children, and its own minSyncPeriod of 1 s",
                    _version("nft"),
                )
        if "start" in tables:
            count, rounds = (1_000, 1) if quick else (10_000, options.rounds or 3)
            rows = asyncio.run(starts(folder, count, rounds))
            _print(
                "proxy",
                f"Start with {count:,} services, {5 * count:,} endpoints (aims: 5 s, 250 MB)",
                rows,
                f"medians of {rounds}; until services answer a process of the node",
                "kernel: what is accounted to the processes, Lockgate's tables of connections too",
            )


if __name__ == "__main__":
    main()
