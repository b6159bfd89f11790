"""From names to packets: what `ns/pod`, a service or an address stands for.

Both engines share this: they are asked about the same packets. Services are resolved here, to
each of the backends that the client may be given (lockgate.spec.services).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from lockgate.explain.frontends import Frontend, Frontends, node_addresses
from lockgate.explain.question import Family, Question, QuestionError
from lockgate.explain.served import Served
from lockgate.objects.address import format_address, is_ipv4, parse_address
from lockgate.objects.model import Cluster, EndpointSlice, Pod, Service

__all__ = ["Attempt", "End", "Names"]


#: As a destination these mean the sender's own namespace, which no packet leaves.
_ITSELF = (parse_address("0.0.0.0"), parse_address("::"), parse_address("::1"))


@dataclass(frozen=True, slots=True)
class End:
    """One address. `pod` when it is a pod's own, `node` when it is a node's."""

    address: bytes
    pod: Pod | None = None
    node: str | None = None

    @property
    def ip(self) -> str:
        return format_address(self.address)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One connection to ask about. `unserved`: why the service would refuse it: `destination`
    is the service's own address then (absent for a headless service)."""

    source: End
    destination: End | None
    port: int | None
    protocol: str
    backend: str | None = None
    unserved: str | None = None

    @property
    def exempt(self) -> str | None:
        """Why no policy is asked, though some may select the pod; a sentence."""
        pod = self.destination.pod if self.destination is not None else None
        if pod is None:
            return None
        if self.source.pod is not None and self.source.pod.key == pod.key:
            return "a pod may always reach itself"
        if self.source.node is not None and self.source.node == pod.spec.node_name:
            return "a node may always reach its own pods"
        return None


