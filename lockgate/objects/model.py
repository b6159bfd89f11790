"""Kubernetes objects as msgspec Structs, with the API's field names in JSON.

Only the fields that Lockgate uses are named; unknown fields are ignored, as the
API asks of clients. Attribute names are the API's in snake_case.
"""

from __future__ import annotations

from typing import Literal

import msgspec


class Base(msgspec.Struct, rename="camel", omit_defaults=True, kw_only=True, frozen=True, gc=False):
    """Common settings: camelCase in JSON, defaults left out, immutable. Objects hold nothing that
    holds them, so the garbage collector need not look at them."""


class OwnerReference(Base, frozen=True):
    kind: str = ""
    name: str = ""
    controller: bool = False


class ObjectMeta(Base, frozen=True):
    name: str = ""
    namespace: str = ""
    uid: str = ""
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}
    owner_references: list[OwnerReference] = []
    deletion_timestamp: str | None = None


class LabelSelectorRequirement(Base, frozen=True):
    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: list[str] = []


class LabelSelector(Base, frozen=True):
    match_labels: dict[str, str] = {}
    match_expressions: list[LabelSelectorRequirement] = []


Protocol = Literal["TCP", "UDP", "SCTP"]


# ---- Namespaces and nodes ---------------------------------------------------


class Namespace(Base, frozen=True):
    metadata: ObjectMeta
    api_version: str = "v1"
    kind: str = "Namespace"


class NodeAddress(Base, frozen=True):
    type: str
    address: str


#: Key of the taint by which the cluster autoscaler tells that it takes a node away.
LEAVING = "ToBeDeletedByClusterAutoscaler"


class Taint(Base, frozen=True):
    key: str
    effect: str = ""


class NodeSpec(Base, frozen=True):
    pod_cidr: str = msgspec.field(name="podCIDR", default="")
    pod_cidrs: list[str] = msgspec.field(name="podCIDRs", default_factory=list)
    taints: list[Taint] = []


class Condition(Base, frozen=True):
    type: str
    status: str


class NodeStatus(Base, frozen=True):
    addresses: list[NodeAddress] = []
    conditions: list[Condition] = []


#: The label that says in which zone a node is (core/v1 LabelTopologyZone).
ZONE_LABEL = "topology.kubernetes.io/zone"


class Node(Base, frozen=True):
    metadata: ObjectMeta
    spec: NodeSpec = NodeSpec()
    status: NodeStatus = NodeStatus()
    api_version: str = "v1"
    kind: str = "Node"

    @property
    def pod_cidrs(self) -> list[str]:
        """Of both families, as the object has them."""
        return self.spec.pod_cidrs or ([self.spec.pod_cidr] if self.spec.pod_cidr else [])

    @property
    def zone(self) -> str:
        """ "" for one that is in none."""
        return self.metadata.labels.get(ZONE_LABEL, "")


# ---- Pods and workloads -----------------------------------------------------


class ContainerPort(Base, frozen=True):
    container_port: int
    name: str = ""
    protocol: Protocol = "TCP"
    host_port: int = 0
    host_ip: str = msgspec.field(name="hostIP", default="")


class EnvVar(Base, frozen=True):
    name: str
    value: str = ""


class HTTPHeader(Base, frozen=True):
    name: str
    value: str = ""


class HTTPGetAction(Base, frozen=True):
    port: int | str
    path: str = "/"
    host: str = ""  # "" = the pod's address
    scheme: Literal["HTTP", "HTTPS"] = "HTTP"
    http_headers: list[HTTPHeader] = []


class TCPSocketAction(Base, frozen=True):
    port: int | str
    host: str = ""


class Probe(Base, frozen=True):
    http_get: HTTPGetAction | None = None
    tcp_socket: TCPSocketAction | None = None
    initial_delay_seconds: int = 0
    period_seconds: int = 10
    timeout_seconds: int = 1
    success_threshold: int = 1
    failure_threshold: int = 3


