"""The kinds that are read from the API server: where they are, and what is kept of them.

An object is decoded into a struct that names only what the data plane uses, so that the rest
costs no memory, and a change of the rest is no change. Equal parts (labels of replicas, names
of nodes) are kept once.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from lockgate.objects import model

__all__ = ["KINDS", "NETWORK_UNAVAILABLE", "Kind", "Parts", "Version", "uid_on_node"]

#: The condition of a Node that says whether its pods have a network (core/v1 NodeConditionType).
NETWORK_UNAVAILABLE = "NetworkUnavailable"
_OURS = "lockgate.dev/"
_MIRROR = "kubernetes.io/config.mirror"
#: The uid that a kubelet makes of a static pod's file: 128 bits as hexadecimal digits (FNV-128a,
#: before that MD5; applyDefaults in pkg/kubelet/config/common.go). The API server's have dashes.
_OF_A_FILE = re.compile(r"[0-9a-f]{32}")
#: What most objects have: one for all of them, for nobody changes an object.
_NO_LIST: list[Any] = []
_NO_DICT: dict[str, str] = {}
_NO_HINTS = model.EndpointHints()


class Parts:
    """Equal values of immutable parts, kept once. Bounded: forgets all when it is full."""

    LIMIT = 100_000

    def __init__(self) -> None:
        self._labels: dict[tuple[tuple[str, str], ...], dict[str, str]] = {}
        self._conditions: dict[tuple[bool | None, ...], model.EndpointConditions] = {}
        self._hints: dict[tuple[tuple[str, ...], tuple[str, ...]], model.EndpointHints] = {}
        self._containers: dict[bytes, list[model.Container]] = {}

    def labels(self, labels: dict[str, str]) -> dict[str, str]:
        if len(self._labels) > self.LIMIT:
            self._labels.clear()
        return self._labels.setdefault(tuple(labels.items()), labels)

    def conditions(self, conditions: model.EndpointConditions) -> model.EndpointConditions:
        key = conditions.ready, conditions.serving, conditions.terminating
        return self._conditions.setdefault(key, conditions)

    def hints(self, hints: model.EndpointHints) -> model.EndpointHints:
        if not hints.for_zones and not hints.for_nodes:
            return _NO_HINTS
        if len(self._hints) > self.LIMIT:
            self._hints.clear()
        key = tuple(one.name for one in hints.for_zones), tuple(one.name for one in hints.for_nodes)
        return self._hints.setdefault(key, hints)

    def containers(self, containers: list[_Container]) -> list[model.Container]:
        if len(self._containers) > self.LIMIT:
            self._containers.clear()
        key = msgspec.msgpack.encode([c.ports for c in containers])
        known = self._containers.get(key)
        if known is None:
            known = [model.Container(name="", ports=c.ports) for c in containers if c.ports]
            self._containers[key] = known
        return known


class _Wire(msgspec.Struct, rename="camel", frozen=True, gc=False):
    """Common settings of what is only read and dropped."""


class _Container(_Wire, frozen=True, gc=False):
    ports: list[model.ContainerPort] = []


class _PodSpec(_Wire, frozen=True, gc=False):
    containers: list[_Container] = []
    node_name: str = ""
    host_network: bool = False


class _PodStatus(_Wire, frozen=True, gc=False):
    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    pod_ips: list[model.PodIP] = msgspec.field(name="podIPs", default_factory=list)


class _Pod(_Wire, frozen=True, gc=False):
    metadata: model.ObjectMeta
    spec: _PodSpec = _PodSpec()
    status: _PodStatus = _PodStatus()


class _PodPlace(_Wire, frozen=True, gc=False):
    node_name: str = ""


class _PodHead(_Wire, frozen=True, gc=False):
    """Who a pod is, whatever else it says."""

    metadata: model.ObjectMeta
    spec: _PodPlace = _PodPlace()


class _PolicyHead(_Wire, frozen=True, gc=False):
    pod_selector: model.LabelSelector = model.LabelSelector()
    policy_types: list[str] = []
    egress: Any = None


class _Policy(_Wire, frozen=True, gc=False):
    """Whom a policy isolates, whatever its rules are."""

    metadata: model.ObjectMeta
    spec: _PolicyHead = _PolicyHead()


class _Meta(_Wire, frozen=True, gc=False):
    uid: str = ""
    name: str = ""
    namespace: str = ""
    resource_version: str = ""


class Version(_Wire, frozen=True, gc=False):
    """Of any object: its name and the state of the store that it is of."""

    metadata: _Meta = _Meta()


def _meta(meta: model.ObjectMeta, parts: Parts) -> model.ObjectMeta:
    """Only our own annotations; nobody here asks for owners."""
    return model.ObjectMeta(
        name=meta.name,
        namespace=sys.intern(meta.namespace),
        uid=meta.uid,
        labels=parts.labels(meta.labels),
        annotations={k: v for k, v in meta.annotations.items() if k.startswith(_OURS)} or _NO_DICT,
        owner_references=_NO_LIST,
        deletion_timestamp=meta.deletion_timestamp,
    )


def uid_on_node(meta: model.ObjectMeta, node: str) -> str:
    """The uid by which its kubelet and the container runtime know a pod of `node` (its
    spec.nodeName). That of a static pod is made of its file; the object that mirrors it names it,
    and has another, new whenever somebody deletes the object, which the pod outlives.

    Whoever may create pods can write such an object. So what it says counts only where it has the
    form of a kubelet's: no pod of the API server can be named by it, a static one can
    (`lockgate.agent.claims`). The owner is what NodeRestriction demands of kubelets."""
    mirrored = meta.annotations.get(_MIRROR, "")
    of_its_node = any(
        owner.kind == "Node" and owner.name == node and owner.controller
        for owner in meta.owner_references
    )
    return mirrored if of_its_node and _OF_A_FILE.fullmatch(mirrored) else meta.uid


def _pod_uid(plain: Any) -> str:
    pod = msgspec.convert(plain, _PodHead)
    return uid_on_node(pod.metadata, pod.spec.node_name)


def _pod(pod: _Pod, parts: Parts) -> model.Pod:
    status = pod.status
    ips = status.pod_ips or ([model.PodIP(status.pod_ip)] if status.pod_ip else [])
    meta = msgspec.structs.replace(pod.metadata, uid=uid_on_node(pod.metadata, pod.spec.node_name))
    return model.Pod(
        metadata=_meta(meta, parts),
        spec=model.PodSpec(
            containers=parts.containers(pod.spec.containers),
            node_name=sys.intern(pod.spec.node_name),
            host_network=pod.spec.host_network,
            init_containers=_NO_LIST,
            node_selector=_NO_DICT,
        ),
        status=model.PodStatus(
            phase=sys.intern(status.phase), pod_ips=ips or _NO_LIST, conditions=_NO_LIST
        ),
    )


def _node(node: model.Node, parts: Parts) -> model.Node:
    """Of its conditions the one that an agent writes: the kubelet's change every few minutes."""
    kept = [one for one in node.status.conditions if one.type == NETWORK_UNAVAILABLE]
    return msgspec.structs.replace(
        node,
        metadata=_meta(node.metadata, parts),
        status=msgspec.structs.replace(node.status, conditions=kept or _NO_LIST),
    )