class Names:
    """Names and addresses of one state of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.nodes: dict[bytes, str] = {
            parse_address(address.address): name
            for name, node in cluster.nodes.items()
            for address in node.status.addresses
            if address.type == "InternalIP"
        }
        #: Whose an address is that clients outside know as well.
        self.hosts: dict[bytes, str] = {
            parse_address(address): name for name, address in node_addresses(cluster)
        }
        self.pods: dict[bytes, Pod] = {}
        # The last one stands: pods that are not being deleted, then the first by name.
        for _, pod in sorted(
            cluster.pods.items(),
            key=lambda item: (item[1].metadata.deletion_timestamp is not None, item[0]),
            reverse=True,
        ):
            if not pod.finished and not pod.spec.host_network:
                for ip in pod.ips:
                    self.pods[parse_address(ip)] = pod
        self.services: dict[bytes, Service] = {
            parse_address(ip): service
            for service in cluster.services.values()
            for ip in service.cluster_ips
        }
        self.slices: dict[tuple[str, str], list[EndpointSlice]] = {}
        for (namespace, _), one in sorted(cluster.slices.items()):
            self.slices.setdefault((namespace, one.service), []).append(one)
        self.end_at = lru_cache(65536)(self._end_at)
        self.find = lru_cache(65536)(self._find)

    def attempts(self, question: Question) -> list[Attempt]:
        """Every connection that the question may mean, at least one. QuestionError."""
        source = self.find(question.source)
        sources = self._sources(question.source, source)
        found = self._frontend(question)
        if found is not None:
            return self._to_frontend(question, sources, *found)
        target = self.find(question.target)
        if isinstance(target, Service):
            return self._to_service(question, sources, target)
        for end in target:
            if end.address in _ITSELF or end.ip.startswith("127."):
                raise QuestionError(f"{question.target}: every pod is that itself")
            for start in sources:
                if _fits(start, question.family) and is_ipv4(start.address) == is_ipv4(end.address):
                    return [Attempt(start, end, question.port, question.protocol)]
        raise self._no_family(question)

    # ---- Inside -------------------------------------------------------------------

    def _end_at(self, address: bytes) -> End:
        return End(address, self.pods.get(address), self.nodes.get(address))

    def _find(self, name: str) -> Service | tuple[End, ...]:
        parts = name.split("/")
        if len(parts) == 1:
            try:
                address = parse_address(name)
            except ValueError:
                raise QuestionError(
                    f"{name}: expected NAMESPACE/POD, svc/NAMESPACE/NAME or an address"
                ) from None
            return self.services.get(address) or (self.end_at(address),)
        if len(parts) == 2:
            pod = self.cluster.pods.get((parts[0], parts[1]))
            if pod is not None:
                return self._pod_ends(pod)
        elif len(parts) != 3 or parts[0] not in ("svc", "service", "pod"):
            raise QuestionError(f"{name}: expected NAMESPACE/POD or svc/NAMESPACE/NAME")
        if parts[0] == "pod" and len(parts) == 3:
            pod = self.cluster.pods.get((parts[1], parts[2]))
            if pod is None:
                raise QuestionError(f"no pod {parts[1]}/{parts[2]}")
            return self._pod_ends(pod)
        service = self.cluster.services.get((parts[-2], parts[-1]))
        if service is None:
            kind = "service" if len(parts) == 3 else "pod or service"
            raise QuestionError(f"no {kind} {parts[-2]}/{parts[-1]}")
        if service.spec.type == "ExternalName":
            raise QuestionError(
                f"service {parts[-2]}/{parts[-1]} is of type ExternalName: ask about an address"
                f" of {service.spec.external_name}"
            )
        return service

    def _pod_ends(self, pod: Pod) -> tuple[End, ...]:
        key = "/".join(pod.key)
        if pod.finished:
            raise QuestionError(f"pod {key} has finished ({pod.status.phase})")
        if pod.spec.host_network:
            node = self.cluster.nodes.get(pod.spec.node_name)
            found = (
                [a.address for a in node.status.addresses if a.type == "InternalIP"]
                if (node)
                else []
            )
        else:
            found = pod.ips
        if not found:
            raise QuestionError(f"pod {key} has no address yet")
        if pod.spec.host_network:
            return tuple(self.end_at(parse_address(ip)) for ip in found)
        return tuple(End(parse_address(ip), pod) for ip in found)

    def _sources(self, name: str, found: Service | tuple[End, ...]) -> tuple[End, ...]:
        """A service as source stands for its first backend."""
        if not isinstance(found, Service):
            return found
        ends = [
            self.end_at(parse_address(endpoint.addresses[0]))
            for one in self.slices.get((found.metadata.namespace, found.metadata.name), [])
            for endpoint in one.endpoints[:1]
            if one.address_type != "FQDN"
        ]
        if not ends:
            raise QuestionError(f"service {name} has no pod that could ask")
        return tuple(ends)

    def _to_service(
        self, question: Question, sources: tuple[End, ...], service: Service
    ) -> list[Attempt]:
        key = service.metadata.namespace, service.metadata.name
        label = f"service {key[0]}/{key[1]}"
        try:
            given: bytes | None = parse_address(question.target)
        except ValueError:
            given = None
        frontends = [given] if given else [parse_address(ip) for ip in service.cluster_ips]
        families = [is_ipv4(a) for a in frontends]
        if not families:  # headless: names resolve to the pods themselves
            families = [one.address_type == "IPv4" for one in self.slices.get(key, [])]
            families = families or [is_ipv4(s.address) for s in sources]
        chosen = next(
            (
                s
                for ipv4 in families
                for s in sources
                if is_ipv4(s.address) == ipv4 and _fits(s, question.family)
            ),
            None,
        )
        if chosen is None:
            raise self._no_family(question)
        ipv4 = is_ipv4(chosen.address)
        front = next((End(a) for a in frontends if is_ipv4(a) == ipv4), None)
        if question.protocol == "ICMP":
            raise QuestionError(f"{label} has no ICMP: ask about one of its pods")

        def refused(cause: str) -> list[Attempt]:
            return [Attempt(chosen, front, question.port, question.protocol, unserved=cause)]

        port = next(
            (
                p
                for p in service.spec.ports
                if p.port == question.port and p.protocol == question.protocol
            ),
            None,
        )
        if front is None:  # no translation: the port is the one that was asked
            ends = [
                (self.end_at(parse_address(endpoint.addresses[0])), question.port)
                for one in self.slices.get(key, [])
                if one.address_type == ("IPv4" if ipv4 else "IPv6")
                for endpoint in one.endpoints
                if endpoint.conditions.ready is not False
                or service.spec.publish_not_ready_addresses
            ]
            if not ends:
                return refused("no-backend")
            return [_attempt(chosen, end, port, question.protocol) for end, port in ends]
        if port is None:
            return refused("unknown-service-port")
        at = Frontend("cluster", front.ip, question.port or 0, question.protocol, port)
        return self._served(question, chosen, service, at, front)

    # ---- Frontends -------------------------------------------------------------------

    @cached_property
    def frontends(self) -> Frontends:
        """Where services are asked."""
        return Frontends(self.cluster)

    @cached_property
    def _choices(self) -> Served:
        return Served(self.cluster, self.slices)

    def _frontend(self, question: Question) -> tuple[Service, Frontend] | None:
        """Where the target is an address at which clients outside ask for a service."""
        try:
            address = parse_address(question.target)
        except ValueError:
            return None
        if address in self.services or question.port is None:
            return None
        return self.frontends.at(question.target, question.port, question.protocol)

    def _to_frontend(
        self, question: Question, sources: tuple[End, ...], service: Service, at: Frontend
    ) -> list[Attempt]:
        front = End(parse_address(at.address))
        for source in sources:
            ipv4 = is_ipv4(source.address)
            if _fits(source, question.family) and ipv4 == is_ipv4(front.address):
                return self._served(question, source, service, at, front)
        raise self._no_family(question)

    def _served(
        self, question: Question, source: End, service: Service, at: Frontend, front: End
    ) -> list[Attempt]:
        """To each backend that the client may be given."""
        home = source.pod.spec.node_name if source.pod else source.node
        found, cause = self._choices.backends(service, at, source.ip, home, source.pod is not None)
        if found and question.protocol == "SCTP" and any(b.port != question.port for b in found):
            cause = "sctp-port-rewrite"
        if cause:
            return [Attempt(source, front, question.port, question.protocol, unserved=cause)]
        attempts = []
        for one in found:
            end = self.end_at(parse_address(one.address))
            for node in one.seen_as:
                start = source if node is None else self._node_end(node, is_ipv4(end.address))
                attempts.append(_attempt(start, end, one.port, question.protocol))
        return attempts

    def _node_end(self, node: str, ipv4: bool) -> End:
        for address, name in self.nodes.items():
            if name == node and is_ipv4(address) == ipv4:
                return End(address, None, node)
        raise QuestionError(f"node {node} has no {'IPv4' if ipv4 else 'IPv6'} address")

    def _no_family(self, question: Question) -> QuestionError:
        wanted = f"IPv{question.family}" if question.family else "one address family"
        return QuestionError(f"{question.source} and {question.target} do not share {wanted}")


def _attempt(source: End, end: End, port: int | None, protocol: str) -> Attempt:
    backend = f"[{end.ip}]:{port}" if ":" in end.ip else f"{end.ip}:{port}"
    return Attempt(source, end, port, protocol, backend)


def _fits(end: End, family: Family | None) -> bool:
    return family is None or is_ipv4(end.address) == (family == 4)
