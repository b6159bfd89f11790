"""Pod to pod, through the whole stack: throughput, request/response, connections.

Three ways to join the same processes, in the same run:

    bare      namespaces joined by a veth pair; across nodes, by kernel routes: the limit
    bridge    the distribution's bridge CNI plugin and host-local, rules for 1,000 services
    lockgate  `lockgate up` on two nodes, the same services, a NetworkPolicy in force

and once more through VXLAN: bare and bridge with a kernel's device, routes, permanent neighbours
and forwarding entries as flannel makes them; lockgate with routing vxlan.

On one processor (both ends pinned to it) all that a packet costs shows; rounds are
interleaved and medians compared. On two processors the spread is wide: see `--two-cpus`. Where
other work runs beside it, `--realtime` keeps that from taking turns with one end or the other.
Everything is made for the run and removed afterwards.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

from bench.setups import (
    IPERF_PORT,
    RR_PORT,
    SERVICES,
    TUNNEL,
    Namespaces,
    Pair,
    bare,
    bare_tunnel,
    bridge,
    lockgate,
    run,
)


def start_servers(pair: Pair, stack: ExitStack) -> None:
    """iperf3 and rr in the server pod, on processor 0."""
    pinned = [*pair.server, "taskset", "-c", "0"]
    for command in (
        [*pinned, "iperf3", "-s", "-p", str(IPERF_PORT)],
        [*pinned, *pair.rr, "server", str(RR_PORT)],
    ):
        child = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        stack.callback(child.wait)
        stack.callback(child.kill)
    deadline = time.monotonic() + 10
    while True:
        try:
            run(*pair.client, *pair.rr, "rr", pair.address, str(RR_PORT), "0.01")
            run(*pair.client, "iperf3", "-c", pair.address, "-p", str(IPERF_PORT), "-n", "1K")
            return
        except RuntimeError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)


#: On a machine that is not quiet: what else runs there takes turns with neither end. Not for
#: iperf3, whose threads then wait for each other.
REALTIME = ["chrt", "--fifo", "10"]

#: What iperf3 may have in flight. With the kernel's own choice, megabytes, a connection on one CPU
#: keeps either to the processor's cache or to a third of the throughput, by chance.
WINDOW = "128K"


def throughput(pair: Pair, cpu: int, seconds: float) -> float:
    """Gbit/s."""
    answer = run(
        *pair.client,
        "taskset",
        "-c",
        str(cpu),
        "iperf3",
        "-c",
        pair.address,
        "-p",
        str(IPERF_PORT),
        "-C",
        "cubic",
        "-w",
        WINDOW,
        "-t",
        str(max(1, round(seconds))),
        "-J",
    )
    return float(json.loads(answer)["end"]["sum_received"]["bits_per_second"]) / 1e9


def transactions(kind: str) -> Callable[[Pair, int, float], float]:
    def measure(pair: Pair, cpu: int, seconds: float) -> float:
        """Thousand a second."""
        where = (*pair.client, "taskset", "-c", str(cpu))
        answer = run(*where, *pair.rr, kind, pair.address, str(RR_PORT), str(seconds))
        return float(answer.split()[0]) / 1e3

    return measure


MEASURES: dict[str, Callable[[Pair, int, float], float]] = {
    "Gbit/s": throughput,
    "rr k/s": transactions("rr"),
    "conn k/s": transactions("crr"),
}


def compare(pairs: list[Pair], cpu: int, rounds: int, seconds: float) -> list[dict[str, object]]:
    """Medians of interleaved rounds, and each as a share of bare at the same place."""
    found: dict[tuple[str, str, str], list[float]] = {}
    for number in range(rounds):
        # Each round in the other direction, so that no one is always first.
        for pair in pairs if number % 2 else reversed(pairs):
            for name, measure in MEASURES.items():
                found.setdefault((pair.where, pair.setup, name), []).append(
                    measure(pair, cpu, seconds)
                )
    median = {key: statistics.median(values) for key, values in found.items()}
    rows = []
    for where in ("one node", "two nodes", TUNNEL):
        for pair in pairs:
            if pair.where != where:
                continue
            row: dict[str, object] = {
                "pods on": where,
                "CPUs": 1 if cpu == 0 else 2,
                "setup": pair.setup,
            }
            for name in MEASURES:
                row[name] = median[where, pair.setup, name]
                row["x " + re.sub(r" .*|bit.*", "", name)] = (
                    median[where, pair.setup, name] / median[where, "bare", name]
                )
            rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench.net")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peers-only", action="store_true", help="without Lockgate")
    parser.add_argument(
        "--two-cpus", action="store_true", help="the client on a processor of its own, too"
    )
    parser.add_argument("--way", choices=("direct", "vxlan"), help="only these rows")
    parser.add_argument("--one-node", action="store_true", help="only these rows of --way direct")
    parser.add_argument(
        "--realtime", action="store_true", help="both ends of rr and conn before all other work"
    )
    options = parser.parse_args()
    rounds, seconds = (2, 0.3) if options.quick else (9, 1.0)
    with ExitStack() as stack:
        spaces = Namespaces(stack)
        pairs: list[Pair] = []
        if options.way != "vxlan":
            pairs += bare(spaces) + bridge(spaces, stack)
        if options.way != "direct":
            pairs += bare_tunnel(spaces) + bridge(spaces, stack, 1450)
        if not options.peers_only and options.way != "vxlan":
            pairs += lockgate(stack)
        if not options.peers_only and options.way != "direct":
            pairs += lockgate(stack, "vxlan")
        if options.one_node:
            pairs = [pair for pair in pairs if pair.where == "one node"]
        for pair in pairs:
            if options.realtime:
                pair.rr = [*REALTIME, *pair.rr]
            start_servers(pair, stack)
        rows = compare(pairs, 0, rounds, seconds)
        if options.two_cpus:
            rows += compare(pairs, 1, rounds, seconds)
        nf = Path("/proc/sys/net/bridge/bridge-nf-call-iptables")
        bridged = nf.read_text().strip() if nf.exists() else "absent"
    print(
        json.dumps(
            {
                "name": "net",
                "title": "Pod to pod, IPv4 TCP; x: share of bare at the same place",
                "columns": [
                    "pods on",
                    "CPUs",
                    "setup",
                    "Gbit/s",
                    "x G",
                    "rr k/s",
                    "x rr",
                    "conn k/s",
                    "x conn",
                ],
                "rows": rows,
                "notes": [
                    f"cubic, {WINDOW} in flight; medians of {rounds} interleaved rounds",
                    "CPUs = 1: both ends on one" + ", rr and conn real-time" * options.realtime,
                    f"bridge and lockgate with {SERVICES:,} services, lockgate with a policy too",
                    "lockgate without its limits of connections and events a second of a pod",
                    "every pod in a network namespace and a cgroup of its own, of one depth",
                    "VXLAN: bare and bridge with the kernel's device as flannel sets it up",
                    f"bare on two nodes: kernel routes; bridge-nf-call-iptables {bridged}",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
