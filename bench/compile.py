"""What a node's compilation of many services costs: from nothing, and by the change.

Times are of the processor, on which others may be as busy as they like.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from typing import Any

import msgspec

from lockgate.compile import Host, compile_node
from lockgate.objects.address import parse_address
from lockgate.objects.changes import Changed
from lockgate.objects.model import (
    Cluster,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    LoadBalancerIngress,
    LoadBalancerStatus,
    Node,
    NodeAddress,
    NodeStatus,
    ObjectMeta,
    Pod,
    PodIP,
    PodSpec,
    PodStatus,
    Service,
    ServicePort,
    ServiceSpec,
    ServiceStatus,
)
from tests.changes import Ids

NODES = 100
READY = EndpointConditions(True, True, False)


def cluster(services: int, each: int, kind: str) -> Cluster:
    """`kind`: the services' type. Each has `each` endpoints of its own."""
    found = Cluster()
    for n in range(NODES):
        address = NodeAddress("InternalIP", f"172.16.0.{n + 1}")
        found.nodes[f"node-{n}"] = Node(
            metadata=ObjectMeta(name=f"node-{n}"), status=NodeStatus(addresses=[address])
        )
    for s in range(services):
        key = "bench", f"svc-{s}"
        balanced = kind == "LoadBalancer"
        found.services[key] = Service(
            metadata=ObjectMeta(namespace=key[0], name=key[1]),
            spec=ServiceSpec(
                type=kind,
                cluster_ips=[f"10.{100 + s // 65536}.{s // 256 % 256}.{s % 256}"],
                ports=[
                    ServicePort(
                        port=80, name="http", node_port=0 if kind == "ClusterIP" else 20000 + s
                    )
                ],
            ),
            status=ServiceStatus(
                LoadBalancerStatus(
                    [LoadBalancerIngress(f"203.{s // 65536}.{s // 256 % 256}.{s % 256}")] * balanced
                )
            ),
        )
        endpoints = []
        for e in range(each):
            number = s * each + e
            ip = f"10.{number // 65536}.{number // 256 % 256}.{number % 256}"
            node = f"node-{number % NODES}"
            name = f"pod-{number}"
            found.pods["bench", name] = Pod(
                metadata=ObjectMeta(namespace="bench", name=name, uid=name),
                spec=PodSpec(node_name=node),
                status=PodStatus(phase="Running", pod_ips=[PodIP(ip)]),
            )
            endpoints.append(Endpoint([ip], READY, node))
        slice_ = EndpointSlice(
            metadata=ObjectMeta(
                namespace="bench",
                name=f"svc-{s}-1",
                labels={"kubernetes.io/service-name": key[1]},
            ),
            endpoints=endpoints,
            ports=[EndpointPort(8080, "http")],
        )
        found.slices["bench", f"svc-{s}-1"] = slice_
    return found


def measure(services: int, each: int, kind: str, changes: int) -> dict[str, Any]:
    of, ids = cluster(services, each, kind), Ids()
    ids.hops = {f"node-{n}": n + 8 for n in range(1, NODES)}
    host = Host(frozenset((parse_address("172.16.0.1"), parse_address("198.51.100.1"))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    tables = compile_node(of, "node-0", ids, host=host)
    cold = time.process_time() - began
    grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    times = []
    for number in range(changes):
        key = "bench", f"svc-{number * 7919 % services}-1"
        one = of.slices[key]
        of.slices[key] = msgspec.structs.replace(one, endpoints=one.endpoints[1:] or one.endpoints)
        began = time.process_time()
        tables = compile_node(of, "node-0", ids, tables, Changed(slices={key}), host)
        times.append((time.process_time() - began) * 1e3)
        of.slices[key] = one
        tables = compile_node(of, "node-0", ids, tables, Changed(slices={key}), host)
    cuts = statistics.quantiles(times, n=100)
    return {
        "type": kind,
        "services": services,
        "endpoints": services * each,
        "entries": len(tables.services),
        "image MB": len(tables.image) * 8 / 2**20,
        "cold s": cold,
        "grew MB": grew,
        "slice ms": cuts[49],
        "p99 ms": cuts[98],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--one", metavar="TYPE:SERVICES:EACH", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        kind, services, each = options.one.split(":")
        print(json.dumps(measure(int(services), int(each), kind, 50 if options.quick else 300)))
        return
    shapes = [("ClusterIP", 10_000, 5), ("NodePort", 10_000, 5), ("LoadBalancer", 10_000, 5)]
    shapes += [("LoadBalancer", 100, 100), ("LoadBalancer", 20, 1000)]
    rows = []
    for kind, services, each in shapes[:1] if options.quick else shapes:
        # Each in a process of its own, for its memory.
        command = [sys.executable, "-m", "bench.compile", "--one", f"{kind}:{services}:{each}"]
        done = subprocess.run(
            [*command, *(["--quick"] if options.quick else [])],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        rows.append(json.loads(done.stdout))
    print(
        json.dumps(
            {
                "name": "compile",
                "title": "Services into a node's tables",
                "columns": list(rows[0]),
                "rows": rows,
                "notes": [
                    "cold: from nothing, pods included; processor time, as all here",
                    "grew: resident memory at most, over the objects",
                    "slice: a slice loses an endpoint",
                ],
            }
        )
    )


if __name__ == "__main__":
    main()
