"""Everything that holds on one node: peers, policies, services, the image."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

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
from lockgate.compile.services import compile_services
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


@dataclass(slots=True)
class PodFacts:
    """What the compiler asks of a pod, read once per object."""

    pod: Pod
    subject: int
    addresses: tuple[bytes, ...]
    ports: dict[PortName, int]
    member: bool
    errors: tuple[str, ...]


SetKey = tuple[tuple[int, ...], tuple[int | None, ...]]
Compiled = tuple[Half, Half, int]


@dataclass(slots=True)
class Cache:
    """What the next compilation may reuse. Objects are immutable, so an object that is
    still the same means the same; every entry keeps its object alive, so ids stay its own."""

    ids: Ids
    subjects: Subjects = field(default_factory=Subjects)
    pods: dict[int, PodFacts] = field(default_factory=dict)
    policies: dict[int, Parsed] = field(default_factory=dict)
    frame: object = None
    ports: Ports | None = None
    addresses: Addresses | None = None
    sets: dict[SetKey, Compiled] = field(default_factory=dict)


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
        subject=subjects.number(namespace, pod.metadata.labels),
        addresses=tuple(dict.fromkeys(addresses)),
        ports=ports,
        member=not pod.finished and not pod.spec.host_network,
        errors=tuple(errors),
    )


def _read_pods(cluster: Cluster, before: Cache, cache: Cache) -> list[PodFacts]:
    """Facts of the pods that count: not finished, not on the host's network."""
    old, new, subjects = before.pods, cache.pods, cache.subjects
    members: list[PodFacts] = []
    for pod in cluster.pods.values():
        key = id(pod)
        facts = old.get(key)
        if facts is None or facts.pod is not pod:
            facts = _read_pod(pod, subjects)
        new[key] = facts
        if facts.member:
            members.append(facts)
    return members


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
    policies: list[Parsed], local: list[PodFacts], subjects: Subjects
) -> tuple[list[Parsed], dict[int, tuple[int, ...]]]:
    """The policies that select a pod of this node, and by subject the positions of its own."""
    here = 0
    for number in {facts.subject for facts in local}:
        here |= 1 << number
    force: list[Parsed] = []
    of_subject: dict[int, list[int]] = {facts.subject: [] for facts in local}
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


def compile_node(cluster: Cluster, node: str, ids: Ids, previous: Tables | None = None) -> Tables:
    """The tables of `node`. Pure but for `ids`; equal input gives an equal image.

    `previous` is an earlier result for the same node and `ids`; it only saves time.
    Objects that can't be read are reported in `errors` and match nothing.
    OverflowError: the policies don't fit the image.
    """
    before = previous.cache if previous is not None else None
    if not isinstance(before, Cache) or before.ids is not ids:
        before = Cache(ids)
    cache = Cache(ids, subjects=before.subjects)
    if len(cache.subjects) > 2 * len(cluster.pods) + 1000:
        # Most labels it knows are gone: begin anew.
        before = Cache(ids)
        cache = Cache(ids)
    errors: list[str] = []

    # Who is there, and which policies are in force here.
    members = _read_pods(cluster, before, cache)
    policies = _read_policies(cluster, before, cache)
    subjects = cache.subjects
    subjects.set_namespaces(cluster.namespaces)
    local = [facts for facts in members if facts.pod.spec.node_name == node]
    force, of_subject = _in_force(policies, local, subjects)
    for facts in members:
        errors.extend(facts.errors)
    for policy in policies:
        errors.extend(policy.errors)

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
    for facts in members if names else ():
        for name in names:
            number = facts.ports.get(name)
            if number is not None:
                ranges.add((name[1], number, number))

    # Policy sets of the local pods.
    sets: dict[SetKey, PolicySet] = {}
    set_of: list[SetKey] = []
    for facts in local:
        positions = of_subject[facts.subject]
        own = tuple(force[n] for n in positions)
        own_names = [n for policy in own for n in policy.ingress_names]
        numbers = {name: facts.ports.get(name) for name in own_names}
        key = (tuple(id(p.policy) for p in own), tuple(numbers.values()))
        set_of.append(key)
        if key not in sets:
            sets[key] = PolicySet(own, numbers)
            ranges.update((t, n, n) for (_, t), n in numbers.items() if n is not None)

    # Addresses → classes.
    addresses = Addresses(list(selectors), names, list(blocks), subjects, before.addresses)
    cache.addresses = addresses
    owners = _claims(members, errors)
    kinds = {id(facts): addresses.kind(facts.subject, facts.ports) for facts in members}
    peers: dict[bytes, PeerView] = {}
    for address, facts in owners.items():
        pod = facts.pod
        if pod.spec.node_name == node:
            slot = ids.slot(pod.metadata.uid)
            kind, target = PEER_LOCAL, NO_SLOT if slot is None else slot
        else:
            kind, target = PEER_REMOTE, ids.hop(pod.spec.node_name) or 0
        cls = addresses.classify(address, kinds[id(facts)])
        peers[address] = PeerView(cls, ids.endpoint(pod), kind, target)
    for name_of_node, object_ in sorted(cluster.nodes.items()):
        for entry in object_.status.addresses:
            if entry.type != "InternalIP":
                continue
            try:
                address = pack(entry.address)
            except ValueError as error:
                errors.append(f"Node {name_of_node}: status.addresses: {error}")
                continue
            if address in peers:
                errors.append(f"Node {name_of_node}: status.addresses: {entry.address} is in use")
                if peers[address].kind in (PEER_HOST, PEER_NODE):
                    continue
            cls = addresses.classify(address, addresses.outside)
            if name_of_node == node:
                peers[address] = PeerView(cls, 0, PEER_HOST, 0)
            else:
                peers[address] = PeerView(cls, 0, PEER_NODE, ids.hop(name_of_node) or 0)
    own_classes = [
        peers[facts.addresses[0]].cls
        if facts.addresses and owners[facts.addresses[0]] is facts
        else addresses.classify(b"\0" * 16, kinds[id(facts)])
        for facts in local
    ]
    addresses.close()

    # The image.
    ports = before.ports
    if ports is None or ports.ranges != tuple(sorted(ranges)):
        ports = Ports(ranges)
    cache.ports = ports
    frame = addresses.frame(), ports.ranges
    known = before.sets if frame == before.frame else {}
    cache.frame = frame
    builder = Builder(ports.table + addresses.trie)
    both = Frame(addresses, ports)
    written: dict[SetKey, tuple[int, int, int]] = {}
    for key, policy_set in sets.items():
        compiled = known.get(key)
        if compiled is None:
            compiled = compile_set(policy_set, both, ids)
        cache.sets[key] = compiled
        written[key] = (*write_set(builder, compiled[:2]), compiled[2])
    endpoints: dict[int, EndpointView] = {}
    for facts, key, cls in zip(local, set_of, own_classes, strict=True):
        slot = ids.slot(facts.pod.metadata.uid)
        if slot is not None:
            rows, columns, isolated = written[key]
            endpoints[slot] = EndpointView(rows, columns, cls, isolated)

    tables = Tables(
        np.zeros(0, np.uint64), peers=peers, endpoints=endpoints, errors=errors, cache=cache
    )
    compile_services(cluster, ids, peers, builder, tables)
    tables.image = builder.image()
    return tables
