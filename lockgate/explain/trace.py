"""Where would a packet to a service's frontend go, and why: asked of the kernel, node by node.

The packet runs through the live programs of the node where it comes in, marked as dry; what came
out of them runs through those of the next node, until it is delivered or dropped. Beside each run
stands what that node has in force at the frontend: the table, the slot, its owners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from lockgate.bpf.btf import Schema
from lockgate.compile.balance import flow_hash
from lockgate.compile.tables import PROTOCOL_NUMBER
from lockgate.explain.frontends import Frontends
from lockgate.explain.kernel import (
    CAUSE_POLICY,
    CELL_REASON,
    DIR_EGRESS,
    DIR_INGRESS,
    DRY_EGRESS,
    DRY_INGRESS,
    DRY_RESULT,
    DRY_TARGET,
    IFINDEX_BASE,
    LINK_OUTSIDE,
    LINK_TUNNEL,
    LINK_UNDERLAY,
    TO_HOP,
    DryRun,
    NodeKernel,
    Ran,
)
from lockgate.explain.names import End, Names
from lockgate.explain.packet import SOURCE_PORT, Ends, ends_of, first_packet
from lockgate.explain.question import QuestionError
from lockgate.objects.address import format_address, is_ipv4, is_special, parse_address
from lockgate.objects.model import Cluster, Service

__all__ = ["Asked", "Step", "Trace", "Tracer", "asked", "entry", "join"]

TO_LOCAL, TO_HOST = 1, 3
#: A packet that goes on after so many nodes goes round.
_MOST_NODES = 8
Row = dict[str, Any]
#: Of a node: what is in force at frontends (`POST /v1/frontends`).
Views = Callable[[str, list[Row]], list[Row | None]]
#: Of a node: what its firewall says of a packet (`POST /v1/firewall/ask`); None: nothing.
Firewall = Callable[[str, Row], Row | None]


@dataclass(frozen=True, slots=True)
class Asked:
    """A packet: from a client outside the cluster, a pod or a node, to a frontend. `begins`: the
    first of its connection; else, of TCP, one that only the node of the backend knows."""

    client: End
    sport: int
    frontend: bytes
    port: int
    protocol: str
    service: Service | None
    begins: bool = True

    @property
    def text(self) -> str:
        to = join(format_address(self.frontend), self.port)
        return f"{join(self.client.ip, self.sport)} → {to}/{self.protocol}"


@dataclass(slots=True)
class Step:
    """What one node does with the packet. `view`: what it has in force at the frontend."""

    node: str
    program: str
    came: Ends
    #: allow · deny; none: it goes on as it came, and no service is asked.
    verdict: str = "deny"
    cause: str | None = None
    direction: str | None = None
    policies: list[Row] = field(default_factory=list)
    view: Row | None = None
    #: pod · node · stack · outside · nowhere, and who.
    to: str = "nowhere"
    name: str = ""
    mode: str | None = None  # dsr · snat: how it leaves for another node's backend
    went: Ends | None = None
    #: What the firewall at the card says; None where none looks.
    firewall: Row | None = None

    def json(self) -> Row:
        went = self.went
        return {
            "node": self.node,
            "program": self.program,
            "verdict": self.verdict,
            "cause": self.cause,
            "direction": self.direction,
            "policies": self.policies,
            "firewall": self.firewall,
            "slot": self.view
            and self.view["slot"]
            and self.view["slot"] | {"of": self.view["slots"]},
            "owners": self.owners,
            "to": self.to,
            "name": self.name or None,
            "mode": self.mode,
            "outer": went
            and went.outer
            and dict(zip(("source", "destination"), map(format_address, went.outer), strict=True)),
            "destination": went
            and {"address": format_address(went.destination), "port": went.dport},
        }

    @property
    def owners(self) -> list[Row]:
        """Those of the flow's slot, in order."""
        if not self.view or not self.view["slot"]:
            return []
        return [self.view["owners"][number] for number in self.view["slot"]["owners"]]


@dataclass(slots=True)
class Trace:
    """All steps. The last says what becomes of the packet."""

    asked: Asked
    hash: int
    steps: list[Step]

    @property
    def verdict(self) -> str:
        return self.steps[-1].verdict

    @property
    def reaches(self) -> bool:
        return self.verdict == "allow"

    @property
    def backend(self) -> str | None:
        went = self.steps[-1].went if self.reaches else None
        return join(format_address(went.destination), went.dport) if went else None

    def json(self) -> Row:
        one = self.asked
        key = one.service and (one.service.metadata.namespace, one.service.metadata.name)
        return {
            "client": {"address": one.client.ip, "port": one.sport},
            "frontend": {
                "address": format_address(one.frontend),
                "port": one.port,
                "protocol": one.protocol,
            },
            "service": key and dict(zip(("namespace", "name"), key, strict=True)),
            "hash": self.hash,
            "verdict": self.verdict,
            "cause": self.steps[-1].cause,
            "backend": self.backend,
            "steps": [step.json() for step in self.steps],
        }


