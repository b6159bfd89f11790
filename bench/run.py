"""Runs benchmarks and prints their tables.

    python -m bench.run [NAME…] [--json] [--quick]

Names: packet verdict balancer firewall explain events sweep publish bigapi compile daytwo cni
proxy net; none means all. Each runs in a process of its own, with a network namespace of its own,
and removes what it made. Exit code 1 if one failed.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from typing import Any

NAMES = {
    "packet": "ns per packet of the program at the pod, over an empty program",
    "verdict": "ns per verdict at 10, 1,000 and 10,000 rules; share of a first packet",
    "balancer": "ns per packet of XDP's balancer, over one that sends the frame back",
    "explain": "questions to explain --batch a second, to the kernel and to the specification",
    "events": "events a second, written on one core, decoded on the other",
    "sweep": "one sweep over 500,000 connections, and what a packet notices of it",
    "publish": "saved policy file to enforced, 1,000 pods known",
    "bigapi": "an agent among 1,000 nodes and 50,000 pods: CPU, memory, delay of changes",
    "compile": "10,000 services and 50,000 endpoints into a node's tables; one more change",
    "firewall": "ns per packet dropped and passed with 10 and a million prefixes; load, one more",
    "daytwo": "an agent on a node with 110 pods, idle and with 10 pod changes a second",
    "cni": "CNI ADD and DEL beside the bridge plugin with host-local",
    "proxy": "services beside kube-proxy: connections, changes, start",
    "net": "pod to pod: throughput, latency, connections; bare veth, bridge and Lockgate",
}
WIDTH = 100


def table(result: dict[str, Any]) -> str:
    """A result's rows as text, at most WIDTH columns: what is beyond goes below, by the same
    first column."""
    rows = [result["columns"]]
    rows += [[_cell(row.get(name)) for name in result["columns"]] for row in result["rows"]]
    columns = [_aligned(cells, number == 0) for number, cells in enumerate(zip(*rows, strict=True))]
    blocks = [columns[:1]]
    for column in columns[1:]:
        if sum(len(one[0]) + 2 for one in [*blocks[-1], column]) > WIDTH:
            blocks.append(columns[:1])
        blocks[-1].append(column)
    lines = [f"{result['title']}"]
    for block in blocks:
        lines += ["  " + "  ".join(cells).rstrip() for cells in zip(*block, strict=True)]
    lines += [f"  {note}"[:WIDTH] for note in result.get("notes", ())]
    return "\n".join(lines)


def _aligned(cells: tuple[str, ...], left: bool) -> list[str]:
    width = max(map(len, cells))
    return [cell.ljust(width) if left else cell.rjust(width) for cell in cells]


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return (
            f"{value:.2f}"
            if abs(value) < 10
            else f"{value:,.1f}"
            if abs(value) < 1000
            else f"{value:,.0f}"
        )
    return f"{value:,}" if isinstance(value, int) else str(value)


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="make bench",
        description="Figures of Lockgate.",
        epilog="; ".join(f"{name}: {text}" for name, text in NAMES.items()),
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument("--quick", action="store_true", help="fewer rounds, to see that it works")
    options = parser.parse_args()
    unknown = [name for name in options.names if name not in NAMES]
    if unknown:
        parser.error(f"no benchmark {unknown[0]}; there are {', '.join(NAMES)}")
    if os.geteuid() != 0:
        parser.error("this needs root (namespaces and eBPF)")
    if not options.json:
        print(f"Linux {platform.release()}, {platform.machine()}, {os.cpu_count()} cores\n")
    results, failed = [], False
    for name in options.names or NAMES:
        command = [sys.executable, "-m", f"bench.{name}", *(["--quick"] if options.quick else [])]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            print(f"bench {name} failed (exit code {done.returncode})", file=sys.stderr)
            failed = True
            continue
        for line in done.stdout.splitlines():
            result = json.loads(line)
            results.append(result)
            if not options.json:
                print(table(result) + "\n", flush=True)
    if options.json:
        print(
            json.dumps({"kernel": platform.release(), "cores": os.cpu_count(), "results": results})
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
