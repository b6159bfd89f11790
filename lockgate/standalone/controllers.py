"""Manifests to the objects of a running cluster, as Kubernetes' controllers would make them.

Pure: the same manifests and the same Memory give the same Plan. Memory is what must not move when
something else changes: the node of each pod, its uid, the ClusterIPs of each service.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv6Address, ip_address
from zlib import crc32

import msgspec

from lockgate.objects.model import (
    Container,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    Firewall,
    Namespace,
    NetworkPolicy,
    Node,
    Object,
    ObjectMeta,
    ObjectReference,
    OwnerReference,
    Pod,
    PodStatus,
    Service,
    ServicePort,
    Workload,
)

__all__ = [
    "Memory",
    "Plan",
    "endpoint_slices",
    "hosts_text",
    "plan",
]

Key = tuple[str, str]

NAME_LABEL = "kubernetes.io/metadata.name"
SERVICE_LABEL = "kubernetes.io/service-name"
SERVICE_NET4 = "10.96."
SERVICE_NET6 = "fd00:10:96::"


class Memory(msgspec.Struct):
    """What stays as it is from one plan to the next. `plan` updates it in place."""

    #: Makes uids differ between runs of a cluster.
    seed: str = "lockgate"
    nodes: dict[Key, str] = {}
    #: Address of a service in each family, by (namespace, name, family).
    addresses: dict[tuple[str, str, str], str] = {}
    #: IP families that were offered to services: they stay, whatever nodes go.
    families: list[str] = []
    #: Pods that were there in the last plan, and how often each name was used anew.
    uids: dict[Key, tuple[bytes, str]] = {}
    incarnations: dict[Key, int] = {}


class Plan(msgspec.Struct):
    """What should be there. Pods have no status yet; slices are those written by hand."""

    namespaces: dict[str, Namespace] = {}
    nodes: dict[str, Node] = {}
    pods: dict[Key, Pod] = {}
    services: dict[Key, Service] = {}
    slices: dict[Key, EndpointSlice] = {}
    policies: dict[Key, NetworkPolicy] = {}
    warnings: list[str] = []
    #: Pods without a node, and why.
    unscheduled: dict[Key, str] = {}


def plan(objects: Iterable[Object], nodes: Mapping[str, Node], memory: Memory) -> Plan:
    """The whole cluster from its manifests. `nodes` are those where pods may be (nodes.py)."""
    result = Plan(nodes=dict(nodes))
    objects = list(objects)
    workloads: list[Workload] = []
    services: list[Service] = []
    for item in objects:
        key = (item.metadata.namespace, item.metadata.name)
        match item:
            case Namespace():
                result.namespaces[item.metadata.name] = item
            case Workload():
                workloads.append(item)
            case Pod():
                result.pods[key] = item
            case Service():
                services.append(item)
            case EndpointSlice():
                result.slices[key] = item
            case NetworkPolicy():
                result.policies[key] = item
            case Node() | Firewall():
                pass  # the supervisor's
    _namespaces(objects, result)
    for workload in sorted(workloads, key=_key):
        for pod in _replicas(workload, nodes):
            if pod.key in result.pods:
                result.warnings.append(
                    f"{workload.kind} {'/'.join(_key(workload))}: its pod"
                    f" {pod.metadata.name} is not made, as another object has made one"
                    " of this name"
                )
            else:
                result.pods[pod.key] = pod
    _unknown_probes(result)
    _schedule(result, memory)
    _identify(result, memory)
    _cluster_ips(services, result, memory)
    return result


def _unknown_probes(result: Plan) -> None:
    told = set()
    for pod in result.pods.values():
        owner = next((f"{o.kind} {pod.key[0]}/{o.name}" for o in pod.metadata.owner_references), "")
        for container in probed_container(pod):
            probe = container.readiness_probe
            if probe is not None and probe.http_get is None and probe.tcp_socket is None:
                told.add((owner or f"Pod {'/'.join(pod.key)}", container.name))
    result.warnings += [
        f"{title}: the readinessProbe of container {name} is neither httpGet nor tcpSocket: it is"
        " not run, and counts as passed"
        for title, name in sorted(told)
    ]


def _key(item: Object) -> Key:
    return item.metadata.namespace, item.metadata.name


# ---- Namespaces --------------------------------------------------------------


def _namespaces(objects: Iterable[Object], result: Plan) -> None:
    wanted = {item.metadata.namespace for item in objects} - {""}
    for name in sorted(wanted | {"default"}):
        if name not in result.namespaces:
            result.namespaces[name] = Namespace(
                metadata=ObjectMeta(name=name, labels={NAME_LABEL: name})
            )
            if name != "default":
                result.warnings.append(
                    f"Namespace {name}: no manifest defines it, so it is made without labels of"
                    " its own"
                )


# ---- Workloads to pods ------------------------------------------------------


def _replicas(workload: Workload, nodes: Mapping[str, Node]) -> Iterable[Pod]:
    """Pods with stable names: NAME-0, NAME-1, …; a DaemonSet's are NAME-NODE."""
    spec = workload.spec
    template = spec.template
    meta = workload.metadata
    suffixes: list[tuple[str, str]]  # (name suffix, node)
    if workload.kind == "DaemonSet":
        selector = template.spec.node_selector
        suffixes = [
            (node, node)
            for node, item in nodes.items()
            if selector.items() <= item.metadata.labels.items()
        ]
    else:
        replicas = spec.replicas
        if workload.kind == "Job":
            replicas = spec.completions if spec.completions is not None else spec.parallelism
        suffixes = [(str(index), "") for index in range(replicas)]
    owner = [OwnerReference(kind=workload.kind, name=meta.name, controller=True)]
    for suffix, node in suffixes:
        name = f"{meta.name}-{suffix}"
        labels = template.metadata.labels
        pod_spec = template.spec
        if workload.kind == "StatefulSet":
            labels = {
                **labels,
                "statefulset.kubernetes.io/pod-name": name,
                "apps.kubernetes.io/pod-index": suffix,
            }
            pod_spec = msgspec.structs.replace(pod_spec, hostname=name, subdomain=spec.service_name)
        elif workload.kind == "Job":
            labels = {
                **labels,
                "batch.kubernetes.io/job-name": meta.name,
                "job-name": meta.name,
            }
        if node:
            pod_spec = msgspec.structs.replace(pod_spec, node_name=node)
        yield Pod(
            metadata=ObjectMeta(
                name=name,
                namespace=meta.namespace,
                labels=labels,
                annotations=template.metadata.annotations,
                owner_references=owner,
            ),
            spec=pod_spec,
        )


