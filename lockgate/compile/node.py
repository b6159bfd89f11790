"""Everything that holds on one node: peers, policies, services, the image."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from lockgate.compile.cidr import Block, pack
from lockgate.compile.labels import PodSelector, Subjects
from lockgate.compile.policy import (
    Addresses,
    Frame,
    Half,
    Parsed,
    PolicySet,
    PortName,
    PortRange,
    Ports,
    compile_set,
    parse,
    write_set,
)
from lockgate.compile.services import Services, compile_services
from lockgate.compile.tables import (
    NO_SLOT,
    PEER_HOST,
    PEER_LOCAL,
    PEER_NODE,
    PEER_REMOTE,
    PORT_TABLE,
    Builder,
    EndpointView,
    Ids,
    PeerView,
    Tables,
)
from lockgate.objects.model import Cluster, Pod

__all__ = ["compile_node"]


#: What policies can tell pods apart by: labels (as a subject) and named ports.
Profile = tuple[int, tuple[tuple[PortName, int], ...]]
SetKey = tuple[tuple[int, ...], tuple[int | None, ...]]
Compiled = tuple[Half, Half, int]


@dataclass(slots=True)
class PodFacts:
    """What the compiler asks of a pod, read once per object."""

    pod: Pod
    profile: Profile
    addresses: tuple[bytes, ...]
    member: bool
    errors: tuple[str, ...]


@dataclass(slots=True)
class People:
    """The pods of a compilation, as far as no policy is concerned."""

    #: Facts of the pods that count: not finished, not on the host's network.
    members: list[PodFacts]
    #: Those of this node.
    local: list[PodFacts]
    #: Who has an address, and for each the pod's id and, by kind, where it is.
    owners: dict[bytes, PodFacts]
    endpoints: NDArray[np.int64]
    errors: list[str]
    claims: list[str]
    #: Different profiles, in the order of the pods.
    profiles: list[Profile]
    local_profiles: list[Profile]
    #: For each local pod the position of its profile in `local_profiles`.
    local_profile: list[int]


@dataclass(slots=True)
class Spots:
    """Addresses that nothing can tell apart are on one spot: a profile and CIDR blocks."""

    #: Profile and blocks, in the order of the addresses.
    spots: list[tuple[Profile, frozenset[int]]]
    #: For each of the owners' addresses its spot.
    of: NDArray[np.intp]


@dataclass(slots=True)
class Peers:
    """The peers that are pods: as records, one per owner, and as a dict. `slots` (of the local
    pods) and `hops` are what their targets were made of."""

    slots: list[int | None]
    hops: dict[str, int]
    records: NDArray[np.int64]
    views: dict[bytes, PeerView]


@dataclass(slots=True)
class Cache:
    """What the next compilation may reuse. Objects are immutable, so an object that is
    still the same means the same; every entry keeps its object alive, so ids stay its own."""

    ids: Ids
    subjects: Subjects = field(default_factory=Subjects)
    pods: dict[int, PodFacts] = field(default_factory=dict)
    policies: dict[int, Parsed] = field(default_factory=dict)
    people: People | None = None
    spots: Spots | None = None
    peers: Peers | None = None
    nodes: dict[bytes, PeerView] = field(default_factory=dict)
    services: Services | None = None
    frame: object = None
    ports: Ports | None = None
    addresses: Addresses | None = None
    sets: dict[SetKey, Compiled] = field(default_factory=dict)


# ---- Pods ----------------------------------------------------------------------------


def _read_pod(pod: Pod, subjects: Subjects) -> PodFacts:
    namespace, name = pod.key
    addresses: list[bytes] = []
    errors: list[str] = []
    for ip in pod.ips:
        try:
            addresses.append(pack(ip))
        except ValueError as error:
            errors.append(f"Pod {namespace}/{name}: status.podIPs: {error}")
    ports: dict[PortName, int] = {}
    for container in pod.spec.containers:
        for port in container.ports:
            if port.name and 0 < port.container_port <= 65535:
                # The first of a name and protocol counts, as for kubelet's probes.
                ports.setdefault((port.name, PORT_TABLE[port.protocol]), port.container_port)
    return PodFacts(
        pod=pod,
        profile=(subjects.number(namespace, pod.metadata.labels), tuple(sorted(ports.items()))),
        addresses=tuple(dict.fromkeys(addresses)),
        member=not pod.finished and not pod.spec.host_network,
        errors=tuple(errors),
    )


def _read_people(cluster: Cluster, node: str, before: Cache, cache: Cache) -> People:
    """Who is there; the same object as before if the pods are."""
    people = before.people
    numbers = list(map(id, cluster.pods.values()))
    if people is not None and list(before.pods) == numbers:
        cache.pods = before.pods
        return people
    old, new, subjects = before.pods, cache.pods, cache.subjects
    members: list[PodFacts] = []
    for number, pod in zip(numbers, cluster.pods.values(), strict=True):
        facts = old.get(number)
        if facts is None:
            facts = _read_pod(pod, subjects)
        new[number] = facts
        if facts.member:
            members.append(facts)
    local = [facts for facts in members if facts.pod.spec.node_name == node]
    claims: list[str] = []
    owners = _claims(members, claims)
    local_profiles = {facts.profile: 0 for facts in local}
    for position, profile in enumerate(local_profiles):
        local_profiles[profile] = position
    return People(
        members=members,
        local=local,
        owners=owners,
        endpoints=np.array([cache.ids.endpoint(f.pod) for f in owners.values()], np.int64),
        errors=[error for facts in members for error in facts.errors],
        claims=claims,
        profiles=list(dict.fromkeys(facts.profile for facts in members)),
        local_profiles=list(local_profiles),
        local_profile=[local_profiles[facts.profile] for facts in local],
    )


def _claims(members: list[PodFacts], errors: list[str]) -> dict[bytes, PodFacts]:
    """Who has an address. Two claims: the pod that is not going away, then the first by name,
    as the specification has it (a uid does not tell which pod is newer)."""
    owners: dict[bytes, PodFacts] = {}
    for facts in members:
        for address in facts.addresses:
            other = owners.setdefault(address, facts)
            if other is not facts:
                winner = min(other, facts, key=_precedence)
                loser = facts if winner is other else other
                owners[address] = winner
                errors.append(
                    f"Pod {'/'.join(loser.pod.key)}: status.podIPs: an address is"
                    f" Pod {'/'.join(winner.pod.key)}'s as well, which keeps it"
                )
    return owners


def _precedence(facts: PodFacts) -> tuple[bool, tuple[str, str]]:
    return facts.pod.metadata.deletion_timestamp is not None, facts.pod.key


def _spots(people: People, addresses: Addresses, before: Cache) -> Spots:
    if (
        before.spots is not None
        and people is before.people
        and addresses.same_regions(before.addresses)
    ):
        return before.spots
    known: dict[tuple[Profile, frozenset[int]], int] = {}
    of = [
        known.setdefault((facts.profile, addresses.blocks_at(address)), len(known))
        for address, facts in people.owners.items()
    ]
    return Spots(list(known), np.array(of, np.intp))


def _peers(people: People, classes: NDArray[np.int64], node: str, ids: Ids, before: Cache) -> Peers:
    """The peers that are pods; `classes` are those of the owners' addresses."""
    last = before.peers if people is before.people else None
    slots = [ids.slot(facts.pod.metadata.uid) for facts in people.local]
    names = last.hops if last is not None else {f.pod.spec.node_name for f in people.members}
    hops = {name: ids.hop(name) or 0 for name in names}
    if last is not None and last.slots == slots and last.hops == hops:
        different = np.flatnonzero(classes != last.records[:, 0])
        if not len(different):
            return last
        records = last.records.copy()
        records[:, 0] = classes
        views = dict(last.views)
        owners = list(people.owners)
        for position, record in zip(different.tolist(), records[different].tolist(), strict=True):
            views[owners[position]] = PeerView._make(record)
        return Peers(slots, hops, records, views)
    slot_of = {id(facts): slot for facts, slot in zip(people.local, slots, strict=True)}
    kinds, targets = [], []
    for facts in people.owners.values():
        where = facts.pod.spec.node_name
        if where == node:
            slot = slot_of[id(facts)]
            kinds.append(PEER_LOCAL)
            targets.append(NO_SLOT if slot is None else slot)
        else:
            kinds.append(PEER_REMOTE)
            targets.append(hops[where])
    records = np.empty((len(people.owners), 4), np.int64)
    records[:, 0], records[:, 1] = classes, people.endpoints
    records[:, 2], records[:, 3] = kinds, targets
    views = dict(zip(people.owners, map(PeerView._make, records.tolist()), strict=True))
    return Peers(slots, hops, records, views)