class Container(Base, frozen=True):
    name: str
    image: str = ""
    command: list[str] = []
    args: list[str] = []
    env: list[EnvVar] = []
    working_dir: str = ""
    ports: list[ContainerPort] = []
    readiness_probe: Probe | None = None


class PodSpec(Base, frozen=True):
    containers: list[Container] = []
    init_containers: list[Container] = []
    node_name: str = ""
    node_selector: dict[str, str] = {}
    host_network: bool = False
    hostname: str = ""
    subdomain: str = ""
    restart_policy: str = "Always"
    termination_grace_period_seconds: int | None = None


class PodIP(Base, frozen=True):
    ip: str


class PodStatus(Base, frozen=True):
    phase: str = ""
    pod_ip: str = msgspec.field(name="podIP", default="")
    pod_ips: list[PodIP] = msgspec.field(name="podIPs", default_factory=list)
    host_ip: str = msgspec.field(name="hostIP", default="")
    conditions: list[Condition] = []
    reason: str = ""
    message: str = ""


#: On a Pod: its share of what clients outside send, in per cent of that of one without it.
WEIGHT = "lockgate.dev/weight"
MOST_WEIGHT = 100


def read_weight(text: str) -> int | None:
    """Of the annotation; None if it is none."""
    number = int(text) if text.isascii() and text.isdecimal() and len(text) <= 3 else 0
    return number if 1 <= number <= MOST_WEIGHT else None


class Pod(Base, frozen=True):
    metadata: ObjectMeta
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()
    api_version: str = "v1"
    kind: str = "Pod"

    @property
    def key(self) -> tuple[str, str]:
        return self.metadata.namespace, self.metadata.name

    @property
    def ips(self) -> list[str]:
        """Every address of the pod, the primary first."""
        if self.status.pod_ips:
            return [p.ip for p in self.status.pod_ips]
        return [self.status.pod_ip] if self.status.pod_ip else []

    @property
    def finished(self) -> bool:
        """Succeeded and Failed pods leave all sets (their address may be reused)."""
        return self.status.phase in ("Succeeded", "Failed")

    @property
    def ready(self) -> bool:
        return any(c.type == "Ready" and c.status == "True" for c in self.status.conditions)


class PodTemplateSpec(Base, frozen=True):
    metadata: ObjectMeta = ObjectMeta()
    spec: PodSpec = PodSpec()


class WorkloadSpec(Base, frozen=True):
    """The part that Deployment, StatefulSet, DaemonSet, ReplicaSet and Job share."""

    replicas: int = 1
    selector: LabelSelector | None = None
    template: PodTemplateSpec = PodTemplateSpec()
    service_name: str = ""
    parallelism: int = 1
    completions: int | None = None


class Workload(Base, frozen=True):
    metadata: ObjectMeta
    spec: WorkloadSpec
    kind: Literal["Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job"]
    api_version: str = "apps/v1"


# ---- Services ---------------------------------------------------------------


class ServicePort(Base, frozen=True):
    port: int
    name: str = ""
    protocol: Protocol = "TCP"
    target_port: int | str | None = None
    node_port: int = 0
    app_protocol: str = ""


class ClientIPConfig(Base, frozen=True):
    timeout_seconds: int = 10800


class SessionAffinityConfig(Base, frozen=True):
    client_ip: ClientIPConfig = msgspec.field(name="clientIP", default=ClientIPConfig())


#: On a Service: how clients outside reach its backends on other nodes, dsr or snat.
FORWARDING = "lockgate.dev/forwarding"
#: On a Service: how many slots the tables of its ports have for clients outside.
SLOTS = "lockgate.dev/slots"
#: The powers of two that it may be, and which it is where nothing is said.
LEAST_SLOT_BITS, SLOT_BITS, MOST_SLOT_BITS = 10, 14, 16


def read_slots(text: str) -> int | None:
    """Of the annotation: its power of two; None if it is none."""
    for bits in range(LEAST_SLOT_BITS, MOST_SLOT_BITS + 1):
        if text == str(1 << bits):
            return bits
    return None


