"""Where services are asked: their addresses and ports, by kind, and what a name of one means."""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from lockgate.explain.question import QuestionError
from lockgate.objects.address import format_address, parse_address
from lockgate.objects.model import FORWARDING, Cluster, Service, ServicePort

__all__ = [
    "Frontend",
    "Frontends",
    "forwarding",
    "frontends_of",
    "node_addresses",
    "parse_frontend",
    "pods_addresses",
    "unserved",
    "with_forwarding",
]

Kind = Literal["cluster", "balancer", "external", "node"]
_PROTOCOLS = ("TCP", "UDP", "SCTP")
#: Services with one of these labels are for others.
_OTHERS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")


@dataclass(frozen=True, slots=True)
class Frontend:
    """One address, port and protocol of a service. A cluster IP; an address of a load balancer's
    status; an externalIP; or a node port at an address of `node`."""

    kind: Kind
    address: str
    port: int
    protocol: str
    of: ServicePort
    node: str = ""

    @property
    def text(self) -> str:
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}/{self.protocol}"

    def json(self) -> dict[str, Any]:
        return {
            "kind": self.kind,
            "address": self.address,
            "port": self.port,
            "protocol": self.protocol,
            "portName": self.of.name or None,
            "node": self.node or None,
        }


def forwarding(service: Service) -> str:
    """How clients outside reach backends on other nodes, as the annotation says; "" where it does
    not, or nobody outside may ask."""
    spec = service.spec
    outside = spec.type in ("NodePort", "LoadBalancer") or spec.external_ips
    said = service.metadata.annotations.get(FORWARDING, "")
    return said if outside and said in ("dsr", "snat") else ""


def with_forwarding(cluster: Cluster, usual: str) -> Cluster:
    """The cluster as if services that do not say it themselves had the agents' setting."""
    if usual != "snat":
        return cluster
    services = {
        key: service if FORWARDING in service.metadata.annotations else _says(service, usual)
        for key, service in cluster.services.items()
    }
    return msgspec.structs.replace(cluster, services=services)


def _says(service: Service, mode: str) -> Service:
    annotations = {**service.metadata.annotations, FORWARDING: mode}
    metadata = msgspec.structs.replace(service.metadata, annotations=annotations)
    return msgspec.structs.replace(service, metadata=metadata)


def pods_addresses(cluster: Cluster) -> set[str]:
    """What pods have, and so no service that asks for it."""
    hosts = {_plain(ip) for _, ip in node_addresses(cluster)}
    running = (one for one in cluster.pods.values() if not one.finished)
    return {_plain(ip) for one in running if not one.spec.host_network for ip in one.ips} - hosts


def frontends_of(
    cluster: Cluster, service: Service, taken: Container[str] | None = None
) -> list[Frontend]:
    """All that it has, those in the cluster first. Of each family that its cluster IPs have.
    `taken`: pods_addresses(), for who asks for many services."""
    if any(label in service.metadata.labels for label in _OTHERS):
        return []
    families = {":" in ip for ip in service.cluster_ips}
    asked: list[tuple[Kind, str]] = [("balancer", _plain(ip)) for ip in service.load_balancer_ips]
    asked += [("external", _plain(ip)) for ip in service.spec.external_ips]
    if asked and taken is None:
        taken = pods_addresses(cluster)
    fixed: list[tuple[Kind, str]] = [("cluster", _plain(ip)) for ip in service.cluster_ips]
    fixed += [(kind, ip) for kind, ip in asked if taken is None or ip not in taken]
    found = [
        Frontend(kind, ip, port.port, port.protocol, port)
        for kind, ip in fixed
        if (":" in ip) in families
        for port in service.spec.ports
    ]
    if service.spec.type in ("NodePort", "LoadBalancer"):
        found += [
            Frontend("node", ip, port.node_port, port.protocol, port, node)
            for node, ip in node_addresses(cluster)
            if (":" in ip) in families
            for port in service.spec.ports
            if port.node_port
        ]
    return found


def unserved(service: Service) -> str:
    """Why a service has no frontend."""
    label = next((one for one in _OTHERS if one in service.metadata.labels), "")
    if label:
        return f"its label {label} says that it is for others"
    return "it has no cluster IP" if not service.cluster_ips else "it has no ports"