def _nodes(
    cluster: Cluster,
    node: str,
    ids: Ids,
    addresses: Addresses,
    pods: Mapping[bytes, PeerView],
    errors: list[str],
) -> dict[bytes, PeerView]:
    """The peers that are nodes. An address that a pod has as well is the node's."""
    found: dict[bytes, PeerView] = {}
    for name, object_ in sorted(cluster.nodes.items()):
        for entry in object_.status.addresses:
            if entry.type != "InternalIP":
                continue
            try:
                address = pack(entry.address)
            except ValueError as error:
                errors.append(f"Node {name}: status.addresses: {error}")
                continue
            if address in pods or address in found:
                errors.append(f"Node {name}: status.addresses: {entry.address} is in use")
                if address in found:
                    continue
            cls = addresses.classify(address, addresses.outside)
            if name == node:
                found[address] = PeerView(cls, 0, PEER_HOST, 0)
            else:
                found[address] = PeerView(cls, 0, PEER_NODE, ids.hop(name) or 0)
    return found


# ---- Policies ------------------------------------------------------------------------


def _read_policies(cluster: Cluster, before: Cache, cache: Cache) -> list[Parsed]:
    """All policies as values, by (namespace, name)."""
    parsed: list[Parsed] = []
    for _, policy in sorted(cluster.policies.items()):
        key = id(policy)
        known = before.policies.get(key)
        if known is None or known.policy is not policy:
            known = parse(policy)
        cache.policies[key] = known
        parsed.append(known)
    return parsed