def asked(names: Names, client: str, frontend: str, *, begins: bool = True) -> Asked:
    """What people write: CLIENT as for explain, with a port if one is meant; FRONTEND as
    `Frontends.find` takes it. QuestionError."""
    frontends = Frontends(names.cluster)
    address, port, protocol = frontends.find(frontend)
    found = frontends.at(address, port, protocol)
    who, sport = client, SOURCE_PORT
    host, colon, number = client.rpartition(":")
    if colon and number.isdigit() and (host.startswith("[") or host.count(":") == 0):
        who, sport = host.strip("[]"), int(number)
    if not 0 < sport < 65536:
        raise QuestionError(f"{client}: expected a port from 1 to 65535 after ':'")
    to = parse_address(address)
    ends = names.find(who)
    if isinstance(ends, Service):
        raise QuestionError(
            f"{client} is a service: a client is a pod, a node or an address outside"
        )
    source = next((end for end in ends if is_ipv4(end.address) == is_ipv4(to)), None)
    if source is None:
        raise QuestionError(f"{client} and {address} do not share one address family")
    if source.pod is None and is_special(source.address):
        raise QuestionError(f"{client}: no client outside has that address")
    return Asked(source, sport, to, port, protocol, found[0] if found else None, begins)


class Tracer:
    """Asks the kernel of each node on the way. `node` opens one by its name, `views` and `firewall`
    ask its agent; all raise QuestionError."""

    def __init__(
        self,
        cluster: Cluster,
        node: Callable[[str], NodeKernel],
        views: Views,
        firewall: Firewall,
        schema: Schema,
    ) -> None:
        self.names = Names(cluster)
        self._open, self._views, self._firewall = node, views, firewall
        self._nodes: dict[str, NodeKernel] = {}
        self._causes = {
            number: name.removeprefix("CAUSE_").lower().replace("_", "-")
            for name, number in schema.enum("cause").items()
        }

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()
        self._nodes.clear()

    def trace(self, one: Asked, via: str = "") -> Trace:
        """`via`: the node where a packet from outside comes in; else the one that has the
        address, or the first that serves the service."""
        number = PROTOCOL_NUMBER[one.protocol]
        found = Trace(
            one, flow_hash(one.client.address, one.frontend, one.sport, one.port, number), []
        )
        name, first = self._begin(one, via)
        run: DryRun | None = first
        while run is not None and len(found.steps) < _MOST_NODES:
            step = Step(name, run.program, ends_of(run.packet))
            found.steps.append(step)
            if self._is_dropped(step, run, one):
                break
            step.view = self._view(one, found.hash, name)
            ran = self._node(name).run([run])[0]
            name, run = self._read(step, ran, one)
        return found

    # ---- Inside ----------------------------------------------------------------------

    def _node(self, name: str) -> NodeKernel:
        if name not in self.names.cluster.nodes:
            raise QuestionError(f"node {name} is not of this cluster")
        if name not in self._nodes:
            self._nodes[name] = self._open(name)
        return self._nodes[name]

    def _begin(self, one: Asked, via: str) -> tuple[str, DryRun]:
        client = one.client
        packet = partial(
            first_packet,
            client.address,
            one.frontend,
            one.protocol,
            one.port,
            source_port=one.sport,
            begins=one.begins,
        )
        if client.pod is not None:
            at = self._node(client.pod.spec.node_name)
            slot, mac, host_mac = at.endpoint(client.address, "/".join(client.pod.key))
            frame = packet(source_mac=mac, destination_mac=host_mac)
            return at.name, DryRun("from_pod", frame, IFINDEX_BASE + slot)
        name = via or entry(self.names, one)
        if client.node == name:
            raise QuestionError(
                f"{client.ip} is node {name} itself, whose processes are given a backend when they"
                " connect: see lockgate service show"
            )
        at = self._node(name)
        role = LINK_OUTSIDE if client.node is None else LINK_UNDERLAY
        return name, DryRun("from_net", packet(), at.link(role))

    def _is_dropped(self, step: Step, run: DryRun, one: Asked) -> bool:
        """By the firewall at the card; what another node's balancer sends on is judged as the
        packet inside."""
        if run.program != "from_net":
            return False
        came = step.came
        asked = {
            "ifindex": run.ifindex,
            "source": format_address(came.source),
            "destination": format_address(came.destination),
            "protocol": one.protocol,
            "port": came.dport,
        }
        step.firewall = self._firewall(step.node, asked)
        cause = step.firewall and step.firewall["cause"]
        if not cause or (came.outer and cause == "spoofed-source"):
            return False
        step.cause = cause
        return True

    def _view(self, one: Asked, hash_: int, node: str) -> Row | None:
        asked = {
            "address": format_address(one.frontend),
            "port": one.port,
            "protocol": one.protocol,
            "hash": hash_,
        }
        view = self._views(node, [asked])[0]
        if view and view["affinity"]:
            # All of a client's connections have one slot (bpf/choose.h, slot_hash).
            number = PROTOCOL_NUMBER[one.protocol]
            whole = flow_hash(one.client.address, one.frontend, 0, one.port, number)
            view = self._views(node, [asked | {"hash": whole}])[0]
        return view

    def _read(self, step: Step, ran: Ran, one: Asked) -> tuple[str, DryRun | None]:
        """What the run says; the next node and what comes there."""
        word, target = ran.cb[DRY_RESULT], ran.cb[DRY_TARGET]
        cause, judged, kind = word >> 8 & 0xFF, word >> 16, target >> 28
        if ran.retval == -1 and not (word or target):
            step.to, step.verdict = "stack", "none"
            step.went = step.came
            return "", None
        step.verdict = "allow" if word & 1 else "deny"
        if step.verdict == "deny" and cause != CAUSE_POLICY:
            step.cause = self._causes.get(cause, str(cause))
        self._policies(step, ran, judged)
        if step.verdict == "deny":
            return "", None
        step.went = ends_of(ran.packet)
        if kind == TO_LOCAL:
            end = self.names.end_at(step.went.destination)
            step.to, step.name = "pod", "/".join(end.pod.key) if end.pod else end.ip
            return "", None
        if kind != TO_HOP:
            step.to = "stack"
            return "", None
        return self._leave(step, ran, target & 0xFFF_FFFF, one)

    def _leave(self, step: Step, ran: Ran, hop: int, one: Asked) -> tuple[str, DryRun | None]:
        went = step.went
        assert went is not None
        end = self.names.end_at(went.outer[1] if went.outer else went.destination)
        node = self.names.hosts.get(end.address)
        if end.pod is None and node is None:
            step.to, step.name = "outside", end.ip
            if (end.address, went.dport) == (one.frontend, one.port):
                step.verdict = "none"
            return "", None
        remote = self._node(step.node).tunnel_end(hop)
        following = end.pod.spec.node_name if end.pod else node
        if remote is not None:
            following = self.names.end_at(remote).node
        if following is None:
            raise QuestionError(f"node {step.node}: its way to {end.ip} leads to no node")
        at = self._node(following)
        step.to, step.name = "node", following
        role = LINK_UNDERLAY if remote is None else LINK_TUNNEL
        if went.outer:
            step.mode = "dsr"
        elif step.program == "from_net" and went.source != step.came.source:
            step.mode = "snat"
        return following, DryRun("from_net", ran.packet, at.link(role))

    def _policies(self, step: Step, ran: Ran, judged: int) -> None:
        """The policies that decided: ingress where it was judged and is isolated, else egress."""
        for direction, bit, cell in (
            ("egress", DIR_EGRESS, ran.cb[DRY_EGRESS]),
            ("ingress", DIR_INGRESS, ran.cb[DRY_INGRESS]),
        ):
            if not judged & 1 << bit or not cell & CELL_REASON:
                continue
            known = self._node(step.node).reason(cell & CELL_REASON)
            if known is None:
                raise QuestionError(
                    f"node {step.node}: its journal does not name reason {cell & CELL_REASON}"
                )
            step.direction, step.policies = direction, known


def join(ip: str, port: int) -> str:
    return f"[{ip}]:{port}" if ":" in ip else f"{ip}:{port}"


def entry(names: Names, one: Asked) -> str:
    """The node where a packet comes in, if nobody says which: the one that has the address, else a
    node's process asks at its own, else the first that serves the service. QuestionError."""
    owner = names.hosts.get(one.frontend) or one.client.node
    if owner is not None:
        return owner
    nodes = sorted(names.cluster.nodes)
    if one.service is not None and one.service.spec.external_traffic_policy == "Local":
        key = one.service.metadata.namespace, one.service.metadata.name
        serving = {
            endpoint.node_name
            for slice_ in names.slices.get(key, ())
            for endpoint in slice_.endpoints
            if endpoint.conditions.ready is not False
        }
        nodes = [name for name in nodes if name in serving] or nodes
    if not nodes:
        raise QuestionError("there is no node")
    return nodes[0]
