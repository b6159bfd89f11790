"""Prometheus metrics of an agent (docs/metrics.md lists them)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["Metrics"]

_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10)
#: count in status → help
_SIZES = {
    "endpoints": "Pods of this node that are wired",
    "peers": "Addresses of pods and nodes in the kernel's table",
    "services": "Service addresses and ports in the kernel's table",
    "backends": "Backends of services in the kernel's table",
    "hops": "Other nodes that packets can be sent to",
    "imageWords": "Size of the verdict image in words of 8 bytes",
}


class Metrics:
    """The registry of one agent, and what is measured while it happens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.publish = Histogram(
            "lockgate_publish_seconds",
            "From a change's turn until it is in force",
            buckets=_BUCKETS,
            registry=self.registry,
        )
        self.endpoint = Histogram(
            "lockgate_endpoint_request_seconds",
            "Requests for endpoints (CNI ADD, DEL), by operation and result",
            ["operation", "result"],
            buckets=_BUCKETS,
            registry=self.registry,
        )

    @contextlib.contextmanager
    def request(self, operation: str) -> Iterator[None]:
        """Measures a request for an endpoint."""
        began, result = time.perf_counter(), "error"
        try:
            yield
            result = "ok"
        finally:
            self.endpoint.labels(operation, result).observe(time.perf_counter() - began)

    async def text(self, agent: Agent) -> bytes:
        """The exposition."""
        status = await agent.status()

        class Now:
            def collect(self) -> Iterable[Metric]:
                return list(_families(status, agent))

        registry = CollectorRegistry()
        registry.register(Now())
        return generate_latest(self.registry) + generate_latest(registry)


def _families(status: dict[str, Any], agent: Agent) -> Iterable[Metric]:
    def gauge(name: str, text: str, value: float) -> Metric:
        return GaugeMetricFamily(f"lockgate_{name}", text, value=value)

    def counter(name: str, text: str, value: float) -> Metric:
        return CounterMetricFamily(f"lockgate_{name}", text, value=value)

    for key, text in _SIZES.items():
        name = "image_words" if key == "imageWords" else key
        yield gauge(name, text, status["counts"].get(key, 0))
    yield gauge("epoch", "Number of the state in force", status["epoch"])
    yield gauge("revision", "The last change of objects that is known", status["revision"])
    yield gauge("applied_revision", "The last change that is in force", status["applied"])
    yield gauge("errors", "What is wrong at present, see `lockgate status`", len(status["errors"]))
    yield gauge("source_up", "1 while changes of objects are heard of", status["connected"])
    yield counter("new_connections", "Connections whose first packet went on", status["forwarded"])
    drops = CounterMetricFamily("lockgate_drop_count", "Packets dropped", labels=["reason"])
    for reason, value in sorted(status["drops"].items()):
        drops.add_metric([reason], value)
    yield drops
    yield counter("events", "Verdict events that the programs made", status["events"])
    yield counter(
        "lost_events", "Verdict events for which the ring had no room", status["losses"]["events"]
    )
    yield counter(
        "cut_events",
        "Verdict events about pods that were over their limit",
        status["losses"]["cutEvents"],
    )
    yield counter(
        "unsent_answers",
        "ICMP errors and TCP resets that pods were not sent, over their limit",
        status["losses"]["answers"],
    )
    yield counter(
        "crowded_connections",
        "Connections begun towards pods that were over their limit, tracked apart",
        status["crowded"],
    )
    yield counter(
        "balanced_packets", "Packets that XDP sent on to other nodes' backends", status["balanced"]
    )
    attached = GaugeMetricFamily(
        "lockgate_xdp", "1 for each card where XDP runs", labels=["card", "mode"]
    )
    for one in status["xdp"]:
        if one["mode"] != "none":
            attached.add_metric([one["card"], one["mode"]], 1)
    yield attached
    entries = GaugeMetricFamily("lockgate_firewall_entries", "Entries of the firewall")
    entries.add_metric([], (status["firewall"] or {}).get("entries", 0))
    yield entries
    yield counter("swept_connections", "Dead connections swept", status["counts"]["swept"])
    yield counter(
        "repaired_links",
        "Pods' links whose programs others had removed or come before, put right",
        status["counts"]["repaired"],
    )
    kinds: dict[str, dict[str, int]] = status["api"].get("kinds", {})
    if not kinds:
        return
    objects = GaugeMetricFamily("lockgate_api_objects", "Objects known", labels=["resource"])
    skipped = GaugeMetricFamily(
        "lockgate_api_objects_skipped", "Objects that can't be read", labels=["resource"]
    )
    received = CounterMetricFamily(
        "lockgate_api_received_bytes", "Bytes that lists and watches cost", labels=["resource"]
    )
    asked = CounterMetricFamily(
        "lockgate_api_requests", "Lists and watches begun", labels=["resource", "verb"]
    )
    events = CounterMetricFamily(
        "lockgate_api_watch_events",
        "Events of watches; the unchanged ones say nothing that is used",
        labels=["resource", "changed"],
    )
    for resource, one in kinds.items():
        objects.add_metric([resource], one["objects"])
        skipped.add_metric([resource], one["skipped"])
        received.add_metric([resource], one["bytes"])
        asked.add_metric([resource, "list"], one["lists"])
        asked.add_metric([resource, "watch"], one["watches"])
        events.add_metric([resource, "true"], one["events"] - one["same"])
        events.add_metric([resource, "false"], one["same"])
    yield from (objects, skipped, received, asked, events)
