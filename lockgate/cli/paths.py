"""The ways through a cluster that `lockgate doctor` tries, one of each kind per node and family.

Only connections that the policies allow are tried: one that gets no answer then is a fault. A
refusal (RST) is an answer: packets went there and back.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from itertools import islice

from lockgate.access import Access, Place, Refused, Result, Target
from lockgate.explain.frontends import frontends_of, pods_addresses
from lockgate.explain.question import Question, QuestionError
from lockgate.explain.spec import SpecEngine
from lockgate.objects.model import Cluster, Pod

__all__ = ["FRONTENDS", "KINDS", "Path", "plan", "try_all"]

KINDS = (
    "pod → pod, same node",
    "pod → pod, other node",
    "node → its pod",
    "node → pod, other node",
    "pod → service",
    "node → service",
    "pod → service, UDP",
    "node → service, UDP",
    "pod → API server",
    "pod → outside",
    "pod → DNS",
    "node → DNS",
)
#: What clients outside ask at, tried from pods and nodes as well, over TCP, where there is any.
FRONTENDS = ("load balancer", "external IP", "node port", "node port, other node")
_CANDIDATES = 2  # connections of a kind: one server may be away
_LOOKED_AT = 400  # pairs per kind, node and family, in search of one that is allowed
_CLOSED = 9  # discard: nobody listens, so a pod's kernel refuses
_TIMEOUT = 3.0
_DNS_PORT = 53
#: A question for the address of kubernetes.default.svc.cluster.local; any answer will do.
_QUERY = base64.b64encode(
    bytes.fromhex("4c47010000010000000000000a6b756265726e657465730764656661756c74037376630763")
    + bytes.fromhex("6c7573746572056c6f63616c0000010001")
).decode()


@dataclass(slots=True)
class Path:
    """One way: what kind, from which node, over which family; the connections that stand for
    it, and what became of them. Without candidates nothing was allowed, or nothing is there."""

    kind: str
    node: str
    family: int
    place: Place
    candidates: list[Target] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    error: str = ""

    @property
    def open(self) -> bool:
        return any(_answered(result) for result in self.results)

    @property
    def silent(self) -> bool:
        """No fault that could be told: only those who speak a protocol answer a datagram."""
        asked = [t for t in self.candidates if t.protocol != "udp" or t.payload]
        return not asked and {result.result for result in self.results} == {"timeout"}

    def __str__(self) -> str:
        return f"{self.kind} (IPv{self.family})"


def _answered(result: Result) -> bool:
    return result.result in ("ok", "refused", "error") or result.detail == "connected"


def plan(
    cluster: Cluster,
    nodes: list[str],
    outside: dict[int, tuple[str, int]],
    server: dict[int, tuple[str, int]],
) -> list[Path]:
    """Pure. `outside` is an address beyond the cluster and a port, by family, and `server` those
    of the API server, as nodes see it."""
    world = _World(cluster, outside, server)
    return [path for node in nodes for family in (4, 6) for path in _of_node(world, node, family)]


class _World:
    def __init__(
        self,
        cluster: Cluster,
        outside: dict[int, tuple[str, int]],
        server: dict[int, tuple[str, int]],
    ) -> None:
        self.cluster = cluster
        self.outside = _named("outside", outside)
        self.server = _named("API server", server)
        self.spec = SpecEngine(cluster)
        self.pods = [
            pod
            for _, pod in sorted(cluster.pods.items())
            if pod.status.phase == "Running" and pod.ips and not pod.spec.host_network
        ]

    def pods_of(self, node: str, family: int, *, other: bool = False) -> list[Pod]:
        return [
            pod
            for pod in self.pods
            if (pod.spec.node_name == node) != other and _ip(pod.ips, family)
        ]

    def allowed(self, source: str, target: str, port: int, protocol: str = "TCP") -> bool:
        question = Question(source, target, port, protocol)
        try:
            attempts = self.spec.names.attempts(question)
            answers = self.spec.judge([(question, attempt) for attempt in attempts])
        except QuestionError:
            return False
        return bool(answers) and all(a.verdict == "allow" and not a.cause for a in answers)

    def node_ip(self, node: str, family: int) -> str:
        known = self.cluster.nodes.get(node)
        addresses = known.status.addresses if known else []
        return _ip([a.address for a in addresses if a.type == "InternalIP"], family)


def _of_node(world: _World, node: str, family: int) -> Iterable[Path]:
    own = world.node_ip(node, family)
    local = world.pods_of(node, family)
    if not own and not local:
        return
    far = world.pods_of(node, family, other=True)
    near_ends, far_ends = _ends(local, family), _ends(far, family)
    services = _services(world.cluster, family, "TCP")
    datagrams = _services(world.cluster, family, "UDP")
    # Those that answer first.
    datagrams.sort(key=lambda end: end[2] != _DNS_PORT)
    dns = _dns(world.cluster, family)
    from_pods = [(_ip(pod.ips, family), Place(node, pod)) for pod in local]
    from_node = [(own, Place(node))] if own else []
    outward = [
        (f"{who} → {label}", sources, ends, "TCP")
        for label, ends in _frontends(world.cluster, node, family).items()
        for who, sources in (("pod", from_pods), ("node", from_node))
    ]
    for kind, sources, ends, protocol in (
        (KINDS[0], from_pods, near_ends, "TCP"),
        (KINDS[1], from_pods, far_ends, "TCP"),
        (KINDS[2], from_node, near_ends, "TCP"),
        (KINDS[3], from_node, far_ends, "TCP"),
        (KINDS[4], from_pods, services, "TCP"),
        (KINDS[5], from_node, services, "TCP"),
        (KINDS[6], from_pods, datagrams, "UDP"),
        (KINDS[7], from_node, datagrams, "UDP"),
        (KINDS[8], from_pods, world.server.get(family), "TCP"),
        (KINDS[9], from_pods, world.outside.get(family), "TCP"),
        (KINDS[10], from_pods, dns, "UDP"),
        (KINDS[11], from_node, dns, "UDP"),
        *outward,
    ):
        if not ends or not sources:
            continue
        yield _path(world, kind, node, family, sources, ends, protocol)


def _path(
    world: _World,
    kind: str,
    node: str,
    family: int,
    sources: list[tuple[str, Place]],
    ends: list[tuple[str, str, int]],
    protocol: str,
) -> Path:
    """The first source that may reach some of the ends."""
    pairs = (
        (source, end)
        for source in sources
        for end in ends
        # Not to itself, but to a port of its own that is a service's.
        if source[0] != end[1] or end[0].startswith("svc/")
    )
    path = Path(kind, node, family, sources[0][1])
    for (ip, place), (name, address, port) in islice(pairs, _LOOKED_AT):
        if path.candidates and place is not path.place:
            break
        if world.allowed(ip, address, port, protocol):
            path.place = place
            payload = _QUERY if (protocol, port) == ("UDP", _DNS_PORT) else ""
            target = Target(protocol.lower(), address, port, _TIMEOUT, payload)
            path.candidates.append(target)
            path.names.append(name)
        if len(path.candidates) == _CANDIDATES:
            break
    return path


def _ends(pods: list[Pod], family: int) -> list[tuple[str, str, int]]:
    """Ports that pods declare, then one that nobody listens on."""
    found, closed = [], []
    for pod in pods:
        name, ip = "/".join(pod.key), _ip(pod.ips, family)
        ports = [p for c in pod.spec.containers for p in c.ports if p.protocol == "TCP"]
        found += [(name, ip, port.container_port) for port in ports[:1]]
        closed.append((name, ip, _CLOSED))
    return found + closed


def _named(name: str, ends: dict[int, tuple[str, int]]) -> dict[int, list[tuple[str, str, int]]]:
    return {family: [(name, *end)] for family, end in ends.items()}


def _services(cluster: Cluster, family: int, protocol: str) -> list[tuple[str, str, int]]:
    return [
        (f"svc/{'/'.join(key)}", ip, port.port)
        for key, service in sorted(cluster.services.items())
        for ip in [_ip(service.cluster_ips, family)]
        if ip
        for port in service.spec.ports
        if port.protocol == protocol
    ]


def _frontends(cluster: Cluster, node: str, family: int) -> dict[str, list[tuple[str, str, int]]]:
    """By FRONTENDS, as from `node`."""
    found: dict[str, list[tuple[str, str, int]]] = {label: [] for label in FRONTENDS}
    labels = {"balancer": FRONTENDS[0], "external": FRONTENDS[1]}
    taken = pods_addresses(cluster)
    for key, service in sorted(cluster.services.items()):
        for one in frontends_of(cluster, service, taken):
            if one.protocol != "TCP" or (":" in one.address) != (family == 6):
                continue
            if one.kind == "node":
                label = FRONTENDS[2 if one.node == node else 3]
            elif one.kind in labels:
                label = labels[one.kind]
            else:
                continue
            found[label].append((f"svc/{'/'.join(key)}", one.address, one.port))
    return found


def _dns(cluster: Cluster, family: int) -> list[tuple[str, str, int]]:
    service = cluster.services.get(("kube-system", "kube-dns"))
    ip = _ip(service.cluster_ips, family) if service else ""
    return [("svc/kube-system/kube-dns", ip, _DNS_PORT)] if ip else []


def _ip(ips: Iterable[str], family: int) -> str:
    return next((ip for ip in ips if ip != "None" and (":" in ip) == (family == 6)), "")


def try_all(access: Access, paths: list[Path]) -> None:
    """Fills in the results; what can't be tried gets an `error`."""

    def one(path: Path) -> None:
        path.results = [Result("error", "NOANSWER")] * len(path.candidates)
        try:
            for index, result in access.probe(path.place, path.candidates):
                path.results[index] = result
        except (OSError, Refused) as error:
            path.error = str(error)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(one, [path for path in paths if path.candidates]))
