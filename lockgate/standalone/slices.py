"""EndpointSlices of services with a selector, as the API's controller would make them."""

from __future__ import annotations

from collections.abc import Mapping

from lockgate.objects.model import (
    Endpoint,
    EndpointConditions,
    EndpointHints,
    EndpointPort,
    EndpointSlice,
    ForNode,
    ForZone,
    Node,
    ObjectMeta,
    ObjectReference,
    OwnerReference,
    Pod,
    Service,
    ServicePort,
)
from lockgate.standalone.memory import Key

__all__ = ["SERVICE_LABEL", "endpoint_slices"]

SERVICE_LABEL = "kubernetes.io/service-name"
_NONE: Mapping[str, Node] = {}


def endpoint_slices(
    services: Mapping[Key, Service], pods: Mapping[Key, Pod], nodes: Mapping[str, Node] = _NONE
) -> dict[Key, EndpointSlice]:
    """The slices of every service with a selector: one per family and set of port numbers.

    Pods whose named targetPort has different numbers are in different slices. Pods that are not
    ready are listed with ready: false, as the API does; pods that end as terminating. `nodes` say
    in which zones they are.
    """
    by_namespace: dict[str, list[Pod]] = {}
    for key in sorted(pods):
        pod = pods[key]
        if pod.ips and not pod.finished:
            by_namespace.setdefault(key[0], []).append(pod)
    result: dict[Key, EndpointSlice] = {}
    for key in sorted(services):
        service = services[key]
        spec = service.spec
        if not spec.selector or spec.type == "ExternalName":
            continue
        members = [
            pod
            for pod in by_namespace.get(key[0], ())
            if spec.selector.items() <= pod.metadata.labels.items()
        ]
        for family in spec.ip_families or ["IPv4"]:
            groups: dict[tuple[EndpointPort, ...], list[Endpoint]] = {}
            for pod in members:
                ips = [ip for ip in pod.ips if (":" in ip) == (family == "IPv6")]
                if ips:
                    groups.setdefault(_ports(service, pod), []).append(
                        _endpoint(service, pod, ips[0], nodes.get(pod.spec.node_name))
                    )
            for index, (ports, endpoints) in enumerate(groups.items()):
                name = f"{key[1]}-{family.lower()}" + (f"-{index}" if index else "")
                result[key[0], name] = EndpointSlice(
                    metadata=ObjectMeta(
                        name=name,
                        namespace=key[0],
                        labels={
                            SERVICE_LABEL: key[1],
                            "endpointslice.kubernetes.io/managed-by": "lockgate",
                        },
                        owner_references=[
                            OwnerReference(kind="Service", name=key[1], controller=True)
                        ],
                    ),
                    address_type="IPv6" if family == "IPv6" else "IPv4",
                    endpoints=endpoints,
                    ports=list(ports),
                )
    return result


def _ports(service: Service, pod: Pod) -> tuple[EndpointPort, ...]:
    found = []
    for port in service.spec.ports:
        number = _target(port, pod)
        if number is not None:
            found.append(EndpointPort(port=number, name=port.name, protocol=port.protocol))
    return tuple(found)


def _target(port: ServicePort, pod: Pod) -> int | None:
    """The number on this pod; None when no container of it names such a port."""
    target = port.target_port
    if target is None:
        return port.port
    if isinstance(target, int):
        return target
    for container in pod.spec.containers:
        for candidate in container.ports:
            if candidate.name == target and candidate.protocol == port.protocol:
                return candidate.container_port
    return None


def _endpoint(service: Service, pod: Pod, address: str, node: Node | None) -> Endpoint:
    terminating = pod.metadata.deletion_timestamp is not None
    always = service.spec.publish_not_ready_addresses
    ready = always or (pod.ready and not terminating)
    zone = node.zone if node is not None else ""
    return Endpoint(
        addresses=[address],
        conditions=EndpointConditions(
            ready=ready,
            serving=always or pod.ready,
            terminating=terminating,
        ),
        node_name=pod.spec.node_name,
        target_ref=ObjectReference(
            kind="Pod",
            namespace=pod.metadata.namespace,
            name=pod.metadata.name,
            uid=pod.metadata.uid,
        ),
        zone=zone,
        hints=_hints(service, pod, zone) if ready else EndpointHints(),
    )


def _hints(service: Service, pod: Pod, zone: str) -> EndpointHints:
    """For whom a ready endpoint is meant (Service spec.trafficDistribution)."""
    wanted = service.spec.traffic_distribution
    if not wanted:
        return EndpointHints()
    return EndpointHints(
        for_zones=[ForZone(zone)] if zone else [],
        for_nodes=[ForNode(pod.spec.node_name)] if wanted == "PreferSameNode" else [],
    )
