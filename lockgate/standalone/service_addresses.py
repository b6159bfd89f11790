"""Addresses and ports that services get: cluster IPs, NodePorts, load balancers' addresses.

Those of the manifest, else those of before, else by a hash of the name, so that a cluster gets the
same ones when it is started again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv6Address, ip_address, ip_network
from zlib import crc32

import msgspec

from lockgate.objects.model import (
    LoadBalancerIngress,
    LoadBalancerStatus,
    Node,
    Service,
    ServicePort,
    ServiceStatus,
)
from lockgate.standalone.memory import Key, Memory

__all__ = [
    "BALANCER_CLASS",
    "BALANCER_NET4",
    "BALANCER_NET6",
    "addressed",
    "cluster_families",
    "families",
]

SERVICE_NET4 = "10.96."
SERVICE_NET6 = "fd00:10:96::"
#: The world has routes to these over all nodes (underlay.py).
BALANCER_NET4 = "172.31.255.0/24"
BALANCER_NET6 = "fd00:172:31:255::/112"
#: spec.loadBalancerClass of services that get addresses of those; so do those without one.
BALANCER_CLASS = "lockgate.dev/standalone"
#: What the API server gives by default (--service-node-port-range).
NODE_PORTS = range(30000, 32768)
_HEALTH = " "


def addressed(
    services: Sequence[Service], nodes: Iterable[Node], memory: Memory
) -> tuple[dict[Key, Service], list[str]]:
    """The services as they are with all that they get, and what there is to tell of them."""
    told: list[str] = []
    made = _cluster_ips(services, nodes, memory, told)
    _node_ports(made, memory, told)
    _balancers(made, memory, told)
    return made, told


def _cluster_ips(
    services: Sequence[Service], nodes: Iterable[Node], memory: Memory, told: list[str]
) -> dict[Key, Service]:
    result = {}
    known = {_key(service) for service in services}
    for entry in [entry for entry in memory.addresses if entry[:2] not in known]:
        del memory.addresses[entry]
    taken: dict[str, str] = {}
    for service in services:
        for address in service.cluster_ips:
            name = "/".join(_key(service))
            address = str(ip_address(address))
            if taken.setdefault(address, name) != name:
                told.append(
                    f"Service {name}: spec.clusterIP {address} is also Service {taken[address]}'s"
                )
    for (namespace, service_name, family), address in list(memory.addresses.items()):
        if taken.setdefault(address, f"{namespace}/{service_name}") != (
            f"{namespace}/{service_name}"
        ):
            del memory.addresses[namespace, service_name, family]
    now = cluster_families(nodes)
    memory.families = list(dict.fromkeys([*memory.families, *now]))
    offered = memory.families or ["IPv4"]
    for service in sorted(services, key=_key):
        made = result[_key(service)] = _addressed(service, memory, taken, offered)
        for family in made.spec.ip_families:
            if family not in offered and made.spec.selector:
                told.append(
                    f"Service {'/'.join(_key(service))}: asks for {family}, which no node has pod"
                    " CIDRs of, so it has no backends there"
                )
    return result


def cluster_families(nodes: Iterable[Node]) -> list[str]:
    """The IP families that pods have addresses of, the first node's primary first."""
    cidrs = [cidr for node in nodes for cidr in node.spec.pod_cidrs]
    return list(dict.fromkeys("IPv6" if ":" in cidr else "IPv4" for cidr in cidrs))


def families(service: Service, offered: Sequence[str]) -> list[str]:
    """The service's IP families, the primary first (Service spec.ipFamilies, ipFamilyPolicy).

    Without either: the first that the cluster offers, or the families of the addresses that the
    manifest gives. A second one, where it is preferred, only if the cluster offers it.
    """
    spec = service.spec
    chosen = list(spec.ip_families)
    for address in service.cluster_ips:
        family = "IPv6" if ":" in address else "IPv4"
        if family not in chosen:
            chosen.append(family)
    if not chosen:
        chosen = list(offered[:1])
    if spec.ip_family_policy in ("PreferDualStack", "RequireDualStack") and len(chosen) == 1:
        other = "IPv4" if chosen[0] == "IPv6" else "IPv6"
        if other in offered or spec.ip_family_policy == "RequireDualStack":
            chosen.append(other)
    return chosen


