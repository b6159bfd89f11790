"""Prometheus metrics of an observer (docs/metrics.md lists them). Where Hubble has the same, they
have its names and labels, so that its dashboards and alerts go on working."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector

if TYPE_CHECKING:
    from lockgate.observer.server import Observer

__all__ = ["Metrics"]

#: As Hubble names them.
_PROTOCOLS = {1: "ICMPv4", 6: "TCP", 17: "UDP", 58: "ICMPv6", 132: "SCTP"}
_TYPES = {"verdict": "PolicyVerdict", "drop": "Drop"}


class Metrics:
    """The registry of one observer."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self.registry.register(self)

    def text(self) -> bytes:
        """The exposition."""
        return generate_latest(self.registry)

    def describe(self) -> Iterable[Metric]:
        """Nothing: what there is is known when it is collected."""
        return ()

    def collect(self) -> Iterable[Metric]:
        """For the registry: all there is now."""
        yield from self._flows()
        yield from self._verdicts()
        yield from self._process()

    def _flows(self) -> Iterable[Metric]:
        flows = CounterMetricFamily(
            "hubble_flows_processed",
            "Events that were read: verdicts, and packets dropped for other causes",
            labels=["protocol", "type", "subtype", "verdict"],
        )
        dropped = CounterMetricFamily(
            "hubble_drop",
            "Events of packets that were dropped",
            labels=["protocol", "reason"],
        )
        names = self._observer.log.names
        drops: dict[tuple[str, str], int] = {}
        found: dict[tuple[str, str, str], int] = {}
        for kind, count in self._observer.tally.events.items():
            protocol = _PROTOCOLS.get(kind.protocol, "Unknown")
            type_ = names.types.get(kind.type, "")
            verdict = "FORWARDED" if kind.allowed else "DROPPED"
            key = protocol, _TYPES.get(type_, type_), verdict
            found[key] = found.get(key, 0) + count
            if not kind.allowed:
                drop = protocol, names.causes.get(kind.cause, str(kind.cause))
                drops[drop] = drops.get(drop, 0) + count
        for (protocol, type_, verdict), count in sorted(found.items()):
            flows.add_metric([protocol, type_, "", verdict], count)
        for labels, count in sorted(drops.items()):
            dropped.add_metric(labels, count)
        lost = CounterMetricFamily(
            "hubble_lost_events",
            "Events that are missing: the ring was full, or a pod was over its limit",
            labels=["source"],
        )
        counts = self._observer.source.counts()
        lost.add_metric(["ring"], counts["lost"])
        lost.add_metric(["limit"], counts["cut"])
        yield from (flows, dropped, lost)
        yield CounterMetricFamily(
            "lockgate_events", "Events that the programs wrote to the rings", value=counts["events"]
        )
        yield GaugeMetricFamily(
            "lockgate_events_waiting_bytes", "What is in the rings", value=counts["pending"]
        )

    def _verdicts(self) -> Iterable[Metric]:
        verdicts = CounterMetricFamily(
            "lockgate_policy_verdicts",
            "Verdicts by the policy that decided, the first by namespace and name; none: no"
            " policy applied",
            labels=["direction", "verdict", "kind", "namespace", "policy"],
        )
        for one, count in sorted(self._observer.tally.verdicts.items()):
            labels = [one.direction, one.verdict, one.kind, one.namespace, one.name]
            verdicts.add_metric(labels, count)
        yield verdicts

    def _process(self) -> Iterable[Metric]:
        observer = self._observer
        yield GaugeMetricFamily(
            "lockgate_observer_ready", "1 while the rings are read", value=observer.source.ready
        )
        kept = observer.log.next - observer.log.first
        yield GaugeMetricFamily("lockgate_flows_kept", "Flows that can be asked for", value=kept)
        yield CounterMetricFamily(
            "lockgate_journal_damaged_lines",
            "Lines of the journal that could not be read",
            value=observer.journal.damaged,
        )
