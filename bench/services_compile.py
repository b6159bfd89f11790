"""What a node's compilation of many services costs: from nothing, and by the change.

Times are of the processor, on which others may be as busy as they like.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
import tracemalloc

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


def measure(services: int, each: int, kind: str) -> None:
    of, ids = cluster(services, each, kind), Ids()
    ids.hops = {f"node-{n}": n + 8 for n in range(1, NODES)}
    host = Host(frozenset((parse_address("172.16.0.1"), parse_address("198.51.100.1"))))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    tables = compile_node(of, "node-0", ids, host=host)
    cold = time.process_time() - began
    grew = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    times = []
    for number in range(200):
        key = "bench", f"svc-{number * 7919 % services}-1"
        one = of.slices[key]
        of.slices[key] = msgspec.structs.replace(one, endpoints=one.endpoints[1:] or one.endpoints)
        began = time.process_time()
        tables = compile_node(of, "node-0", ids, tables, Changed(slices={key}), host)
        times.append((time.process_time() - began) * 1e3)
        of.slices[key] = one
        tables = compile_node(of, "node-0", ids, tables, Changed(slices={key}), host)
    cuts = statistics.quantiles(times, n=100)
    print(
        f"{kind:12} {services:6} services of {each:4}: cold {cold:6.2f} s, +{grew:5.0f} MB at most,"
        f" image {len(tables.image) * 8 / 2**20:5.0f} MB, {len(tables.services)} entries;"
        f" a slice {cuts[49]:6.2f} ms, p99 {cuts[98]:6.2f} ms"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--services", type=int, default=10_000)
    parser.add_argument("--each", type=int, default=5)
    parser.add_argument("--type", default="ClusterIP NodePort LoadBalancer")
    parser.add_argument("--trace", action="store_true", help="where memory goes")
    options = parser.parse_args()
    if options.trace:
        tracemalloc.start()
    for kind in options.type.split():
        measure(options.services, options.each, kind)
    if options.trace:
        for line in tracemalloc.take_snapshot().statistics("lineno")[:15]:
            print(line)


if __name__ == "__main__":
    main()