def _slice(item: model.EndpointSlice, parts: Parts) -> model.EndpointSlice:
    """Of an endpoint: where it is, whether it takes connections, and for whom. Its pod is found by
    its address."""
    return msgspec.structs.replace(
        item,
        metadata=_meta(item.metadata, parts),
        endpoints=[
            model.Endpoint(
                addresses=one.addresses,
                conditions=parts.conditions(one.conditions),
                node_name=sys.intern(one.node_name),
                hints=parts.hints(one.hints),
            )
            for one in item.endpoints
        ],
    )


def _isolation(plain: Any) -> model.NetworkPolicy:
    """A policy whose rules can't be read: it isolates the pods that it selects, and allows
    nothing. MsgspecError if not even that can be read."""
    found = msgspec.convert(plain, _Policy)
    given = found.spec.policy_types or (["Ingress", "Egress"] if found.spec.egress else ["Ingress"])
    known: tuple[Literal["Ingress", "Egress"], ...] = ("Ingress", "Egress")
    types = [one for one in known if one in given]
    if not types:
        raise msgspec.ValidationError(f"spec.policyTypes: {given}")
    spec = model.NetworkPolicySpec(pod_selector=found.spec.pod_selector, policy_types=types)
    return model.NetworkPolicy(metadata=found.metadata, spec=spec, unreadable=True)


