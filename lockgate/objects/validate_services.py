"""What the API server checks of Services and EndpointSlices
(k8s.io/kubernetes/pkg/apis/{core,discovery}/validation)."""

from __future__ import annotations

from lockgate.objects.address import is_ipv4, is_special
from lockgate.objects.checks import (
    check_address,
    check_cidr,
    check_metadata,
    check_one_of,
    check_one_per_family,
    check_unique,
)
from lockgate.objects.errors import FieldError
from lockgate.objects.model import (
    FORWARDING,
    LEAST_SLOT_BITS,
    MOST_SLOT_BITS,
    SLOTS,
    EndpointSlice,
    Service,
    read_slots,
)
from lockgate.objects.names import (
    check_dns_label,
    check_dns_name,
    check_label_key,
    check_labels,
    check_port,
    check_service_name,
)

__all__ = ["check_endpoint_slice", "check_service"]


def check_service(item: Service) -> None:
    check_metadata(item.metadata, check_service_name)
    spec = item.spec
    check_one_of(spec.type, ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"), "spec.type")
    check_labels(spec.selector, "spec.selector")
    headless = "None" in (spec.cluster_ip, *spec.cluster_ips)
    if spec.type == "ExternalName":
        check_dns_name(spec.external_name.removesuffix("."), "spec.externalName")
        if spec.cluster_ip or spec.cluster_ips:
            raise FieldError(
                "spec.clusterIP",
                "none in a service of type ExternalName",
                spec.cluster_ip or spec.cluster_ips[0],
            )
    elif not spec.ports and not headless:
        raise FieldError("spec.ports", "at least one port", [])
    if headless and spec.type != "ClusterIP" and spec.type != "ExternalName":
        raise FieldError("spec.clusterIP", f"an address, as the type is {spec.type}", "None")
    if spec.cluster_ip and spec.cluster_ip != "None":
        check_address(spec.cluster_ip, "spec.clusterIP")
    if spec.cluster_ips and spec.cluster_ips != ["None"]:
        for index, ip in enumerate(spec.cluster_ips):
            check_address(ip, f"spec.clusterIPs[{index}]")
        check_one_per_family(spec.cluster_ips, "spec.clusterIPs")
    if spec.cluster_ip and spec.cluster_ips and spec.cluster_ip != spec.cluster_ips[0]:
        raise FieldError("spec.clusterIPs[0]", "the same as spec.clusterIP", spec.cluster_ips[0])
    for index, family in enumerate(spec.ip_families):
        check_one_of(family, ("IPv4", "IPv6"), f"spec.ipFamilies[{index}]")
    check_unique((family, f"spec.ipFamilies[{i}]") for i, family in enumerate(spec.ip_families))
    if spec.ip_family_policy:
        check_one_of(
            spec.ip_family_policy,
            ("SingleStack", "PreferDualStack", "RequireDualStack"),
            "spec.ipFamilyPolicy",
        )
    if spec.internal_traffic_policy:
        check_one_of(
            spec.internal_traffic_policy, ("Cluster", "Local"), "spec.internalTrafficPolicy"
        )
    if spec.session_affinity:
        check_one_of(spec.session_affinity, ("None", "ClientIP"), "spec.sessionAffinity")
    timeout = spec.session_affinity_config.client_ip.timeout_seconds
    if not 0 < timeout <= 86400:
        path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        raise FieldError(path, "seconds, from 1 to 86400", timeout)
    _traffic(item)
    _service_ports(item)


def _traffic(item: Service) -> None:
    """What it says of clients outside, and of which backends are near."""
    spec = item.spec
    balanced = spec.type == "LoadBalancer"
    for index, ip in enumerate(spec.external_ips):
        path = f"spec.externalIPs[{index}]"
        if is_special(check_address(ip, path)):
            raise FieldError(path, "an address that clients outside can reach", ip)
    if spec.external_traffic_policy:
        path = "spec.externalTrafficPolicy"
        check_one_of(spec.external_traffic_policy, ("Cluster", "Local"), path)
        if spec.type not in ("NodePort", "LoadBalancer") and not spec.external_ips:
            raise FieldError(
                path,
                f"none, as the type is {spec.type} and there are no externalIPs",
                spec.external_traffic_policy,
            )
    for field, value in (
        ("loadBalancerIP", spec.load_balancer_ip),
        ("loadBalancerClass", spec.load_balancer_class),
        ("loadBalancerSourceRanges", spec.load_balancer_source_ranges),
        ("allocateLoadBalancerNodePorts", not spec.allocate_load_balancer_node_ports),
    ):
        if value and not balanced:
            raise FieldError(f"spec.{field}", f"none, as the type is {spec.type}")
    if spec.load_balancer_ip:
        check_address(spec.load_balancer_ip, "spec.loadBalancerIP")
    if spec.load_balancer_class:
        check_label_key(spec.load_balancer_class, "spec.loadBalancerClass")
    for index, cidr in enumerate(spec.load_balancer_source_ranges):
        check_cidr(cidr.strip(), f"spec.loadBalancerSourceRanges[{index}]")
    port = spec.health_check_node_port
    if not 0 <= port <= 65535:
        raise FieldError("spec.healthCheckNodePort", "a port number from 1 to 65535", port)
    if port and not (balanced and spec.external_traffic_policy == "Local"):
        raise FieldError(
            "spec.healthCheckNodePort",
            "none, but for type LoadBalancer and externalTrafficPolicy Local",
            port,
        )
    if spec.traffic_distribution:
        check_one_of(
            spec.traffic_distribution,
            ("PreferClose", "PreferSameZone", "PreferSameNode"),
            "spec.trafficDistribution",
        )
    mode = item.metadata.annotations.get(FORWARDING)
    if mode is not None:
        check_one_of(mode, ("dsr", "snat"), f"metadata.annotations[{FORWARDING}]")
    slots = item.metadata.annotations.get(SLOTS)
    if slots is not None and read_slots(slots) is None:
        raise FieldError(
            f"metadata.annotations[{SLOTS}]",
            f"a power of two from {1 << LEAST_SLOT_BITS} to {1 << MOST_SLOT_BITS}",
            slots,
        )
    for index, ingress in enumerate(item.status.load_balancer.ingress):
        if ingress.ip:
            check_address(ingress.ip, f"status.loadBalancer.ingress[{index}].ip")


def _service_ports(item: Service) -> None:
    ports = item.spec.ports
    for index, port in enumerate(ports):
        path = f"spec.ports[{index}]"
        check_port(port.port, f"{path}.port")
        if port.target_port is not None:
            check_port(port.target_port, f"{path}.targetPort")
        if not 0 <= port.node_port <= 65535:
            raise FieldError(f"{path}.nodePort", "a port number from 1 to 65535", port.node_port)
        if port.node_port and item.spec.type not in ("NodePort", "LoadBalancer"):
            raise FieldError(
                f"{path}.nodePort", f"none, as the type is {item.spec.type}", port.node_port
            )
        if port.name:
            check_dns_label(port.name, f"{path}.name")
        elif len(ports) > 1:
            raise FieldError(f"{path}.name", "a name, as there is more than one port", "")
    check_unique((port.name, f"spec.ports[{index}].name") for index, port in enumerate(ports))
    check_unique((f"{p.port}/{p.protocol}", f"spec.ports[{i}].port") for i, p in enumerate(ports))
    check_unique(
        (f"{p.node_port}/{p.protocol}", f"spec.ports[{i}].nodePort")
        for i, p in enumerate(ports)
        if p.node_port
    )


def check_endpoint_slice(item: EndpointSlice) -> None:
    check_metadata(item.metadata, check_dns_name)
    for index, endpoint in enumerate(item.endpoints):
        path = f"endpoints[{index}].addresses"
        if not endpoint.addresses:
            raise FieldError(path, "at least one address", [])
        for number, address in enumerate(endpoint.addresses):
            if item.address_type == "FQDN":
                check_dns_name(address, f"{path}[{number}]")
            elif is_ipv4(check_address(address, f"{path}[{number}]")) != (
                item.address_type == "IPv4"
            ):
                raise FieldError(f"{path}[{number}]", f"an {item.address_type} address", address)
    for index, port in enumerate(item.ports):
        if port.name:
            check_dns_label(port.name, f"ports[{index}].name")
        if port.port is not None:
            check_port(port.port, f"ports[{index}].port")
    check_unique((port.name, f"ports[{index}].name") for index, port in enumerate(item.ports))