def _addressed(
    service: Service, memory: Memory, taken: dict[str, str], offered: Sequence[str]
) -> Service:
    spec = service.spec
    if spec.type == "ExternalName":
        return service
    chosen = families(service, offered)
    policy = spec.ip_family_policy or ("SingleStack" if len(chosen) == 1 else "RequireDualStack")
    if spec.cluster_ip == "None" or spec.cluster_ips == ["None"]:
        addresses = ["None"]
    else:
        given = {"IPv6" if ":" in ip else "IPv4": ip for ip in service.cluster_ips}
        addresses = []
        for family in chosen:
            entry = (*_key(service), family)
            address = given.get(family) or memory.addresses.get(entry) or ""
            if not address:
                address = _allocate("/".join(_key(service)), family, taken)
                memory.addresses[entry] = address
            addresses.append(address)
    return msgspec.structs.replace(
        service,
        metadata=msgspec.structs.replace(
            service.metadata, uid="service-" + "-".join(_key(service))
        ),
        spec=msgspec.structs.replace(
            spec,
            cluster_ip=addresses[0],
            cluster_ips=addresses,
            ip_families=chosen,
            ip_family_policy=policy,
            ports=[_with_target(port) for port in spec.ports],
        ),
    )


def _key(item: Service) -> Key:
    return item.metadata.namespace, item.metadata.name


def _with_target(port: ServicePort) -> ServicePort:
    if port.target_port is not None:
        return port
    return msgspec.structs.replace(port, target_port=port.port)


def _allocate(name: str, family: str, taken: dict[str, str]) -> str:
    # The first 256 addresses are left for addresses written by hand.
    size = 65536 - 512
    start = crc32(name.encode())
    for step in range(size):
        number = 256 + (start + step) % size
        if family == "IPv4":
            address = f"{SERVICE_NET4}{number >> 8}.{number & 255}"
        else:
            address = str(IPv6Address(f"{SERVICE_NET6}{number:x}"))
        if address not in taken:
            taken[address] = name
            return address
    raise AssertionError("65,024 services have an address: none is left")


# ---- NodePorts ---------------------------------------------------------------------


def _node_ports(made: dict[Key, Service], memory: Memory, told: list[str]) -> None:
    """A number for each port of a service that has NodePorts, and for health checks."""
    wanted = {
        (*key, name): number
        for key, service in sorted(made.items())
        for name, number in _ports_of(service)
    }
    # A number is one service port's, whatever the protocol, but for those written by hand.
    taken: dict[int, str] = {}
    for entry, number in wanted.items():
        if number:
            taken.setdefault(number, "/".join(entry[:2]))
    kept = {
        entry: number
        for entry, number in memory.node_ports.items()
        if not wanted.get(entry, 1) and number not in taken
    }
    taken |= {number: "/".join(entry[:2]) for entry, number in kept.items()}
    for entry, number in wanted.items():
        if not number and entry not in kept:
            kept[entry] = _free_port("/".join(entry), taken)
            taken[kept[entry]] = "/".join(entry[:2])
    memory.node_ports = kept
    by_hand: dict[tuple[int, str], str] = {}
    for key, service in sorted(made.items()):
        spec, name = service.spec, "/".join(key)
        if not any(one[:2] == key for one in wanted):
            continue
        ports = []
        for index, port in enumerate(spec.ports):
            number = port.node_port or kept.get((*key, port.name), 0)
            ports.append(msgspec.structs.replace(port, node_port=number))
            other = by_hand.setdefault((number, port.protocol), name) if number else name
            if other != name:
                told.append(
                    f"Service {name}: spec.ports[{index}].nodePort {number}/{port.protocol} is also"
                    f" Service {other}'s, which keeps it"
                )
        health = spec.health_check_node_port or kept.get((*key, _HEALTH), 0)
        made[key] = msgspec.structs.replace(
            service,
            spec=msgspec.structs.replace(spec, ports=ports, health_check_node_port=health),
        )


