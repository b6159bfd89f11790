"""What a Service (core/v1) and a hostPort mean: who serves a client that asks at an address.

`choose` says for one node which backends a new connection may get, or why it gets none. Written for
the reader, from the text of the API and from what kube-proxy does where that is silent
(pkg/proxy/topology.go, CategorizeEndpoints); nothing here is fast. It knows

- three places of clients: a `pod` of the node, a process of the `node` itself, and `outside` of it:
  everybody whose packets come by a card, pods of other nodes included;
- the objects as they are now. What goes on of connections that exist is in what `ends`: such a
  backend keeps those that it has, and gets no new one.

It does not know policies, which judge the backend, nor weights and affinity, which choose among
those that are permitted here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Literal

from lockgate.objects.address import contains, format_address, is_ipv4, is_special, parse_address
from lockgate.objects.model import Cluster, Endpoint, ObjectMeta, Pod, Service, ServicePort
from lockgate.spec.policy import pod_at

__all__ = ["Backend", "Choice", "Client", "Frontend", "choose", "own_addresses", "serving"]

LOOPBACK = ("127.0.0.1", "::1")
#: Services and slices with one of these labels are for others, whatever the value.
OTHERS = ("service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless")
Kind = Literal["cluster", "balancer", "external", "node", "loopback"]
Cause = Literal["", "no-backend", "no-local-backend", "source-range", "unknown-service-port"]


@dataclass(frozen=True)
class Client:
    place: Literal["pod", "node", "outside"]
    address: str


@dataclass(frozen=True)
class Frontend:
    address: str
    port: int
    protocol: str


@dataclass(frozen=True)
class Backend:
    address: str
    port: int
    ends: bool = False  # keeps what it has, gets no new connections


@dataclass(frozen=True)
class Choice:
    """Of who begins a connection. `none`: what was asked is no frontend for this client. A refusal
    is told to the client, a drop is silent: another node may serve it, or nobody should know.
    Whatever the verdict, backends that end keep what they have."""

    verdict: Literal["serve", "refuse", "drop", "none"]
    cause: Cause = ""
    backends: frozenset[Backend] = frozenset()
    holder: tuple[str, str, str] | None = None  # kind, namespace, name


NONE = Choice("none")


def choose(
    cluster: Cluster,
    node: str,
    client: Client,
    frontend: Frontend,
    addresses: Collection[str] = (),
) -> Choice:
    """Who serves the client. `addresses` are those of the node's cards, which its Node object may
    not name."""
    asked = format_address(parse_address(frontend.address))
    own = own_addresses(cluster, node, addresses)
    if asked in LOOPBACK and client.place != "node":
        return NONE
    service = _cluster_ip_of(cluster, asked)
    if service is not None:
        if client.place == "outside":
            return NONE  # cluster IPs are for the cluster
        for port in service.spec.ports:
            if (port.port, port.protocol) == (frontend.port, frontend.protocol):
                return _of_service(cluster, node, client, service, port, "cluster", asked)
        return Choice("refuse", "unknown-service-port")
    here = [
        (service, kind, number, port)
        for _, service in _served(cluster)
        for kind, address, number, port in _external(service, own)
        if address == asked and not (kind in ("balancer", "external") and _is_pods(cluster, asked))
    ]
    is_frontend = bool(here)
    # Who may write a service's status gave it a balancer's address; the rest anybody may ask for.
    for service, kind, number, port in sorted(here, key=lambda one: one[1] != "balancer"):
        if (number, port.protocol) == (frontend.port, frontend.protocol):
            return _of_service(cluster, node, client, service, port, kind, asked)
    for key, pod in sorted(cluster.pods.items()):
        for address, number, protocol, backend in _host_ports(pod, node, own):
            if address != asked:
                continue
            is_frontend = True
            if (number, protocol) == (frontend.port, frontend.protocol):
                return Choice("serve", "", frozenset([backend]), ("Pod", *key))
    # Who asks for an address gets its ports that he names, no others: inside the cluster they are
    # whosever they are, and what comes from outside for an address of nobody's has lost its way.
    a_hosts = asked in LOOPBACK or asked in own or asked in _of_nodes(cluster)
    if is_frontend and client.place == "outside" and not a_hosts:
        return Choice("refuse", "unknown-service-port")
    return NONE


# ---- Where services are asked ------------------------------------------------------


def own_addresses(cluster: Cluster, node: str, addresses: Collection[str]) -> set[str]:
    """The node's own addresses that others can reach it by."""
    found = cluster.nodes.get(node)
    texts = [*addresses]
    if found is not None:
        texts += [
            one.address
            for one in found.status.addresses
            if one.type in ("InternalIP", "ExternalIP")
        ]
    own = [parse_address(text) for text in texts]
    return {format_address(address) for address in own if not is_special(address)}