def _in_force(
    policies: list[Parsed], local: list[Profile], subjects: Subjects
) -> tuple[list[Parsed], dict[int, tuple[int, ...]]]:
    """The policies that select a pod of this node, and by subject the positions of its own."""
    here = 0
    of_subject: dict[int, list[int]] = {}
    for number, _ in local:
        here |= 1 << number
        of_subject[number] = []
    force: list[Parsed] = []
    for policy in policies:
        selected = subjects.match(policy.subject) & here
        if selected:
            position = len(force)
            force.append(policy)
            while selected:
                low = selected & -selected
                of_subject[low.bit_length() - 1].append(position)
                selected ^= low
    return force, {subject: tuple(own) for subject, own in of_subject.items()}


# ---- All of it -----------------------------------------------------------------------


def compile_node(cluster: Cluster, node: str, ids: Ids, previous: Tables | None = None) -> Tables:
    """The tables of `node`. Pure but for `ids`; equal input gives an equal image.

    `previous` is an earlier result for the same node and `ids`; it only saves time. Tables that
    did not change are the same objects as in there.
    Objects that can't be read are reported in `errors` and match nothing.
    OverflowError: the policies don't fit the image.
    """
    before = previous.cache if previous is not None else None
    if not isinstance(before, Cache) or before.ids is not ids:
        before, previous = Cache(ids), None
    cache = Cache(ids, subjects=before.subjects)
    if len(cache.subjects) > 2 * len(cluster.pods) + 1000:
        # Most labels it knows are gone: begin anew.
        before, previous = Cache(ids), None
        cache = Cache(ids)

    # Who is there, and which policies are in force here.
    people = cache.people = _read_people(cluster, node, before, cache)
    policies = _read_policies(cluster, before, cache)
    subjects = cache.subjects
    subjects.set_namespaces(cluster.namespaces)
    force, of_subject = _in_force(policies, people.local_profiles, subjects)
    errors = people.errors + [error for policy in policies for error in policy.errors]
    errors += people.claims

    # What the rules tell apart.
    selectors: dict[PodSelector, None] = {}
    blocks: dict[Block, None] = {}
    egress_names: set[PortName] = set()
    ranges: set[PortRange] = set()
    for policy in force:
        for rule in policy.ingress + policy.egress:
            for peer in rule.peers or ():
                if isinstance(peer, Block):
                    blocks[peer] = None
                else:
                    selectors[peer] = None
            if rule.ranges:
                ranges.update(rule.ranges)
        for rule in policy.egress:
            egress_names.update(rule.names)
    names = sorted(egress_names)
    if names:
        for _, named in people.profiles:
            ranges.update((name[1], n, n) for name, n in named if name in egress_names)

    # Policy sets of the local pods.
    sets: dict[SetKey, PolicySet] = {}
    set_of: dict[Profile, SetKey] = {}
    for profile in people.local_profiles:
        own = tuple(force[n] for n in of_subject[profile[0]])
        own_ports = dict(profile[1])
        numbers = {name: own_ports.get(name) for policy in own for name in policy.ingress_names}
        key = (tuple(id(p.policy) for p in own), tuple(numbers.values()))
        set_of[profile] = key
        if key not in sets:
            sets[key] = PolicySet(own, numbers)
            ranges.update((t, n, n) for (_, t), n in numbers.items() if n is not None)

    # Addresses → classes.
    addresses = Addresses(list(selectors), names, list(blocks), subjects, before.addresses)
    cache.addresses = addresses
    kinds = {profile: addresses.kind(profile[0], dict(profile[1])) for profile in people.profiles}
    spots = cache.spots = _spots(people, addresses, before)
    of_spot = [addresses.class_of(kinds[profile], members) for profile, members in spots.spots]
    classes = np.array(of_spot, np.int64)[spots.of]
    pods = cache.peers = _peers(people, classes, node, ids, before)
    of_nodes = cache.nodes = _nodes(cluster, node, ids, addresses, pods.views, errors)
    if previous is not None and pods is before.peers and of_nodes == before.nodes:
        peers = previous.peers
    else:
        peers = {**pods.views, **of_nodes}
        if previous is not None and people is not before.people and peers == previous.peers:
            peers = previous.peers
    addresses.close()

    # The image.
    ports = before.ports
    if ports is None or ports.ranges != tuple(sorted(ranges)):
        ports = Ports(ranges)
    cache.ports = ports
    frame = addresses.frame(), ports.ranges
    known = before.sets if frame == before.frame else {}
    cache.frame = frame
    tables = Tables(np.zeros(0, np.uint64), peers=peers, errors=errors, cache=cache)
    builder = Builder(ports.table + addresses.trie)
    cache.services = compile_services(cluster, ids, people, peers, builder, before.services)
    errors += cache.services.errors
    tables.services, tables.backends = cache.services.views, cache.services.backends
    both = Frame(addresses, ports)
    written: dict[SetKey, tuple[int, int, int]] = {}
    for key, policy_set in sets.items():
        compiled = known.get(key)
        if compiled is None:
            compiled = compile_set(policy_set, both, ids)
        cache.sets[key] = compiled
        written[key] = (*write_set(builder, compiled[:2]), compiled[2])
    of_profile = [written[set_of[profile]] for profile in people.local_profiles]
    for slot, number in zip(pods.slots, people.local_profile, strict=True):
        if slot is not None:
            tables.endpoints[slot] = EndpointView(*of_profile[number])
    tables.image = builder.image()
    return tables