def _schedule(result: Plan, memory: Memory) -> None:
    """A node for each pod: the one it had; else the one with the fewest pods of the same owner,
    then the fewest pods, in the order of the nodes."""
    all_pods: Counter[str] = Counter()
    per_owner: Counter[tuple[str, str, str]] = Counter()

    def owner(pod: Pod) -> tuple[str, str]:
        owners = pod.metadata.owner_references
        return pod.metadata.namespace, f"{owners[0].kind}/{owners[0].name}" if owners else ""

    def place(pod: Pod, node: str) -> None:
        all_pods[node] += 1
        per_owner[(*owner(pod), node)] += 1
        memory.nodes[pod.key] = node
        if pod.spec.node_name != node:
            spec = msgspec.structs.replace(pod.spec, node_name=node)
            result.pods[pod.key] = msgspec.structs.replace(pod, spec=spec)

    for key in [key for key in memory.nodes if key not in result.pods]:
        del memory.nodes[key]
    waiting: list[Pod] = []
    for key, pod in list(result.pods.items()):
        candidates = _candidates(pod, result.nodes)
        if not candidates:
            memory.nodes.pop(key, None)
            result.unscheduled[key] = _why_not(pod, result.nodes)
        elif memory.nodes.get(key) in candidates:
            place(pod, memory.nodes[key])
        elif len(candidates) == 1:
            place(pod, candidates[0])
        else:
            waiting.append(pod)
    order = {node: index for index, node in enumerate(result.nodes)}
    for pod in waiting:
        best = min(
            _candidates(pod, result.nodes),
            key=lambda n: (per_owner[(*owner(pod), n)], all_pods[n], order[n]),
        )
        place(pod, best)
    for key, reason in result.unscheduled.items():
        result.warnings.append(f"Pod {'/'.join(key)}: stays Pending, {reason}")


def _candidates(pod: Pod, nodes: Mapping[str, Node]) -> list[str]:
    spec = pod.spec
    if spec.node_name:
        return [spec.node_name] if spec.node_name in nodes else []
    wanted = spec.node_selector.items()
    return [name for name, node in nodes.items() if wanted <= node.metadata.labels.items()]


def _why_not(pod: Pod, nodes: Mapping[str, Node]) -> str:
    if not nodes:
        return "no node runs that could take it"
    if pod.spec.node_name:
        return f"spec.nodeName {pod.spec.node_name!r} is none of the nodes {', '.join(nodes)}"
    selector = ", ".join(f"{k}={v}" for k, v in pod.spec.node_selector.items())
    return f"no node has the labels of spec.nodeSelector ({selector})"