def _of_nodes(cluster: Cluster) -> set[str]:
    return {
        format_address(parse_address(one.address))
        for node in cluster.nodes.values()
        for one in node.status.addresses
        if one.type == "InternalIP"
    }


def _is_pods(cluster: Cluster, address: str) -> bool:
    """What a pod has, no service gets by asking for it."""
    return address not in _of_nodes(cluster) and pod_at(cluster, address) is not None


def _of_others(meta: ObjectMeta) -> bool:
    return any(label in meta.labels for label in OTHERS)


def _served(cluster: Cluster) -> list[tuple[tuple[str, str], Service]]:
    """The services with a cluster IP, by name: of two that want one address and port the first
    has it. Headless ones and ExternalNames have none."""
    return [
        (key, service)
        for key, service in sorted(cluster.services.items())
        if service.cluster_ips and not _of_others(service.metadata)
    ]


def _cluster_ip_of(cluster: Cluster, asked: str) -> Service | None:
    for _, service in _served(cluster):
        if asked in [format_address(parse_address(ip)) for ip in service.cluster_ips]:
            return service
    return None


def _external(
    service: Service, own: Collection[str]
) -> Iterator[tuple[Kind, str, int, ServicePort]]:
    """Where clients outside ask for it, in order: address, port number and what it stands for.
    Only in the families of its cluster IPs."""
    families = {":" in ip for ip in service.cluster_ips}
    at: list[tuple[Kind, str]] = []
    at += [("balancer", ip) for ip in service.load_balancer_ips]
    at += [("external", ip) for ip in service.spec.external_ips]
    for port in service.spec.ports:
        for kind, text in at:
            address = parse_address(text)
            if (":" in text) in families and not is_special(address):
                yield kind, format_address(address), port.port, port
        if port.node_port and service.spec.type in ("NodePort", "LoadBalancer"):
            for ip in sorted(own):
                if (":" in ip) in families:
                    yield "node", ip, port.node_port, port
            for ip in LOOPBACK:
                if (":" in ip) in families:
                    yield "loopback", ip, port.node_port, port


def _host_ports(
    pod: Pod, node: str, own: Collection[str]
) -> Iterator[tuple[str, int, str, Backend]]:
    """Where a pod of the node is asked by its hostPorts. Those of a pod on the host's network are
    the host's own."""
    if pod.spec.node_name != node or pod.spec.host_network or pod.finished:
        return
    for container in pod.spec.containers:
        for port in container.ports:
            if not port.host_port:
                continue
            for address in [*sorted(own), *LOOPBACK]:
                if port.host_ip:
                    wanted = parse_address(port.host_ip)
                    unspecified = wanted in (parse_address("0.0.0.0"), parse_address("::"))
                    if unspecified and is_ipv4(wanted) != (":" not in address):
                        continue
                    if not unspecified and wanted != parse_address(address):
                        continue
                for ip in pod.ips:
                    if (":" in ip) == (":" in address):
                        text = format_address(parse_address(ip))
                        backend = Backend(text, port.container_port)
                        yield address, port.host_port, port.protocol, backend
                        break


# ---- Who serves ----------------------------------------------------------------------


