"""One random cluster on its three nodes, and what became of each client's packet.

Every packet goes through the programs of the node where it arrives: as a question, by XDP, and for
real; what another node is to serve goes on to that node's programs. All of it is held against what
the specification permits, and against what the same client was given before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Set
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any

from lockgate.objects.model import Cluster
from lockgate.spec.policy import pod_at
from lockgate.spec.services import Choice, serving
from tests.bytecode.service_nodes import CAUSES, Ask, Found, Node, Nodes, decode
from tests.bytecode.world import OUTSIDE

__all__ = ["WORLD", "Mismatch", "Score", "Trial", "permitted"]

WORLD = {
    4: ("198.51.100.7", "198.51.100.200", "203.0.113.77"),
    6: ("2001:db8:ffff::7", "2001:db8:fffe::9"),
}
HOPS = 4


@dataclass
class Score:
    """What was run: `seen` by what became of a client's packet."""

    clusters: int = 0
    packets: int = 0
    seen: Counter[str] = field(default_factory=Counter)


@dataclass(eq=False)
class Mismatch(Exception):
    ask: Ask
    text: str

    def __str__(self) -> str:
        return f"{self.ask}:\n{self.text}"


@dataclass(frozen=True)
class Begun:
    """A connection as it was when it began. `ends`: with whom it may be."""

    ask: Ask
    found: Found
    ends: frozenset[tuple[str, int]]
    service: int
    holder: Any
    pods: tuple[str, ...]