class Frontends:
    """Those of a whole cluster, to be found by what people write."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._at: dict[tuple[str, int, str], tuple[Service, Frontend]] = {}
        #: What no service has, whoever asks for it.
        self.taken = pods_addresses(cluster)
        found = [
            (one.kind not in ("cluster", "balancer"), key, service, one)
            for key, service in cluster.services.items()
            for one in frontends_of(cluster, service, self.taken)
        ]
        # Of two that ask for the same the first has it (lockgate/compile/claims.py).
        for _, _, service, one in sorted(found, key=lambda row: row[:2]):
            self._at.setdefault((one.address, one.port, one.protocol), (service, one))

    def at(self, address: str, port: int, protocol: str) -> tuple[Service, Frontend] | None:
        """What is asked there; None if it is no service's."""
        return self._at.get((_plain(address), port, protocol))

    def find(self, text: str) -> tuple[str, int, str]:
        """Address, port and protocol of `ADDRESS[:PORT][/PROTO]` or `[svc/]NAMESPACE/NAME[:PORT]
        [/PROTO]`, where a service stands for the first of its addresses that clients outside ask
        at, else its first. A port that is not given is the only one there is. QuestionError."""
        name, port, protocol = parse_frontend(text)
        try:
            address = _plain(name)
        except ValueError:
            there = self._of_service(name)
        else:
            there = [one for _, one in self._at.values() if one.address == address]
            if port and (protocol or not any(one.port == port for one in there)):
                return address, port, protocol or "TCP"  # a service's or not: the kernel is asked
        fitting = [
            one
            for one in there
            if (not port or port in (one.port, one.of.port)) and protocol in ("", one.protocol)
        ]
        if not fitting:
            offered = ", ".join(dict.fromkeys(f"{one.port}/{one.protocol}" for one in there))
            raise QuestionError(f"{text}: no such port of a service there; {offered or 'none'} is")
        # Of one address: several of a service are the same to a client.
        fitting = [one for one in fitting if one.address == fitting[0].address]
        if len({(one.port, one.protocol) for one in fitting}) > 1:
            offered = ", ".join(f"{one.port}/{one.protocol}" for one in fitting)
            raise QuestionError(f"{text}: which port? It has {offered}")
        return fitting[0].address, fitting[0].port, fitting[0].protocol

    def _of_service(self, name: str) -> list[Frontend]:
        parts = name.split("/")
        if len(parts) == 3 and parts[0] in ("svc", "service"):
            parts = parts[1:]
        service = self._cluster.services.get((parts[0], parts[-1])) if len(parts) == 2 else None
        if service is None:
            raise QuestionError(
                f"{name}: expected an address, or NAMESPACE/NAME of a service, then [:PORT][/PROTO]"
            )
        there = frontends_of(self._cluster, service, self.taken)
        if not there:
            raise QuestionError(f"service {'/'.join(parts)} is not served: {unserved(service)}")
        order = ("balancer", "external", "node", "cluster")
        return sorted(there, key=lambda one: order.index(one.kind))


def parse_frontend(text: str) -> tuple[str, int, str]:
    """`NAME[:PORT][/PROTO]`: name or address, port or 0, protocol or "". QuestionError."""
    protocol, whole = "", text
    head, slash, tail = text.rpartition("/")
    known = tail.upper() in _PROTOCOLS
    if slash and not known and ":" in head:
        raise QuestionError(f"{whole}: expected one of {', '.join(_PROTOCOLS)} after '/'")
    # A service may have a protocol's name: it is the last of two parts.
    bare = head.removeprefix("svc/").removeprefix("service/")
    if known and any(mark in bare for mark in ":./"):
        text, protocol = head, tail.upper()
    if text.startswith("["):
        name, _, port = text[1:].partition("]")
        port = port.removeprefix(":")
    elif text.count(":") == 1:
        name, _, port = text.partition(":")
    else:
        name, port = text, ""
    if port and not (port.isascii() and port.isdigit() and 1 <= int(port) <= 65535):
        raise QuestionError(f"{whole}: expected a port from 1 to 65535 after ':'")
    return name, int(port or 0), protocol


def node_addresses(cluster: Cluster) -> Iterator[tuple[str, str]]:
    """Name and address of each node, for all of its addresses that others reach it by."""
    for name, node in sorted(cluster.nodes.items()):
        addresses = (a for a in node.status.addresses if a.type in ("InternalIP", "ExternalIP"))
        for ip in dict.fromkeys(_plain(one.address) for one in addresses):
            yield name, ip


def _plain(address: str) -> str:
    return format_address(parse_address(address))
