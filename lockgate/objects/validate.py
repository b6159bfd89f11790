"""What the API server checks beyond types (k8s.io/kubernetes/pkg/apis/*/validation).

One function per kind; each raises FieldError with the path inside the object.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

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
    MOST_WEIGHT,
    WEIGHT,
    Container,
    IPBlock,
    LabelSelector,
    Namespace,
    NetworkPolicy,
    NetworkPolicyPeer,
    NetworkPolicyPort,
    Node,
    Pod,
    PodSpec,
    Probe,
    Workload,
    read_weight,
)
from lockgate.objects.names import (
    check_dns_label,
    check_dns_name,
    check_label_key,
    check_label_value,
    check_labels,
    check_port,
    check_port_name,
)
from lockgate.objects.validate_services import check_endpoint_slice, check_service

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
    )
}


def _namespace(item: Namespace) -> None:
    check_metadata(item.metadata, check_dns_label)


def _node(item: Node) -> None:
    check_metadata(item.metadata, check_dns_name)
    spec = item.spec
    for index, cidr in enumerate(spec.pod_cidrs):
        check_cidr(cidr, f"spec.podCIDRs[{index}]")
    check_one_per_family([c.partition("/")[0] for c in spec.pod_cidrs], "spec.podCIDRs")
    if spec.pod_cidr:
        check_cidr(spec.pod_cidr, "spec.podCIDR")
        if spec.pod_cidrs and spec.pod_cidrs[0] != spec.pod_cidr:
            raise FieldError("spec.podCIDRs[0]", "the same as spec.podCIDR", spec.pod_cidrs[0])
    for index, address in enumerate(item.status.addresses):
        if address.type in ("InternalIP", "ExternalIP"):
            check_address(address.address, f"status.addresses[{index}].address")


# ---- Pods and workloads -----------------------------------------------------


def _pod(item: Pod) -> None:
    check_metadata(item.metadata, check_dns_name)
    _weight(item.metadata.annotations, "metadata")
    _pod_spec(item.spec, "spec", ("Always", "OnFailure", "Never"))
    for index, ip in enumerate(item.status.pod_ips):
        check_address(ip.ip, f"status.podIPs[{index}].ip")
    check_one_per_family([ip.ip for ip in item.status.pod_ips], "status.podIPs")
    if item.status.pod_ip:
        check_address(item.status.pod_ip, "status.podIP")


def _weight(annotations: dict[str, str], path: str) -> None:
    text = annotations.get(WEIGHT)
    if text is not None and read_weight(text) is None:
        where = f"{path}.annotations[{WEIGHT}]"
        raise FieldError(where, f"per cent, from 1 to {MOST_WEIGHT}", text)


def _pod_spec(spec: PodSpec, path: str, restart: tuple[str, ...]) -> None:
    if not spec.containers:
        raise FieldError(f"{path}.containers", "at least one container", [])
    check_unique(
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
    _host_ports(spec, path)
    if (spec.termination_grace_period_seconds or 0) < 0:
        raise FieldError(
            f"{path}.terminationGracePeriodSeconds",
            "a number that is not negative",
            spec.termination_grace_period_seconds,
        )
    if spec.node_name:
        check_dns_name(spec.node_name, f"{path}.nodeName")
    check_labels(spec.node_selector, f"{path}.nodeSelector")
    if spec.hostname:
        check_dns_label(spec.hostname, f"{path}.hostname")
    if spec.subdomain:
        check_dns_label(spec.subdomain, f"{path}.subdomain")
    check_one_of(spec.restart_policy, restart, f"{path}.restartPolicy")


def _host_ports(spec: PodSpec, path: str) -> None:
    found = []
    for number, container in enumerate(spec.containers):
        for index, port in enumerate(container.ports):
            where = f"{path}.containers[{number}].ports[{index}]"
            if not 0 <= port.host_port <= 65535:
                raise FieldError(
                    f"{where}.hostPort", "a port number from 1 to 65535", port.host_port
                )
            if port.host_ip:
                check_address(port.host_ip, f"{where}.hostIP")
            if not port.host_port:
                continue
            if spec.host_network and port.host_port != port.container_port:
                raise FieldError(
                    f"{where}.hostPort",
                    f"the containerPort ({port.container_port}), as the pod is on its host's"
                    " network",
                    port.host_port,
                )
            value = f"{port.host_ip} {port.host_port}/{port.protocol}".lstrip()
            found.append((value, f"{where}.hostPort"))
    check_unique(found)


def _container(container: Container, path: str) -> None:
    check_dns_label(container.name, f"{path}.name")
    for index, port in enumerate(container.ports):
        check_port(port.container_port, f"{path}.ports[{index}].containerPort")
        if port.name:
            check_port_name(port.name, f"{path}.ports[{index}].name")
    check_unique(
        (p.name, f"{path}.ports[{i}].name") for i, p in enumerate(container.ports) if p.name
    )
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
    check_metadata(item.metadata, check_dns_name)
    spec, template = item.spec, item.spec.template
    for name, count in (
        ("replicas", spec.replicas),
        ("parallelism", spec.parallelism),
        ("completions", spec.completions or 0),
    ):
        if count < 0:
            raise FieldError(f"spec.{name}", "a number that is not negative", count)
    check_labels(template.metadata.labels, "spec.template.metadata.labels")
    _weight(template.metadata.annotations, "spec.template.metadata")
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


# ---- NetworkPolicy ----------------------------------------------------------


def _network_policy(item: NetworkPolicy) -> None:
    check_metadata(item.metadata, check_dns_name)
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
    outer, length = check_cidr(block.cidr, f"{path}.cidr")
    for index, text in enumerate(block.except_):
        inner, deeper = check_cidr(text, f"{path}.except[{index}]")
        shift = 128 - length
        inside = int.from_bytes(inner, "big") >> shift == int.from_bytes(outer, "big") >> shift
        if deeper <= length or not inside or (":" in text) != (":" in block.cidr):
            raise FieldError(f"{path}.except[{index}]", f"a block inside {block.cidr}", text)


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


VALIDATORS: dict[str, Callable[[Any], None]] = {
    "Namespace": _namespace,
    "Node": _node,
    "Pod": _pod,
    "Service": check_service,
    "EndpointSlice": check_endpoint_slice,
    "NetworkPolicy": _network_policy,
    **dict.fromkeys(("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"), _workload),
}