class ServiceSpec(Base, frozen=True):
    type: str = "ClusterIP"
    cluster_ip: str = msgspec.field(name="clusterIP", default="")
    cluster_ips: list[str] = msgspec.field(name="clusterIPs", default_factory=list)
    ip_families: list[str] = []
    ip_family_policy: str = ""
    external_name: str = ""
    selector: dict[str, str] = {}
    ports: list[ServicePort] = []
    publish_not_ready_addresses: bool = False
    internal_traffic_policy: str = ""
    external_traffic_policy: str = ""
    session_affinity: str = ""
    session_affinity_config: SessionAffinityConfig = SessionAffinityConfig()
    external_ips: list[str] = msgspec.field(name="externalIPs", default_factory=list)
    load_balancer_ip: str = msgspec.field(name="loadBalancerIP", default="")
    load_balancer_class: str = ""
    load_balancer_source_ranges: list[str] = []
    allocate_load_balancer_node_ports: bool = True
    health_check_node_port: int = 0
    traffic_distribution: str = ""


class LoadBalancerIngress(Base, frozen=True):
    ip: str = ""
    ip_mode: str = ""


class LoadBalancerStatus(Base, frozen=True):
    ingress: list[LoadBalancerIngress] = []


class ServiceStatus(Base, frozen=True):
    load_balancer: LoadBalancerStatus = LoadBalancerStatus()


class Service(Base, frozen=True):
    metadata: ObjectMeta
    spec: ServiceSpec = ServiceSpec()
    status: ServiceStatus = ServiceStatus()
    api_version: str = "v1"
    kind: str = "Service"

    @property
    def cluster_ips(self) -> list[str]:
        """ClusterIPs of both families; empty for headless and ExternalName."""
        if self.spec.type == "ExternalName":
            return []
        ips = self.spec.cluster_ips or ([self.spec.cluster_ip] if self.spec.cluster_ip else [])
        return [ip for ip in ips if ip and ip != "None"]

    @property
    def load_balancer_ips(self) -> list[str]:
        """Addresses at which a load balancer delivers packets for the nodes to serve. One that
        is a proxy delivers them at a NodePort (LoadBalancerIngress.ipMode)."""
        if self.spec.type != "LoadBalancer":
            return []
        return [
            one.ip for one in self.status.load_balancer.ingress if one.ip and one.ip_mode != "Proxy"
        ]

    @property
    def affinity(self) -> int:
        """Seconds that a client keeps its backend, 0 if it keeps none."""
        if self.spec.session_affinity != "ClientIP":
            return 0
        return self.spec.session_affinity_config.client_ip.timeout_seconds


class EndpointConditions(Base, frozen=True):
    ready: bool | None = None
    serving: bool | None = None
    terminating: bool | None = None


class ObjectReference(Base, frozen=True):
    kind: str = ""
    namespace: str = ""
    name: str = ""
    uid: str = ""


class ForZone(Base, frozen=True):
    name: str


class ForNode(Base, frozen=True):
    name: str


class EndpointHints(Base, frozen=True):
    for_zones: list[ForZone] = []
    for_nodes: list[ForNode] = []


class Endpoint(Base, frozen=True):
    addresses: list[str]
    conditions: EndpointConditions = EndpointConditions()
    node_name: str = ""
    target_ref: ObjectReference | None = None
    zone: str = ""
    hints: EndpointHints = EndpointHints()


class EndpointPort(Base, frozen=True):
    port: int | None = None
    name: str = ""
    protocol: Protocol = "TCP"


class EndpointSlice(Base, frozen=True):
    metadata: ObjectMeta
    address_type: Literal["IPv4", "IPv6", "FQDN"] = "IPv4"
    endpoints: list[Endpoint] = []
    ports: list[EndpointPort] = []
    api_version: str = "discovery.k8s.io/v1"
    kind: str = "EndpointSlice"

    @property
    def service(self) -> str:
        """Name of the service this slice belongs to (label kubernetes.io/service-name)."""
        return self.metadata.labels.get("kubernetes.io/service-name", "")


