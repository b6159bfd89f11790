"""What the API server checks beyond types (k8s.io/kubernetes/pkg/apis/*/validation).

One function per kind; each raises FieldError with the path inside the object.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

from lockgate.objects.address import is_ipv4, parse_address, parse_cidr
from lockgate.objects.errors import FieldError, one_of
from lockgate.objects.firewall import check_rule
from lockgate.objects.model import (
    Container,
    EndpointSlice,
    Firewall,
    IPBlock,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    Node,
    ObjectMeta,
    Pod,
    PodSpec,
    Probe,
    Service,
    Workload,
)
from lockgate.objects.names import (
    check_dns_label,
    check_dns_name,
    check_label_key,
    check_label_value,
    check_labels,
    check_port,
    check_port_name,
    check_service_name,
)

__all__ = ["CLOSED", "VALIDATORS"]

# RFC 9110, 5.1 and 5.5; a line break in a value would be another header.
_HEADER_NAME = re.compile(r"[-!#$%&'*+.^_`|~0-9A-Za-z]+")
_HEADER_VALUE = re.compile(r"[^\x00-\x08\x0a-\x1f\x7f]*")

# Objects of a kind where an unknown field is an error: a misspelt `from` would allow everybody.
_SELECTORS = ("podSelector", "namespaceSelector")
_CLOSED_IN_PEER = (
    "",
    ".ipBlock",
    *(f".{name}{below}" for name in _SELECTORS for below in ("", ".matchExpressions")),
)
CLOSED: dict[str, frozenset[str]] = {
    "NetworkPolicy": frozenset(
        (
            *("spec", "spec.podSelector", "spec.podSelector.matchExpressions"),
            *("spec.ingress", "spec.ingress.ports", "spec.egress", "spec.egress.ports"),
            *(f"spec.ingress.from{path}" for path in _CLOSED_IN_PEER),
            *(f"spec.egress.to{path}" for path in _CLOSED_IN_PEER),
        )
    ),
    "Firewall": frozenset(
        ("spec", "spec.nodeSelector", "spec.nodeSelector.matchExpressions")
        + ("spec.rules", "spec.rules.ports")
    ),
}


def _metadata(meta: ObjectMeta, check_name: Callable[[str, str], None]) -> None:
    check_name(meta.name, "metadata.name")
    if meta.namespace:
        check_dns_label(meta.namespace, "metadata.namespace")
    check_labels(meta.labels, "metadata.labels")
    for key in meta.annotations:
        check_label_key(key.lower(), "metadata.annotations")


def _namespace(item: Namespace) -> None:
    _metadata(item.metadata, check_dns_label)


def _node(item: Node) -> None:
    _metadata(item.metadata, check_dns_name)
    spec = item.spec
    for index, cidr in enumerate(spec.pod_cidrs):
        _cidr(cidr, f"spec.podCIDRs[{index}]")
    _one_per_family([c.partition("/")[0] for c in spec.pod_cidrs], "spec.podCIDRs")
    if spec.pod_cidr:
        _cidr(spec.pod_cidr, "spec.podCIDR")
        if spec.pod_cidrs and spec.pod_cidrs[0] != spec.pod_cidr:
            raise FieldError("spec.podCIDRs[0]", "the same as spec.podCIDR", spec.pod_cidrs[0])
    for index, address in enumerate(item.status.addresses):
        if address.type in ("InternalIP", "ExternalIP"):
            _address(address.address, f"status.addresses[{index}].address")


# ---- Pods and workloads -----------------------------------------------------


def _pod(item: Pod) -> None:
    _metadata(item.metadata, check_dns_name)
    _pod_spec(item.spec, "spec", ("Always", "OnFailure", "Never"))
    for index, ip in enumerate(item.status.pod_ips):
        _address(ip.ip, f"status.podIPs[{index}].ip")
    _one_per_family([ip.ip for ip in item.status.pod_ips], "status.podIPs")
    if item.status.pod_ip:
        _address(item.status.pod_ip, "status.podIP")


def _pod_spec(spec: PodSpec, path: str, restart: tuple[str, ...]) -> None:
    if not spec.containers:
        raise FieldError(f"{path}.containers", "at least one container", [])
    _unique(
        (container.name, f"{path}.{field}[{index}].name")
        for field, containers in (
            ("initContainers", spec.init_containers),
            ("containers", spec.containers),
        )
        for index, container in enumerate(containers)
    )
    for index, container in enumerate(spec.init_containers):
        _container(container, f"{path}.initContainers[{index}]")
    for index, container in enumerate(spec.containers):
        _container(container, f"{path}.containers[{index}]")
    if spec.node_name:
        check_dns_name(spec.node_name, f"{path}.nodeName")
    check_labels(spec.node_selector, f"{path}.nodeSelector")
    if spec.hostname:
        check_dns_label(spec.hostname, f"{path}.hostname")
    if spec.subdomain:
        check_dns_label(spec.subdomain, f"{path}.subdomain")
    _in(spec.restart_policy, restart, f"{path}.restartPolicy")


def _container(container: Container, path: str) -> None:
    check_dns_label(container.name, f"{path}.name")
    for index, port in enumerate(container.ports):
        check_port(port.container_port, f"{path}.ports[{index}].containerPort")
        if port.name:
            check_port_name(port.name, f"{path}.ports[{index}].name")
    _unique((p.name, f"{path}.ports[{i}].name") for i, p in enumerate(container.ports) if p.name)
    for index, variable in enumerate(container.env):
        if not variable.name or "=" in variable.name or not variable.name.isprintable():
            raise FieldError(f"{path}.env[{index}].name", "a variable name", variable.name)
    if container.readiness_probe is not None:
        _probe(container.readiness_probe, f"{path}.readinessProbe")


def _probe(probe: Probe, path: str) -> None:
    if probe.http_get is not None and probe.tcp_socket is not None:
        raise FieldError(path, "one of httpGet and tcpSocket", {})
    if probe.http_get is not None:
        check_port(probe.http_get.port, f"{path}.httpGet.port")
        for index, header in enumerate(probe.http_get.http_headers):
            where = f"{path}.httpGet.httpHeaders[{index}]"
            if not _HEADER_NAME.fullmatch(header.name):
                raise FieldError(f"{where}.name", "the name of an HTTP header", header.name)
            if not _HEADER_VALUE.fullmatch(header.value):
                raise FieldError(f"{where}.value", "one line of text", header.value)
    if probe.tcp_socket is not None:
        check_port(probe.tcp_socket.port, f"{path}.tcpSocket.port")
    for name, value in (
        ("initialDelaySeconds", probe.initial_delay_seconds),
        ("periodSeconds", probe.period_seconds),
        ("timeoutSeconds", probe.timeout_seconds),
        ("successThreshold", probe.success_threshold),
        ("failureThreshold", probe.failure_threshold),
    ):
        if value < 0:
            raise FieldError(f"{path}.{name}", "a number that is not negative", value)


def _workload(item: Workload) -> None:
    _metadata(item.metadata, check_dns_name)
    spec, template = item.spec, item.spec.template
    for name, count in (
        ("replicas", spec.replicas),
        ("parallelism", spec.parallelism),
        ("completions", spec.completions or 0),
    ):
        if count < 0:
            raise FieldError(f"spec.{name}", "a number that is not negative", count)
    check_labels(template.metadata.labels, "spec.template.metadata.labels")
    if item.kind == "Job":
        _pod_spec(template.spec, "spec.template.spec", ("OnFailure", "Never"))
        return
    _pod_spec(template.spec, "spec.template.spec", ("Always",))
    if spec.selector is None or not (spec.selector.match_labels or spec.selector.match_expressions):
        raise FieldError("spec.selector", "a selector of the template's labels", {})
    _selector(spec.selector, "spec.selector")
    labels = template.metadata.labels
    for key, value in spec.selector.match_labels.items():
        if labels.get(key) != value:
            raise FieldError(
                "spec.template.metadata.labels",
                f"the labels that spec.selector asks for ({key}: {value})",
                labels.get(key),
            )


# ---- Services ---------------------------------------------------------------


def _service(item: Service) -> None:
    _metadata(item.metadata, check_service_name)
    spec = item.spec
    _in(spec.type, ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"), "spec.type")
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
        _address(spec.cluster_ip, "spec.clusterIP")
    if spec.cluster_ips and spec.cluster_ips != ["None"]:
        for index, ip in enumerate(spec.cluster_ips):
            _address(ip, f"spec.clusterIPs[{index}]")
        _one_per_family(spec.cluster_ips, "spec.clusterIPs")
    if spec.cluster_ip and spec.cluster_ips and spec.cluster_ip != spec.cluster_ips[0]:
        raise FieldError("spec.clusterIPs[0]", "the same as spec.clusterIP", spec.cluster_ips[0])
    for index, family in enumerate(spec.ip_families):
        _in(family, ("IPv4", "IPv6"), f"spec.ipFamilies[{index}]")
    _unique((family, f"spec.ipFamilies[{i}]") for i, family in enumerate(spec.ip_families))
    if spec.ip_family_policy:
        _in(
            spec.ip_family_policy,
            ("SingleStack", "PreferDualStack", "RequireDualStack"),
            "spec.ipFamilyPolicy",
        )
    if spec.internal_traffic_policy:
        _in(spec.internal_traffic_policy, ("Cluster", "Local"), "spec.internalTrafficPolicy")
    if spec.session_affinity:
        _in(spec.session_affinity, ("None", "ClientIP"), "spec.sessionAffinity")
    timeout = spec.session_affinity_config.client_ip.timeout_seconds
    if not 0 < timeout <= 86400:
        path = "spec.sessionAffinityConfig.clientIP.timeoutSeconds"
        raise FieldError(path, "seconds, from 1 to 86400", timeout)
    _service_ports(item)


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
    _unique((port.name, f"spec.ports[{index}].name") for index, port in enumerate(ports))
    _unique((f"{p.port}/{p.protocol}", f"spec.ports[{i}].port") for i, p in enumerate(ports))


def _endpoint_slice(item: EndpointSlice) -> None:
    _metadata(item.metadata, check_dns_name)
    for index, endpoint in enumerate(item.endpoints):
        path = f"endpoints[{index}].addresses"
        if not endpoint.addresses:
            raise FieldError(path, "at least one address", [])
        for number, address in enumerate(endpoint.addresses):
            if item.address_type == "FQDN":
                check_dns_name(address, f"{path}[{number}]")
            elif is_ipv4(_address(address, f"{path}[{number}]")) != (item.address_type == "IPv4"):
                raise FieldError(f"{path}[{number}]", f"an {item.address_type} address", address)
    for index, port in enumerate(item.ports):
        if port.name:
            check_dns_label(port.name, f"ports[{index}].name")
        if port.port is not None:
            check_port(port.port, f"ports[{index}].port")
    _unique((port.name, f"ports[{index}].name") for index, port in enumerate(item.ports))


# ---- NetworkPolicy ----------------------------------------------------------


def _network_policy(item: NetworkPolicy) -> None:
    _metadata(item.metadata, check_dns_name)
    spec = item.spec
    _selector(spec.pod_selector, "spec.podSelector")
    if len(spec.policy_types) > 2:
        raise FieldError("spec.policyTypes", "at most Ingress and Egress", spec.policy_types)
    for index, ingress in enumerate(spec.ingress):
        _rule(ingress.from_, "from", ingress.ports, f"spec.ingress[{index}]")
    for index, egress in enumerate(spec.egress):
        _rule(egress.to, "to", egress.ports, f"spec.egress[{index}]")


def _rule(
    peers: list[NetworkPolicyPeer], field: str, ports: list[NetworkPolicyPort], path: str
) -> None:
    for index, port in enumerate(ports):
        _policy_port(port, f"{path}.ports[{index}]")
    for index, peer in enumerate(peers):
        _peer(peer, f"{path}.{field}[{index}]")


def _policy_port(item: NetworkPolicyPort, path: str) -> None:
    if item.port is not None:
        check_port(item.port, f"{path}.port")
    if item.end_port is not None:
        if not isinstance(item.port, int):
            raise FieldError(f"{path}.endPort", "none, as port is not a number", item.end_port)
        if not item.port <= item.end_port <= 65535:
            raise FieldError(
                f"{path}.endPort", f"a number from port ({item.port}) to 65535", item.end_port
            )


def _peer(peer: NetworkPolicyPeer, path: str) -> None:
    if peer.ip_block is not None:
        if peer.pod_selector is not None or peer.namespace_selector is not None:
            raise FieldError(path, "either ipBlock or selectors", "both")
        _ip_block(peer.ip_block, f"{path}.ipBlock")
    elif peer.pod_selector is None and peer.namespace_selector is None:
        raise FieldError(path, "podSelector, namespaceSelector or ipBlock", {})
    if peer.pod_selector is not None:
        _selector(peer.pod_selector, f"{path}.podSelector")
    if peer.namespace_selector is not None:
        _selector(peer.namespace_selector, f"{path}.namespaceSelector")


def _ip_block(block: IPBlock, path: str) -> None:
    outer, length = _cidr(block.cidr, f"{path}.cidr")
    for index, text in enumerate(block.except_):
        inner, deeper = _cidr(text, f"{path}.except[{index}]")
        shift = 128 - length
        inside = int.from_bytes(inner, "big") >> shift == int.from_bytes(outer, "big") >> shift
        if deeper <= length or not inside or (":" in text) != (":" in block.cidr):
            raise FieldError(f"{path}.except[{index}]", f"a block inside {block.cidr}", text)


def _firewall(item: Firewall) -> None:
    _metadata(item.metadata, check_dns_name)
    if item.spec.node_selector is not None:
        _selector(item.spec.node_selector, "spec.nodeSelector")
    for index, rule in enumerate(item.spec.rules):
        check_rule(rule, f"spec.rules[{index}]")


def _selector(selector: LabelSelector, path: str) -> None:
    check_labels(selector.match_labels, f"{path}.matchLabels")
    for index, item in enumerate(selector.match_expressions):
        below = f"{path}.matchExpressions[{index}]"
        check_label_key(item.key, f"{below}.key")
        if item.operator in ("In", "NotIn") and not item.values:
            raise FieldError(f"{below}.values", f"at least one value for {item.operator}", [])
        if item.operator in ("Exists", "DoesNotExist") and item.values:
            raise FieldError(f"{below}.values", f"no values for {item.operator}", item.values)
        for number, value in enumerate(item.values):
            check_label_value(value, f"{below}.values[{number}]")


# ---- Small checks -----------------------------------------------------------


def _address(text: str, path: str) -> bytes:
    try:
        return parse_address(text)
    except ValueError:
        raise FieldError(path, "an IP address", text) from None


def _cidr(text: str, path: str) -> tuple[bytes, int]:
    try:
        return parse_cidr(text)
    except ValueError:
        raise FieldError(path, "a CIDR block such as 10.0.0.0/8 or fd00::/8", text) from None


def _one_per_family(addresses: list[str], path: str) -> None:
    families = [":" in address for address in addresses]
    if len(set(families)) != len(families):
        raise FieldError(path, "at most one of each family", addresses)


def _in(value: str, values: tuple[str, ...], path: str) -> None:
    if value not in values:
        raise FieldError(path, one_of(values), value)


def _unique(items: Iterable[tuple[str, str]]) -> None:
    """Refuses the second of two equal values, each given with its path."""
    seen: dict[str, str] = {}
    for value, path in items:
        if value in seen:
            raise FieldError(path, f"a value that differs from {seen[value]}", value)
        seen[value] = path


VALIDATORS: dict[str, Callable[[Any], None]] = {
    "Namespace": _namespace,
    "Node": _node,
    "Pod": _pod,
    "Service": _service,
    "EndpointSlice": _endpoint_slice,
    "NetworkPolicy": _network_policy,
    "Firewall": _firewall,
    **dict.fromkeys(("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"), _workload),
}