def _other(item: Any, parts: Parts) -> Any:
    return msgspec.structs.replace(item, metadata=_meta(item.metadata, parts))


@dataclass(frozen=True, slots=True)
class Kind:
    """One kind: its field of `Cluster`, its place in the API, the struct it is decoded into
    and what makes the object of it. `selectors` are field selectors that spare objects nobody
    here needs, in the order of preference; a server that does not know one answers 400. `labels`
    is a label selector, which every server knows."""

    name: str
    table: str
    group: str
    resource: str
    struct: Any
    keep: Callable[[Any, Parts], Any] = _other
    namespaced: bool = True
    selectors: tuple[str, ...] = ("",)
    labels: str = ""
    #: A server may be without it.
    optional: bool = False
    #: What is made, of its JSON as plain values, of one that `struct` can't be made of.
    #: MsgspecError if nothing.
    rest: Callable[[Any], Any] | None = None
    #: The uid of one that `struct` can't be made of, likewise; None: metadata.uid.
    uid: Callable[[Any], str] | None = None

    @property
    def path(self) -> str:
        group = f"apis/{self.group}" if "/" in self.group else f"api/{self.group}"
        return f"/{group}/{self.resource}"

    @property
    def api_group(self) -> str:
        """As RBAC has it: "" for the core group."""
        return self.group.rpartition("/")[0]

    def key(self, namespace: str, name: str) -> Any:
        """The key in the table of `Cluster`."""
        return (namespace, name) if self.namespaced else name

    def title(self, key: Any) -> str:
        """The object as people name it."""
        return f"{self.name} {'/'.join(key) if self.namespaced else key}"


#: As kube-proxy asks (cmd/kube-proxy/app/server.go): what is headless, or another proxy's, has no
#: address that anybody here would translate.
_PROXIED = "!service.kubernetes.io/headless,!service.kubernetes.io/service-proxy-name"
_LIVE = "status.phase!=Succeeded,status.phase!=Failed"

KINDS: tuple[Kind, ...] = (
    Kind("Namespace", "namespaces", "v1", "namespaces", model.Namespace, namespaced=False),
    Kind("Node", "nodes", "v1", "nodes", model.Node, _node, namespaced=False),
    Kind(
        "Pod",
        "pods",
        "v1",
        "pods",
        _Pod,
        _pod,
        # A pod that is over has no address any more, one on its host's network is not ours.
        selectors=(f"{_LIVE},spec.hostNetwork=false", _LIVE, ""),
        uid=_pod_uid,
    ),
    Kind("Service", "services", "v1", "services", model.Service, labels=_PROXIED),
    Kind(
        "EndpointSlice",
        "slices",
        "discovery.k8s.io/v1",
        "endpointslices",
        model.EndpointSlice,
        _slice,
        labels=_PROXIED,
    ),
    Kind(
        "NetworkPolicy",
        "policies",
        "networking.k8s.io/v1",
        "networkpolicies",
        model.NetworkPolicy,
        rest=_isolation,
    ),
    # Since Kubernetes 1.33. Without it the setting serviceCidrs says the same.
    Kind(
        "ServiceCIDR",
        "service_cidrs",
        "networking.k8s.io/v1",
        "servicecidrs",
        model.ServiceCIDR,
        namespaced=False,
        optional=True,
    ),
)