def _identify(result: Plan, memory: Memory) -> None:
    """A uid for each pod. A changed spec or node is another pod; changed labels are not."""
    uids: dict[Key, tuple[bytes, str]] = {}
    for key, pod in result.pods.items():
        digest = msgspec.msgpack.encode(pod.spec)
        before = memory.uids.get(key)
        if before and before[0] == digest:
            uid = before[1]
        else:
            count = memory.incarnations.get(key, 0) + 1
            memory.incarnations[key] = count
            uid = str(uuid.uuid5(uuid.NAMESPACE_OID, f"{memory.seed}/{'/'.join(key)}/{count}"))
        uids[key] = (digest, uid)
        result.pods[key] = msgspec.structs.replace(
            pod,
            metadata=msgspec.structs.replace(pod.metadata, uid=uid),
            status=PodStatus(phase="Pending"),
        )
    memory.uids = uids


# ---- Services ---------------------------------------------------------------


def _cluster_ips(services: Sequence[Service], result: Plan, memory: Memory) -> None:
    """ClusterIPs: those of the manifest, else those of before, else by a hash of the name, so that
    a cluster gets the same ones when it is started again."""
    known = {_key(service) for service in services}
    for entry in [entry for entry in memory.addresses if entry[:2] not in known]:
        del memory.addresses[entry]
    taken: dict[str, str] = {}
    for service in services:
        for address in service.cluster_ips:
            name = "/".join(_key(service))
            address = str(ip_address(address))
            if taken.setdefault(address, name) != name:
                result.warnings.append(
                    f"Service {name}: spec.clusterIP {address} is also Service {taken[address]}'s"
                )
    for (namespace, service_name, family), address in list(memory.addresses.items()):
        if taken.setdefault(address, f"{namespace}/{service_name}") != (
            f"{namespace}/{service_name}"
        ):
            del memory.addresses[namespace, service_name, family]
    now = cluster_families(result.nodes.values())
    memory.families = list(dict.fromkeys([*memory.families, *now]))
    offered = memory.families or ["IPv4"]
    for service in sorted(services, key=_key):
        made = result.services[_key(service)] = _addressed(service, memory, taken, offered)
        for family in made.spec.ip_families:
            if family not in offered and made.spec.selector:
                result.warnings.append(
                    f"Service {'/'.join(_key(service))}: asks for {family}, which no node has pod"
                    " CIDRs of, so it has no backends there"
                )


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


# ---- EndpointSlices ---------------------------------------------------------


def endpoint_slices(
    services: Mapping[Key, Service], pods: Mapping[Key, Pod]
) -> dict[Key, EndpointSlice]:
    """The slices of every service with a selector: one per family and set of port numbers.

    Pods whose named targetPort has different numbers are in different slices. Pods that are not
    ready are listed with ready: false, as the API does.
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
                        _endpoint(service, pod, ips[0])
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


def _endpoint(service: Service, pod: Pod, address: str) -> Endpoint:
    terminating = pod.metadata.deletion_timestamp is not None
    always = service.spec.publish_not_ready_addresses
    return Endpoint(
        addresses=[address],
        conditions=EndpointConditions(
            ready=always or (pod.ready and not terminating),
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
    )


# ---- Names ------------------------------------------------------------------


def hosts_text(
    namespace: str,
    services: Mapping[Key, Service],
    slices: Iterable[EndpointSlice],
    domain: str = "cluster.local",
) -> str:
    """The /etc/hosts of a namespace's pods: service names as a cluster's DNS would answer them.

    A headless service's name has every ready endpoint's address, and each of its pods a name
    below it. The short name is there for services of the same namespace only.
    """
    lines = ["# Written by lockgate from the cluster's services.", "127.0.0.1 localhost"]
    lines += ["::1 localhost ip6-localhost ip6-loopback"]

    def names(first: str, of: str) -> str:
        full = f"{first}.{of}.svc.{domain} {first}.{of}.svc {first}.{of}"
        return f"{full} {first}" if of == namespace else full

    headless: dict[Key, list[EndpointSlice]] = {}
    for item in slices:
        headless.setdefault((item.metadata.namespace, item.service), []).append(item)
    for key in sorted(services):
        service = services[key]
        if service.spec.type == "ExternalName":
            continue
        if service.cluster_ips:
            lines += [f"{address} {names(key[1], key[0])}" for address in service.cluster_ips]
            continue
        for item in sorted(headless.get(key, ()), key=lambda s: s.metadata.name):
            for endpoint in item.endpoints:
                if endpoint.conditions.ready is False:
                    continue
                for address in endpoint.addresses:
                    lines.append(f"{address} {names(key[1], key[0])}")
                    if endpoint.target_ref:
                        below = f"{endpoint.target_ref.name}.{key[1]}"
                        lines.append(f"{address} {names(below, key[0])}")
    return "\n".join(lines) + "\n"


def probed_container(pod: Pod) -> list[Container]:
    """The containers whose readiness decides the pod's."""
    return [c for c in pod.spec.containers if c.readiness_probe is not None]