# ---- NetworkPolicy ----------------------------------------------------------


class IPBlock(Base, frozen=True):
    cidr: str
    except_: list[str] = msgspec.field(name="except", default_factory=list)


class NetworkPolicyPeer(Base, frozen=True):
    pod_selector: LabelSelector | None = None
    namespace_selector: LabelSelector | None = None
    ip_block: IPBlock | None = None


class NetworkPolicyPort(Base, frozen=True):
    protocol: Protocol = "TCP"
    port: int | str | None = None
    end_port: int | None = None


class NetworkPolicyIngressRule(Base, frozen=True):
    from_: list[NetworkPolicyPeer] = msgspec.field(name="from", default_factory=list)
    ports: list[NetworkPolicyPort] = []


class NetworkPolicyEgressRule(Base, frozen=True):
    to: list[NetworkPolicyPeer] = []
    ports: list[NetworkPolicyPort] = []


class NetworkPolicySpec(Base, frozen=True):
    pod_selector: LabelSelector = LabelSelector()
    policy_types: list[Literal["Ingress", "Egress"]] = []
    ingress: list[NetworkPolicyIngressRule] = []
    egress: list[NetworkPolicyEgressRule] = []


class NetworkPolicy(Base, frozen=True):
    metadata: ObjectMeta
    spec: NetworkPolicySpec = NetworkPolicySpec()
    api_version: str = "networking.k8s.io/v1"
    kind: str = "NetworkPolicy"
    #: Ours: its rules could not be read and are left out. It isolates, and allows nothing.
    unreadable: bool = msgspec.field(name="lockgate.dev/unreadable", default=False)

    @property
    def key(self) -> tuple[str, str]:
        return self.metadata.namespace, self.metadata.name


# ---- ServiceCIDR ------------------------------------------------------------


class ServiceCIDRSpec(Base, frozen=True):
    cidrs: list[str] = []


class ServiceCIDR(Base, frozen=True):
    """Ranges that addresses of services are from; the API server's own is named kubernetes."""

    metadata: ObjectMeta
    spec: ServiceCIDRSpec = ServiceCIDRSpec()
    api_version: str = "networking.k8s.io/v1"
    kind: str = "ServiceCIDR"


# ---- Firewall ---------------------------------------------------------------


class FirewallPort(Base, frozen=True):
    protocol: Literal["TCP", "UDP", "SCTP", "ICMP"] = "TCP"
    port: int | None = None
    end_port: int | None = None


class FirewallRule(Base, frozen=True):
    action: Literal["Allow", "Deny"]
    from_: list[str] = msgspec.field(name="from", default_factory=list)
    ports: list[FirewallPort] = []
    packets_per_second: int = 0
    expires: str = ""  # RFC 3339; "" = never


class FirewallSpec(Base, frozen=True):
    node_selector: LabelSelector | None = None
    default: Literal["Allow", "Drop"] = "Allow"
    rules: list[FirewallRule] = []


class Firewall(Base, frozen=True):
    """What nodes' cards may bring (docs/firewall.md)."""

    metadata: ObjectMeta
    spec: FirewallSpec = FirewallSpec()
    api_version: str = "lockgate.dev/v1alpha1"
    kind: str = "Firewall"


Object = Namespace | Node | Pod | Workload | Service | EndpointSlice | NetworkPolicy | Firewall


class Cluster(msgspec.Struct):
    """Everything that is known, by name: what the specification and the compilers judge by."""

    namespaces: dict[str, Namespace] = {}
    nodes: dict[str, Node] = {}
    pods: dict[tuple[str, str], Pod] = {}
    services: dict[tuple[str, str], Service] = {}
    slices: dict[tuple[str, str], EndpointSlice] = {}
    policies: dict[tuple[str, str], NetworkPolicy] = {}
    service_cidrs: dict[str, ServiceCIDR] = {}
    firewalls: dict[str, Firewall] = {}
