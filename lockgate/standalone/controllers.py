"""Manifests to the objects of a running cluster, as Kubernetes' controllers would make them.

Pure: the same manifests and the same Memory give the same Plan. Memory is what must not move when
something else changes: the node of each pod, its uid, the ClusterIPs of each service.
"""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Iterable, Mapping

import msgspec

from lockgate.objects.model import (
    Container,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    Object,
    ObjectMeta,
    OwnerReference,
    Pod,
    PodStatus,
    Service,
    Workload,
)
from lockgate.standalone.memory import Memory
from lockgate.standalone.service_addresses import addressed
from lockgate.standalone.slices import endpoint_slices

__all__ = [
    "Memory",
    "Plan",
    "endpoint_slices",
    "hosts_text",
    "plan",
]

Key = tuple[str, str]

NAME_LABEL = "kubernetes.io/metadata.name"


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
            case Node():
                pass
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
    result.services, told = addressed(services, result.nodes.values(), memory)
    result.warnings += told
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