class Trial:
    """One cluster on its nodes, and all that its clients did."""

    def __init__(self, nodes: Nodes, cluster: Cluster, snat: bool, score: Score) -> None:
        self.nodes, self._score = nodes, score
        self.cluster, self.snat = cluster, snat
        self._sport = 1023
        #: What a client with affinity has, by node, client and service id.
        self._kept: dict[tuple[str, str, int], frozenset[tuple[str, int]]] = {}
        self._begun: list[Begun] = []
        for node in nodes:
            node.forget(snat)
        self.take(cluster)

    def take(self, cluster: Cluster, by_new_agents: bool = False) -> None:
        self.cluster = cluster
        for node in self.nodes:
            node.take(cluster, by_new_agents)

    def sport(self) -> int:
        """No two connections have the same."""
        self._sport += 1
        return self._sport

    # ---- One packet ----------------------------------------------------------------------

    def check(self, ask: Ask) -> None:
        """Mismatch if the kernel does anything else with it than it may."""
        node = self.nodes[ask.node]
        wanted = node.choose(ask.client, ask.frontend)
        spoofs = self._spoofs(ask, wanted)
        dry = node.dry(ask)
        self._agrees(ask, wanted, dry, self._spoofs(ask, wanted, dry=True), "dry run")
        self._keeps(ask, wanted, dry)
        by_xdp = node.xdp(ask) if ask.link else None
        real = node.real(ask)
        self._score.packets += 2 + (by_xdp is not None)
        self._agrees(ask, wanted, real, spoofs, "real run")
        if real.cause in CAUSES:
            refused = wanted.verdict == "refuse" or real.cause == "sctp-port-rewrite"
            if real.told != refused:
                raise Mismatch(ask, f"{real.cause}: sender told: {real.told}")
        if spoofs:
            self._score.seen["spoofed"] += 1
            assert by_xdp is None
            return
        if wanted.verdict == "none" and pod_at(self.cluster, ask.frontend.address):
            self._score.seen["a pod's address"] += 1  # policies' business, not services'
            return
        if real.cause != dry.cause and {real.cause, dry.cause} - {"", "sctp-port-rewrite"}:
            raise Mismatch(ask, f"dry run: {dry.cause!r}, real run: {real.cause!r}")
        serves = bool(permitted(wanted, ask.begins))
        # Of what XDP remembers the port is known.
        if ask.link and serves and not same_end(real.backend, dry.backend):
            raise Mismatch(ask, f"dry run: {dry.backend}, real run: {real.backend}")
        if by_xdp is not None:
            self._agrees(ask, wanted, by_xdp, spoofs, "XDP")
            if not same_end(by_xdp.backend, real.backend):
                raise Mismatch(ask, f"XDP: {by_xdp.backend}, from_net: {real.backend}")
        served = serves and not real.cause
        self._count(ask, real, served, by_xdp is not None)
        if not served:
            if serves:
                self._kept.pop((ask.node, ask.client.address, dry.service), None)
            return
        elsewhere = self.nodes.node_of(self.cluster, real.backend[0]) not in (None, node)
        # From outside, a node's stack takes nothing that has its own address as the source.
        pods = (pod for pod in self.cluster.pods.values() if not pod.spec.host_network)
        itself = real.backend[0] == ask.client.address and not any(
            ask.client.address in pod.ips for pod in pods
        )
        if ask.link and real.encapsulated != (elsewhere and self._by_dsr(wanted) and not itself):
            raise Mismatch(ask, f"encapsulated: {real.encapsulated}, to {real.backend}")
        self._note(ask, wanted, real, dry.service)
        if ask.link and ask.begins:
            self._everywhere(ask, wanted, dry)
        elif ask.begins:
            self._reaches_all(ask, wanted)
        for sent in (real, by_xdp):
            if sent is not None and sent.encapsulated:
                self._follow(ask, wanted, sent)

    def _count(self, ask: Ask, real: Found, served: bool, by_xdp: bool) -> None:
        how = real.cause or "passed"
        if real.encapsulated:
            how = "encapsulated"
        elif served:
            snat = ask.link and decode(real.frame).sport != ask.sport
            how = "snat" if snat else "served"
        self._score.seen[f"{ask.client.place} {how}"] += 1
        self._score.seen["xdp"] += by_xdp

    def _spoofs(self, ask: Ask, wanted: Choice, dry: bool = False) -> bool:
        """Is it of a sender who is not believed? Questions do not ask by which card nodes send."""
        if not ask.link:
            return False
        node, source = self.nodes[ask.node], ask.client.address
        owner = self.nodes.node_of(self.cluster, source)
        if owner is None:
            return False
        if source not in owner.own and ask.link == OUTSIDE:
            return True
        # Whoever is refused for another reason hears that.
        late = wanted.verdict == "serve" or wanted.cause in ("no-backend", "no-local-backend")
        return late and (owner is node or (ask.link == OUTSIDE and not dry))

    def _agrees(self, ask: Ask, wanted: Choice, found: Found, spoofs: bool, what: str) -> None:
        if spoofs:
            if found.cause != "spoofed-source":
                raise Mismatch(ask, f"{what}: {found}, but its source is none that comes here")
            return
        asked = ask.frontend.address, ask.frontend.port
        allowed = permitted(wanted, ask.begins)
        if wanted.verdict == "none":
            if found.cause in CAUSES or found.encapsulated or found.service:
                raise Mismatch(ask, f"{what}: {found}, but it is no frontend")
            if not found.cause and found.backend not in (None, asked):
                raise Mismatch(ask, f"{what}: {found.backend}, but it is no frontend")
        elif not allowed:
            if found.cause != wanted.cause:
                raise Mismatch(ask, f"{what}: {found}, wanted {wanted.verdict}: {wanted.cause}")
        elif found.cause == "sctp-port-rewrite":
            rewritten = any(port != ask.frontend.port for _, port in allowed)
            if ask.frontend.protocol != "SCTP" or not rewritten:
                raise Mismatch(ask, f"{what}: {found}, wanted {allowed}")
        elif found.cause or found.backend is None:
            raise Mismatch(ask, f"{what}: {found}, wanted {allowed}")
        elif not is_in(found.backend, allowed):
            raise Mismatch(ask, f"{what}: {found.backend}, permitted {sorted(allowed)}")

    def _reaches_all(self, ask: Ask, wanted: Choice) -> None:
        """Inside each has the same chance: none is left out."""
        missing = permitted(wanted, True)
        if self._has_affinity(wanted) or ask.frontend.protocol == "SCTP":
            return
        for _ in range(60 * len(missing)):
            found = self.nodes[ask.node].dry(ask)
            self._score.packets += 1
            missing = {one for one in missing if not same_end(found.backend, one)}
            if not missing:
                return
        raise Mismatch(ask, f"{sorted(missing)} are never chosen")

    # ---- What clients have ---------------------------------------------------------------

    def _keeps(self, ask: Ask, wanted: Choice, dry: Found) -> None:
        """With affinity a client keeps its backend, while that takes new connections."""
        kept = self._kept.get((ask.node, ask.client.address, dry.service))
        if kept is None or not ask.begins or dry.cause:
            return
        if kept <= permitted(wanted, True) and not is_in(dry.backend, kept):
            raise Mismatch(ask, f"dry run: {dry.backend}, but the client has {sorted(kept)}")

    def _note(self, ask: Ask, wanted: Choice, real: Found, service: int) -> None:
        assert real.backend is not None
        # A pod's packet of no known connection begins one, whatever it says.
        if self._has_affinity(wanted) and (ask.begins or not ask.link):
            ends = ends_of(real, permitted(wanted, ask.begins))
            self._kept[ask.node, ask.client.address, service] = ends
        if not ask.begins:
            return
        ends = ends_of(real, permitted(wanted, True))
        pods = self._pods_at(ask.client.address, real.backend[0])
        self._begun.append(Begun(ask, real, ends, service, wanted.holder, pods))

    def _has_affinity(self, wanted: Choice) -> bool:
        if wanted.holder is None or wanted.holder[0] != "Service":
            return False
        return bool(self.cluster.services[wanted.holder[1:]].affinity)

    def _by_dsr(self, wanted: Choice) -> bool:
        if wanted.holder is None or wanted.holder[0] != "Service":
            return False
        annotations = self.cluster.services[wanted.holder[1:]].metadata.annotations
        mode = annotations.get("lockgate.dev/forwarding")
        return mode == "dsr" or (mode != "snat" and not self.snat)

    def _pods_at(self, *addresses: str) -> tuple[str, ...]:
        return tuple(
            pod.metadata.uid + pod.spec.node_name
            for address in addresses
            for pod in self.cluster.pods.values()
            if address in pod.ips and not pod.finished
        )

    def go_on(self, rng: Random, most: int) -> None:
        """Packets of connections that began before: they keep their backends."""
        for begun in rng.sample(self._begun, min(most, len(self._begun))):
            self._goes_on(begun)

    def _goes_on(self, begun: Begun) -> None:
        ask = begun.ask
        node = self.nodes[ask.node]
        here = {ip for key in node.slots for ip in self.cluster.pods[key].ips}
        if not ask.link and ask.client.address not in here:
            return
        wanted = node.choose(ask.client, ask.frontend)
        dry = node.dry(ask)
        known = wanted.holder == begun.holder and wanted.cause != "source-range"
        if not known or dry.service != begun.service or self._spoofs(ask, wanted):
            return
        later = ask if ask.frontend.protocol == "UDP" else replace(ask, begins=False)
        backend = begun.found.backend
        living = self._living(begun, wanted)
        same = self._pods_at(ask.client.address, backend[0]) == begun.pods
        kept = not begun.found.encapsulated or node.remembers_flow(ask)
        found = node.real(later)
        self._kept.pop((ask.node, ask.client.address, begun.service), None)
        self._score.packets += 1
        if begun.ends <= living and same and kept:
            self._score.seen["kept"] += 1
            if found.cause or not same_end(found.backend, backend):
                raise Mismatch(later, f"{found}, but the connection has {backend}")
        elif ask.frontend.protocol == "UDP" and not begun.ends & living:
            self._score.seen["moved"] += 1
            self._agrees(later, wanted, found, False, "the backend went")

    def _living(self, begun: Begun, wanted: Choice) -> set[tuple[str, int]]:
        """Who may keep a connection of this frontend."""
        backends, frontend = permitted(wanted, False), begun.ask.frontend
        if begun.holder[0] != "Service" or frontend.protocol != "UDP":
            return backends
        service = self.cluster.services[begun.holder[1:]]
        for port in service.spec.ports:
            if self.nodes[begun.ask.node].ids.is_port(begun.service, service, port):
                backends |= serving(self.cluster, service, port, ":" not in frontend.address)
        return backends

    # ---- At other nodes --------------------------------------------------------------------

    def _everywhere(self, ask: Ask, wanted: Choice, dry: Found) -> None:
        """Of a client outside all nodes come to the same backend."""
        if ask.client.address not in (*WORLD[4], *WORLD[6]) or self._has_affinity(wanted):
            return
        for node in self.nodes:
            theirs = node.choose(ask.client, ask.frontend)
            if (theirs.holder, theirs.backends) != (wanted.holder, wanted.backends):
                continue
            found = node.dry(replace(ask, node=node.name))
            self._score.packets += 1
            self._score.seen["elsewhere"] += node.name != ask.node
            if found.cause != dry.cause and {found.cause, dry.cause} <= {"", "sctp-port-rewrite"}:
                continue
            if found.cause != dry.cause or not same_end(found.backend, dry.backend):
                raise Mismatch(ask, f"{dry.backend}, but at node {node.name} {found}")

    def _follow(self, ask: Ask, wanted: Choice, sent: Found) -> None:
        """To the node of the backend; what begins no connection perhaps from node to node."""
        allowed = permitted(wanted, ask.begins)
        asked = self.nodes[ask.node]
        for hop in range(HOPS):
            assert sent.backend is not None
            node = self.nodes.node_of(self.cluster, sent.backend[0])
            if node is None or (node is asked and not hop):  # the chain may come back
                raise Mismatch(ask, f"encapsulated to {sent.backend}, which is at no other node")
            if not self._is_theirs(ask, node, wanted):
                return
            found = node.inside(ask, sent.frame)
            self._score.packets += 1
            if found.encapsulated and not ask.begins:
                sent = found
                continue
            self._score.seen["at the backend's node"] += 1
            if found.cause == "sctp-port-rewrite" and ask.frontend.protocol == "SCTP":
                return
            wrong = found.cause or found.encapsulated or found.backend not in allowed
            if wrong or (ask.begins and not same_end(found.backend, sent.backend)):
                raise Mismatch(
                    ask, f"{sent.backend}, but its node {node.name}: {found}, {sorted(allowed)}"
                )
            return
        raise Mismatch(ask, f"{HOPS} nodes sent it on")

    def _is_theirs(self, ask: Ask, node: Node, wanted: Choice) -> bool:
        """Does the node have the same service at this frontend? A node port is asked at another
        node's address."""

        def is_same(choice: Choice) -> bool:
            one = choice.verdict, choice.holder, choice.backends
            return one == (wanted.verdict, wanted.holder, wanted.backends)

        theirs = node.choose(ask.client, ask.frontend)
        if is_same(theirs):
            return True
        asked = self.nodes[ask.node]
        if ask.frontend.address not in (*asked.own, *asked.cards, "203.0.113.201"):
            return False
        mine = next(ip for ip in node.own if (":" in ip) == (":" in ask.frontend.address))
        port = node.choose(ask.client, replace(ask.frontend, address=mine))
        return theirs.verdict == "none" and is_same(port)


def permitted(choice: Choice, begins: bool) -> set[tuple[str, int]]:
    return {(one.address, one.port) for one in choice.backends if not (begins and one.ends)}


def ends_of(found: Found, backends: set[tuple[str, int]]) -> frozenset[tuple[str, int]]:
    """With whom it may be: an outer header does not say the port."""
    return frozenset(one for one in backends if same_end(found.backend, one))


def is_in(end: tuple[str, int | None] | None, ends: Set[tuple[str, int]]) -> bool:
    return any(same_end(end, one) for one in ends)


def same_end(one: tuple[str, int | None] | None, other: tuple[str, int | None] | None) -> bool:
    """As far as both say: an outer header has an address, mostly without a port."""
    if one is None or other is None:
        return one is other
    return one[0] == other[0] and (None in (one[1], other[1]) or one[1] == other[1])
