"""Everything that holds on one node: peers, policies, services, the image.

What a compilation came to is kept, and the next one patches it: a pod costs its own addresses,
a service its own backends. Only what rules tell apart is worked out as a whole, when policies,
namespaces or the kinds of local pods are others.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from lockgate.compile.cidr import pack
from lockgate.compile.claims import POD, SERVICE, Holder
from lockgate.compile.drafts import Surroundings
from lockgate.compile.frame import Judgements
from lockgate.compile.frontends import has_host_ports, own_addresses
from lockgate.compile.image import Image
from lockgate.compile.peers import NO_SPOT, Peers
from lockgate.compile.pods import PodFacts, Pods, Profile
from lockgate.compile.services import Services
from lockgate.compile.tables import (
    NO_SLOT,
    ON_HOST,
    PEER_HOST,
    PEER_LOCAL,
    PEER_NODE,
    PEER_REMOTE,
    TARGET_SHIFT,
    TO_HOP,
    TO_HOST,
    TO_LOCAL,
    TO_NOWHERE,
    Delta,
    EndpointView,
    Host,
    Ids,
    PeerView,
    Tables,
)
from lockgate.objects.address import parse_cidr
from lockgate.objects.changes import Changed, Name
from lockgate.objects.model import MOST_WEIGHT, Cluster, Namespace, Node

__all__ = ["compile_node"]

K = TypeVar("K")
_UNFINISHED = 0
_NO_HOST = Host()


def compile_node(
    cluster: Cluster,
    node: str,
    ids: Ids,
    previous: Tables | None = None,
    changed: Changed | None = None,
    host: Host = _NO_HOST,
) -> Tables:
    """The tables of `node`. Pure but for `ids` and `previous`.

    `previous` is an earlier result for the same node and `ids`, and is used up: what it had is
    patched. `changed` says which objects may be others since; without it they are compared.
    What comes out is equivalent to what nothing before would give: numbers of classes and places
    in the image may differ, look-ups do not.
    A pod of this node that got or lost its slot counts as changed, and so does a node whose hop
    is another.
    Objects that can't be read are reported in `errors` and match nothing.
    OverflowError: the policies don't fit the image; `previous` is of no use any more then.
    """
    state = previous.cache if previous is not None else None
    if not isinstance(state, _State) or not state.serves(cluster, node, ids):
        state, previous = _State(node, ids), None
    newest = previous is not None and previous.serial == state.serial
    if not newest or changed is None:
        changed = state.differences(cluster)
        state.doubt()
    base, state.serial = state.serial, _UNFINISHED
    tables = state.compile(cluster, changed, host)
    if newest:
        tables.delta = Delta(
            base,
            state.peers.delta(),
            state.services.views.delta(),
            state.services.live.backends.delta(),
            state.image.changed,
        )
    state.serial = tables.serial
    return tables


class _State:
    """What the compilations of a node came to so far."""

    def __init__(self, node: str, ids: Ids) -> None:
        self.node, self.ids = node, ids
        #: Of the tables made last; while they are made, `_UNFINISHED`.
        self.serial = -1
        self.image = Image()
        self.pods = Pods(node)
        self.peers = Peers()
        self.services = Services(self.image)
        self._host = _NO_HOST
        #: What addresses weigh that weigh less than others, and those where it is another now.
        self._weights: dict[bytes, int] = {}
        self._reweighed: set[bytes] = set()
        #: Addresses of this node, and its zone.
        self._own: tuple[bytes, ...] = ()
        self._zone = ""
        #: Pods of this node whose hostPorts are to be read again.
        self._host_pods: set[Holder] = set()
        self._judgements = Judgements(self.pods, ids)
        self._namespaces: dict[str, Namespace] = {}
        self._nodes: dict[str, Node] = {}
        self._slots: dict[Name, int | None] = {}
        self._hops: dict[str, int] = {}
        #: Addresses of nodes.
        self._of_nodes: dict[bytes, PeerView] = {}
        self._node_errors: list[str] = []
        #: Addresses on one spot nothing can tell apart: a profile and CIDR blocks.
        self._spots: dict[tuple[Profile, frozenset[int]], int] = {}
        self._classes: list[int] = []
        self._endpoints: dict[int, EndpointView] = {}
        #: Is it time to look at the nodes, or at the pods of this node, again?
        self._nodes_due = self._views_due = True

    def serves(self, cluster: Cluster, node: str, ids: Ids) -> bool:
        """Is this what a compilation for `ids` may go on from? Not when the last was not finished,
        or most labels that are known here are gone."""
        return (
            self.serial != _UNFINISHED
            and self.node == node
            and self.ids is ids
            and len(self.pods.subjects) <= 2 * len(cluster.pods) + 1000
        )

    def differences(self, cluster: Cluster) -> Changed:
        """What is another object than before."""
        pods = {key: facts.pod for key, facts in self.pods.facts.items()}
        services = self.services.objects(SERVICE)
        return Changed(
            _differ(self._namespaces, cluster.namespaces),
            _differ(self._nodes, cluster.nodes),
            _differ(pods, cluster.pods),
            _differ(services, cluster.services),
            _differ(self.services.slices, cluster.slices),
            _differ(self._judgements.objects(), cluster.policies),
        )

    def doubt(self) -> None:
        """Slots and hops may be others."""
        for key, facts in self.pods.local.items():
            if self._slots.get(key) != self.ids.slot(facts.pod.metadata.uid):
                self._take_slot(key)
                self.pods.touched.update(dict.fromkeys(facts.addresses))
        self._read_hops()
        self._nodes_due = True

    def compile(self, cluster: Cluster, changed: Changed, host: Host) -> Tables:
        self.peers.begin()
        self.services.begin()
        self.image.begin()
        self._read_pods(cluster, changed.pods)
        _patch(self._namespaces, cluster.namespaces, changed.namespaces)
        _patch(self._nodes, cluster.nodes, changed.nodes)
        if changed.nodes:
            self._read_hops()
            self._nodes_due = True
        judgements = self._judgements
        others = judgements.read(
            self._namespaces,
            {key: cluster.policies.get(key) for key in changed.policies},
            bool(changed.namespaces),
        )
        if others:
            self._classify(judgements.regions_moved)
        touched = self.pods.touched
        if others or self._nodes_due or not touched.keys().isdisjoint(self._of_nodes):
            self._read_nodes()
        for address in touched:
            self._settle(address)
        self.services.owners_moved(touched)
        touched.clear()

        front = judgements.front()
        moved = front is not None and self.image.set_front(front)
        if front is not None or self._views_due:
            self._read_endpoints()
        self._read_services(cluster, changed, host, moved)
        errors = self.pods.errors() + judgements.errors
        errors += self._node_errors + self.services.errors()
        return Tables(
            self.image.words,
            self.peers,
            self._endpoints,
            self.services.views,
            self.services.live.backends,
            errors,
            cache=self,
            host_backends=self.services.hosting,
        )

    # ---- Pods ------------------------------------------------------------------------

    def _read_pods(self, cluster: Cluster, keys: Iterable[Name]) -> None:
        pods = self.pods
        for key in keys:
            here = key in pods.local
            pods.change(key, cluster.pods.get(key))
            if here or key in pods.local:
                self._take_slot(key)

    def _take_slot(self, key: Name) -> None:
        self._views_due = True
        self._host_pods.add((POD, *key))
        facts = self.pods.local.get(key)
        if facts is None:
            self._slots.pop(key, None)
        else:
            self._slots[key] = self.ids.slot(facts.pod.metadata.uid)

    def _read_hops(self) -> None:
        """Ask for the hops again, and touch the pods behind those that are others."""
        hops = {name: self.ids.hop(name) or 0 for name in self._hops}
        others = {name for name, hop in hops.items() if hop != self._hops[name]}
        self._hops = hops
        if others:
            for address, facts in self.pods.owners.items():
                if facts.pod.spec.node_name in others:
                    self.pods.touched[address] = None

    def _settle(self, address: bytes) -> None:
        """Bring what there is to say of an address into the table."""
        view, facts = self._of_nodes.get(address), self.pods.owners.get(address)
        if (weight := self._weight(address)) != self._weights.get(address, MOST_WEIGHT):
            self._reweighed.add(address)
            self._weights[address] = weight
            if weight == MOST_WEIGHT:
                del self._weights[address]
        if view is not None:
            self.peers.put(address, view, NO_SPOT)
        elif facts is None:
            self.peers.drop(address)
        else:
            spot = self._spot(facts, address)
            kind, target = self._where(facts)
            number = self.ids.endpoint(facts.pod)
            self.peers.put(address, PeerView(self._classes[spot], number, kind, target), spot)

    def _where(self, facts: PodFacts) -> tuple[int, int]:
        name = facts.pod.spec.node_name
        if name == self.node:
            slot = self._slots[facts.pod.key]
            if slot == ON_HOST:
                return PEER_HOST, 0
            return PEER_LOCAL, NO_SLOT if slot is None else slot
        hop = self._hops.get(name)
        if hop is None:
            hop = self._hops[name] = self.ids.hop(name) or 0
        return PEER_REMOTE, hop

    # ---- Classes ---------------------------------------------------------------------

    def _spot(self, facts: PodFacts, address: bytes) -> int:
        key = facts.profile, self._judgements.addresses.blocks_at(address)
        spot = self._spots.get(key)
        if spot is None:
            spot = self._spots[key] = len(self._classes)
            self._classes.append(self._class(*key))
        return spot

    def _class(self, profile: Profile, blocks: frozenset[int]) -> int:
        addresses = self._judgements.addresses
        return addresses.class_of(addresses.kind(profile[0], dict(profile[1])), blocks)

    def _classify(self, regions_moved: bool) -> None:
        """What rules tell apart is another: all addresses have their classes of it."""
        if regions_moved or len(self._classes) > 2 * len(self.peers) + 1000:
            self._spots, self._classes = {}, []
            owners = self.pods.owners
            numbers = {
                address: self._spot(owners[address], address)
                for address in self.peers
                if address in owners and address not in self._of_nodes
            }
            self.peers.spots(numbers)
        else:
            for key, spot in list(self._spots.items()):
                if key[0] in self.pods.profiles:
                    self._classes[spot] = self._class(*key)
                else:
                    # Nobody is there, and its ports are not among those that count.
                    del self._spots[key]
        self.peers.classify(self._classes)

    # ---- Nodes -----------------------------------------------------------------------

    def _read_nodes(self) -> None:
        """The peers that are nodes, and touch those that are others."""
        self._nodes_due = False
        errors: list[str] = []
        found = self._find_nodes(errors)
        self._node_errors = errors
        before, self._of_nodes = self._of_nodes, found
        different = {a: None for a in before.keys() | found if before.get(a) != found.get(a)}
        self.pods.touched.update(different)

    def _find_nodes(self, errors: list[str]) -> dict[bytes, PeerView]:
        """An address that a pod has as well is the node's."""
        found: dict[bytes, PeerView] = {}
        addresses = self._judgements.addresses
        for name, object_ in sorted(self._nodes.items()):
            for cidr in object_.pod_cidrs:
                try:
                    parse_cidr(cidr)
                except ValueError as error:
                    errors.append(f"Node {name}: spec.podCIDRs: {error}")
            for entry in object_.status.addresses:
                if entry.type != "InternalIP":
                    continue
                try:
                    address = pack(entry.address)
                except ValueError as error:
                    errors.append(f"Node {name}: status.addresses: {error}")
                    continue
                if address in self.pods.owners or address in found:
                    errors.append(f"Node {name}: status.addresses: {entry.address} is in use")
                    if address in found:
                        continue
                cls = addresses.classify(address, addresses.outside)
                if name == self.node:
                    found[address] = PeerView(cls, 0, PEER_HOST, 0)
                else:
                    found[address] = PeerView(cls, 0, PEER_NODE, self.ids.hop(name) or 0)
        return found

    # ---- Views -----------------------------------------------------------------------

    def _read_endpoints(self) -> None:
        self._views_due = False
        views = self._judgements.views
        found = {
            slot: views[facts.profile]
            for key, facts in self.pods.local.items()
            if (slot := self._slots[key]) not in (None, ON_HOST)
        }
        if found != self._endpoints:
            self._endpoints = found

    # ---- Services --------------------------------------------------------------------

    def _read_services(self, cluster: Cluster, changed: Changed, host: Host, moved: bool) -> None:
        """`moved`: the image has no lists any more."""
        services = self.services
        again: set[Holder] = {(SERVICE, *name) for name in changed.services}
        local = self.pods.local
        again |= {
            key
            for key in self._host_pods
            if key in services.parts or (key[1:] in local and has_host_ports(local[key[1:]].pod))
        }
        self._host_pods.clear()
        here = self._nodes.get(self.node)
        own, zone = own_addresses(here, host.addresses), "" if here is None else here.zone
        addresses = {*self._replaced(), *self._reweighed}
        self._reweighed.clear()
        if own != self._own:
            again |= services.at_node
            addresses.update({*own} ^ {*self._own})
            services.owners_moved({*own} ^ {*self._own})
        if zone != self._zone:
            again |= services.hinted
        if moved or host.snat != self._host.snat:
            again |= services.parts.keys()
        if moved:
            services.place_again(self.image.left)
        self._own, self._zone, self._host = own, zone, host
        around = Surroundings(
            self.ids,
            self.node,
            zone,
            host.snat,
            own,
            self.peers.endpoint,
            self._target,
            self._weight,
        )
        # What another CNI plugin wired has its hostPorts from there.
        pods = {name: facts for name, facts in local.items() if self._slots[name] != ON_HOST}
        services.change(cluster, pods, again, changed.slices, addresses, around)

    def _target(self, address: bytes) -> int:
        """`owner.target`. A pod without a slot is reached by none; what is not of the cluster by
        the node's routes."""
        known = self.peers.where(address)
        if known is None:
            return (TO_HOST if address in self._own else TO_NOWHERE) << TARGET_SHIFT
        kind, target = known
        if kind == PEER_HOST:
            return TO_HOST << TARGET_SHIFT
        where = TO_LOCAL if kind == PEER_LOCAL else TO_HOP
        return where << TARGET_SHIFT | target & (1 << TARGET_SHIFT) - 1

    def _weight(self, address: bytes) -> int:
        facts = self.pods.owners.get(address)
        return MOST_WEIGHT if facts is None else facts.weight

    def _replaced(self) -> list[bytes]:
        """Addresses that are another endpoint's now, or somewhere else."""
        now = self.peers.take(self.peers.before)[:, 1:].tolist()
        return [
            address
            for (address, was), record in zip(self.peers.before.items(), now, strict=True)
            if record != ([0, 0, 0] if was is None else list(was[1:]))
        ]


def _differ(before: Mapping[K, Any], now: Mapping[K, Any]) -> set[K]:
    found = {key for key, item in now.items() if before.get(key) is not item}
    found.update(before.keys() - now.keys())
    return found


def _patch(mine: dict[K, Any], theirs: Mapping[K, Any], keys: Iterable[K]) -> None:
    for key in keys:
        if key in theirs:
            mine[key] = theirs[key]
        else:
            mine.pop(key, None)