def _of_service(
    cluster: Cluster,
    node: str,
    client: Client,
    service: Service,
    port: ServicePort,
    kind: Kind,
    asked: str,
) -> Choice:
    spec = service.spec
    holder = ("Service", service.metadata.namespace, service.metadata.name)
    ranges = [text.strip() for text in spec.load_balancer_source_ranges]
    # The node itself may always: it is where a load balancer's health checks come from.
    if (
        kind == "balancer"
        and ranges
        and client.place != "node"
        and not _is_in(ranges, client.address)
    ):
        return Choice("drop", "source-range", holder=holder)
    candidates = _endpoints(cluster, service, port, ":" not in asked)
    everyone = spec.publish_not_ready_addresses
    outside = client.place == "outside"
    if outside:
        local = spec.external_traffic_policy == "Local"
    else:
        # At its other addresses clients in the cluster are served as with the policy Cluster.
        local = kind == "cluster" and spec.internal_traffic_policy == "Local"
    here = [one for one in candidates if one[0].node_name == node] if local else candidates
    taking = _taking(here, everyone)
    backends = {Backend(*_address(one)) for one in taking}
    if outside:
        # Every balancer must come to the same, so where it is does not count.
        kept = {
            _address(one) for one in here if port.protocol != "UDP" or _serves(one[0], everyone)
        }
        backends |= {Backend(*one, ends=True) for one in kept - {_address(one) for one in taking}}
    elif not local:
        backends = {Backend(*_address(one)) for one in _near(cluster, node, taking, everyone)}
    if taking:
        return Choice("serve", "", frozenset(backends), holder)
    if local and _taking(candidates, everyone):
        return Choice("drop", "no-local-backend", frozenset(backends), holder)
    return Choice("refuse", "no-backend", frozenset(backends), holder)


def _is_in(ranges: list[str], address: str) -> bool:
    """loadBalancerSourceRanges. All of a family means anybody: of the other family too, where
    that has no ranges of its own."""
    if any(contains(cidr, address) for cidr in ranges):
        return True
    named = any((":" in cidr) == (":" in address) for cidr in ranges)
    return not named and any(cidr.endswith("/0") for cidr in ranges)


def serving(
    cluster: Cluster, service: Service, port: ServicePort, ipv4: bool
) -> frozenset[tuple[str, int]]:
    """The endpoints that serve, wherever they are: who has a flow of UDP to one of them keeps it,
    whomever new clients get now (kube-proxy, pkg/proxy/conntrack/cleanup.go)."""
    found = _endpoints(cluster, service, port, ipv4)
    everyone = service.spec.publish_not_ready_addresses
    return frozenset(_address(one) for one in found if _serves(one[0], everyone))


#: An endpoint and the number that the service's port has there.
Candidate = tuple[Endpoint, int]


def _endpoints(
    cluster: Cluster, service: Service, port: ServicePort, ipv4: bool
) -> list[Candidate]:
    """All endpoints of the service's port, of all its slices."""
    found = []
    for _, one in sorted(cluster.slices.items()):
        if (
            one.metadata.namespace != service.metadata.namespace
            or one.service != service.metadata.name
            or one.address_type != ("IPv4" if ipv4 else "IPv6")
            or _of_others(one.metadata)
        ):
            continue
        for number in one.ports:
            if (number.name, number.protocol) == (port.name, port.protocol) and number.port:
                found += [(endpoint, number.port) for endpoint in one.endpoints]
    return found


def _address(one: Candidate) -> tuple[str, int]:
    """Addresses beyond the first are undefined (EndpointSlice.endpoints.addresses)."""
    return format_address(parse_address(one[0].addresses[0])), one[1]


def _ready(endpoint: Endpoint, everyone: bool) -> bool:
    """Without a condition it is; with publishNotReadyAddresses everybody is."""
    return everyone or endpoint.conditions.ready is not False


def _serves(endpoint: Endpoint, everyone: bool) -> bool:
    conditions = endpoint.conditions
    return everyone or conditions.ready is True or conditions.serving is not False


def _taking(candidates: list[Candidate], everyone: bool) -> list[Candidate]:
    """Those that take new connections: who is ready, or where nobody is, who serves though it is
    terminating."""
    ready = [one for one in candidates if _ready(one[0], everyone)]
    return ready or [
        one for one in candidates if one[0].conditions.terminating and _serves(one[0], everyone)
    ]


def _near(cluster: Cluster, node: str, taking: list[Candidate], everyone: bool) -> list[Candidate]:
    """Those hinted for this node, else those for its zone; all, where one of the ready ones has no
    such hint, or none is for here."""
    ready = [one for one in taking if _ready(one[0], everyone)]
    if not ready:
        return taking
    nodes = [[hint.name for hint in one[0].hints.for_nodes] for one in ready]
    if all(nodes) and any(node in names for names in nodes):
        return [one for one, names in zip(ready, nodes, strict=True) if node in names]
    here = cluster.nodes.get(node)
    zone = here.zone if here is not None else ""
    zones = [[hint.name for hint in one[0].hints.for_zones] for one in ready]
    if all(zones) and any(zone in names for names in zones):
        return [one for one, names in zip(ready, zones, strict=True) if zone in names]
    return taking