def _ports_of(service: Service) -> Iterable[tuple[str, int]]:
    """The NodePorts that it has, by the port's name: 0 where any will do."""
    spec = service.spec
    balanced = spec.type == "LoadBalancer"
    if spec.type == "NodePort" or balanced:
        for port in spec.ports:
            if port.node_port or not balanced or spec.allocate_load_balancer_node_ports:
                yield port.name, port.node_port
    if balanced and spec.external_traffic_policy == "Local":
        yield _HEALTH, spec.health_check_node_port


def _free_port(name: str, taken: Mapping[int, str]) -> int:
    start = crc32(name.encode())
    for step in range(len(NODE_PORTS)):
        number = NODE_PORTS[(start + step) % len(NODE_PORTS)]
        if number not in taken:
            return number
    raise AssertionError(f"{len(NODE_PORTS)} NodePorts are given: none is left")


# ---- Load balancers ----------------------------------------------------------------


def _balancers(made: dict[Key, Service], memory: Memory, told: list[str]) -> None:
    """Addresses of services whose load balancer we are: routers that spread over the nodes."""
    mine = {
        key: service
        for key, service in sorted(made.items())
        if service.spec.type == "LoadBalancer"
        and service.spec.load_balancer_class in ("", BALANCER_CLASS)
    }
    taken: dict[str, str] = {}
    for key, service in mine.items():
        if service.spec.load_balancer_ip:
            address = str(ip_address(service.spec.load_balancer_ip))
            other = taken.setdefault(address, "/".join(key))
            net = ip_network(BALANCER_NET6 if ":" in address else BALANCER_NET4)
            if other != "/".join(key):
                told.append(
                    f"Service {'/'.join(key)}: spec.loadBalancerIP {address} is also Service"
                    f" {other}'s"
                )
            elif ip_address(address) not in net:
                told.append(
                    f"Service {'/'.join(key)}: spec.loadBalancerIP {address} is not of {net}, so"
                    " nobody outside has a route to it"
                )
    kept: dict[tuple[str, str, str], str] = {}
    for (namespace, name, family), address in memory.balancers.items():
        if (namespace, name) in mine and address not in taken:
            kept[namespace, name, family] = address
            taken[address] = f"{namespace}/{name}"
    for key, service in mine.items():
        ingress = []
        for family in service.spec.ip_families:
            asked = service.spec.load_balancer_ip
            if asked and (":" in asked) == (family == "IPv6"):
                address = str(ip_address(asked))
                kept.pop((*key, family), None)
            else:
                entry = (*key, family)
                if entry not in kept:
                    kept[entry] = _free_address("/".join(key), family, taken)
                address = kept[entry]
            ingress.append(LoadBalancerIngress(address, "VIP"))
        status = ServiceStatus(LoadBalancerStatus(ingress))
        made[key] = msgspec.structs.replace(service, status=status)
    memory.balancers = kept


def _free_address(name: str, family: str, taken: dict[str, str]) -> str:
    """The first 64 addresses are left for those written by hand."""
    base = ip_network(BALANCER_NET4 if family == "IPv4" else BALANCER_NET6)[0]
    size = 190 if family == "IPv4" else 65000
    start = crc32(name.encode())
    for step in range(size):
        address = str(base + 64 + (start + step) % size)
        if address not in taken:
            taken[address] = name
            return address
    raise AssertionError(f"{size} services have a load balancer's {family} address: none is left")
