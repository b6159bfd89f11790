"""Where services and hostPorts are asked: addresses, ports, and of what kind."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from typing import Literal, NamedTuple

from lockgate.compile.cidr import pack
from lockgate.compile.tables import PROTOCOL_NUMBER, ServiceKey
from lockgate.objects.address import is_ipv4, is_special
from lockgate.objects.model import ContainerPort, Node, Pod, Service

__all__ = ["LOOPBACK", "Ask", "has_host_ports", "of_pod", "of_service", "own_addresses"]

Kind = Literal["cluster", "balancer", "external", "node", "loopback"]
LOOPBACK = (pack("127.0.0.1"), pack("::1"))
_ANY = (pack("0.0.0.0"), pack("::"))


class Ask(NamedTuple):
    """One entry that a service or pod wants: for its port with this index."""

    kind: Kind
    key: ServiceKey
    port: int


def own_addresses(node: Node | None, cards: Iterable[bytes]) -> tuple[bytes, ...]:
    """A node's own, of its object and of its cards, by which others can reach it."""
    found = set(cards)
    for entry in node.status.addresses if node is not None else ():
        if entry.type in ("InternalIP", "ExternalIP"):
            with contextlib.suppress(ValueError):  # told of by whoever reads the nodes
                found.add(pack(entry.address))
    return tuple(sorted(address for address in found if not is_special(address)))


def has_host_ports(pod: Pod) -> bool:
    return any(port.host_port for one in pod.spec.containers for port in one.ports)


def of_service(service: Service, own: Iterable[bytes], errors: list[str]) -> list[Ask]:
    """In the order in which they count, where two are the same. `own` are the node's addresses;
    families are those of the cluster IPs."""
    spec = service.spec
    found: list[Ask] = []
    places: dict[bytes, Kind] = {}
    fields: tuple[tuple[str, Kind, list[str]], ...] = (
        ("spec.clusterIPs", "cluster", service.cluster_ips),
        ("status.loadBalancer.ingress", "balancer", service.load_balancer_ips),
        ("spec.externalIPs", "external", spec.external_ips),
    )
    title = f"Service {service.metadata.namespace}/{service.metadata.name}"
    for field, kind, texts in fields:
        for text in texts:
            try:
                address = pack(text)
            except ValueError as error:
                errors.append(f"{title}: {field}: {error}")
                continue
            if kind != "cluster" and is_special(address):
                errors.append(f"{title}: {field}: {text} is an address that nobody outside reaches")
            else:
                places.setdefault(address, kind)
    families = {is_ipv4(address) for address, kind in places.items() if kind == "cluster"}
    if len(families) == 1:
        own = [address for address in own if is_ipv4(address) in families]
    if not families:
        return []
    node_ports = spec.type in ("NodePort", "LoadBalancer")
    for index, port in enumerate(spec.ports):
        protocol = PROTOCOL_NUMBER[port.protocol]
        for address, kind in places.items():
            if is_ipv4(address) in families:
                found.append(Ask(kind, (address, port.port, protocol), index))
        if port.node_port and node_ports:
            found += [Ask("node", (a, port.node_port, protocol), index) for a in own]
            found += [
                Ask("loopback", (address, port.node_port, protocol), index)
                for address in LOOPBACK
                if is_ipv4(address) in families
            ]
    found.sort(key=lambda ask: ask.kind not in ("cluster", "balancer"))
    return found


def of_pod(
    pod: Pod, addresses: Iterable[bytes], own: Iterable[bytes], errors: list[str]
) -> list[tuple[Ask, ContainerPort]]:
    """A pod's hostPorts on this node, in the families of its `addresses`."""
    found = []
    families = {is_ipv4(address) for address in addresses}
    index = -1
    for container in pod.spec.containers:
        for port in container.ports:
            index += 1
            if not port.host_port:
                continue
            title = f"Pod {'/'.join(pod.key)}: spec.containers.ports"
            if not 0 < port.host_port <= 65535 or not 0 < port.container_port <= 65535:
                errors.append(f"{title}.hostPort: {port.host_port} is no port")
                continue
            places = [*own, *LOOPBACK]
            if port.host_ip:
                try:
                    wanted = pack(port.host_ip)
                except ValueError as error:
                    errors.append(f"{title}.hostIP: {error}")
                    continue
                if wanted in _ANY:
                    places = [a for a in places if is_ipv4(a) == is_ipv4(wanted)]
                elif wanted in places:
                    places = [wanted]
                else:
                    errors.append(f"{title}.hostIP: {port.host_ip} is no address of this node")
                    continue
            for address in places:
                if is_ipv4(address) not in families:
                    continue
                kind: Kind = "loopback" if address in LOOPBACK else "node"
                key = address, port.host_port, PROTOCOL_NUMBER[port.protocol]
                found.append((Ask(kind, key, index), port))
    return found
