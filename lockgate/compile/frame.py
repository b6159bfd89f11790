"""The policies in force on a node, what their rules tell apart, and the image's front."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

from lockgate.compile.cidr import Block
from lockgate.compile.labels import PodSelector
from lockgate.compile.pods import Pods, Profile
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
from lockgate.compile.tables import Builder, EndpointView, Ids, Words
from lockgate.objects.changes import Name
from lockgate.objects.model import Namespace, NetworkPolicy

__all__ = ["Judgements"]

#: Numbers of the policies of a set, and the numbers that its port names have.
SetKey = tuple[tuple[int, ...], tuple[int | None, ...]]
Compiled = tuple[Half, Half, int]


class Judgements:
    """What the policies come to for the pods of a node. `read` and `front` patch it."""

    addresses: Addresses

    def __init__(self, pods: Pods, ids: Ids) -> None:
        self._pods, self._ids = pods, ids
        # A policy's number is another when the policy is.
        self._numbers = itertools.count(1)
        self._policies: dict[Name, tuple[int, Parsed]] = {}
        self._local: frozenset[Profile] | None = None
        self._ports: Ports | None = None
        self._egress_names: set[PortName] = set()
        self._ranges: set[PortRange] = set()
        self._classes_at_first = 0
        self._sets: dict[SetKey, PolicySet] = {}
        self._set_of: dict[Profile, SetKey] = {}
        self._compiled: dict[SetKey, Compiled] = {}
        self._stale = True
        #: By profile of the pods of this node.
        self.views: dict[Profile, EndpointView] = {}
        self.errors: list[str] = []
        #: Did `read` find other CIDR blocks?
        self.regions_moved = False

    def objects(self) -> dict[Name, NetworkPolicy]:
        """The policies as they were read."""
        return {key: parsed.policy for key, (_, parsed) in self._policies.items()}

    def read(
        self,
        namespaces: Mapping[str, Namespace],
        policies: Mapping[Name, NetworkPolicy | None],
        namespaces_changed: bool,
    ) -> bool:
        """Take over `policies` that changed (None: that went) and what the pods are now. True if
        rules may tell other things apart than before."""
        for key, policy in policies.items():
            if policy is None:
                self._policies.pop(key, None)
            else:
                self._policies[key] = next(self._numbers), parse(policy)
        fresh, self._pods.fresh = self._pods.fresh, set()
        local = self._pods.local_profiles.keys()
        if (
            not policies
            and not namespaces_changed
            and self._local == local
            and self._ranges_of(fresh) <= self._ranges
        ):
            return False
        self._local = frozenset(local)
        self._pods.subjects.set_namespaces(namespaces)
        self._judge()
        self._stale = True
        return True

    def front(self) -> Words | None:
        """The image's words up to the services; None if they are those of the last time.
        All addresses must have been classified."""
        assert self._ports is not None
        self._classes_at_first = self._classes_at_first or self.addresses.count
        if self.addresses.close():
            self._compiled, self._stale = {}, True
        if not self._stale:
            return None
        builder = Builder(self._ports.table + self.addresses.trie)
        both = Frame(self.addresses, self._ports)
        known, self._compiled = self._compiled, {}
        written: dict[SetKey, EndpointView] = {}
        for key, policy_set in self._sets.items():
            compiled = known.get(key)
            if compiled is None:
                compiled = compile_set(policy_set, both, self._ids)
            self._compiled[key] = compiled
            written[key] = EndpointView(*write_set(builder, compiled[:2]), compiled[2])
        self.views = {profile: written[key] for profile, key in self._set_of.items()}
        self._stale = False
        return builder.image()

    # ---- Inside ----------------------------------------------------------------------

    def _ranges_of(self, profiles: set[Profile]) -> set[PortRange]:
        """The numbers that names of egress ports have on these pods."""
        names = self._egress_names
        return {(name[1], n, n) for _, named in profiles for name, n in named if name in names}

    def _judge(self) -> None:
        policies = [one for _, one in sorted(self._policies.items())]
        self.errors = [error for _, policy in policies for error in policy.errors]
        force, of_subject = self._in_force(policies)
        selectors: dict[PodSelector, None] = {}
        blocks: dict[Block, None] = {}
        ranges: set[PortRange] = set()
        self._egress_names = set()
        for _, policy in force:
            for rule in policy.ingress + policy.egress:
                for peer in rule.peers or ():
                    if isinstance(peer, Block):
                        blocks[peer] = None
                    else:
                        selectors[peer] = None
                if rule.ranges:
                    ranges.update(rule.ranges)
            for rule in policy.egress:
                self._egress_names.update(rule.names)
        if self._egress_names:
            ranges |= self._ranges_of(set(self._pods.profiles))

        # Policy sets of the local pods.
        self._sets, self._set_of = {}, {}
        for profile in self._pods.local_profiles:
            own = [force[n] for n in of_subject[profile[0]]]
            own_ports = dict(profile[1])
            numbers = {
                name: own_ports.get(name) for _, policy in own for name in policy.ingress_names
            }
            key = tuple(number for number, _ in own), tuple(numbers.values())
            self._set_of[profile] = key
            if key not in self._sets:
                self._sets[key] = PolicySet(tuple(policy for _, policy in own), numbers)
                ranges.update((t, n, n) for (_, t), n in numbers.items() if n is not None)

        self._tell_apart(list(selectors), sorted(self._egress_names), list(blocks))
        # Kinds that no pod is of any more have their classes, and so their ports, too.
        ranges |= self.addresses.named_ports()
        self._ranges = ranges
        if self._ports is None or self._ports.ranges != tuple(sorted(ranges)):
            self._ports = Ports(ranges)
            self._compiled = {}

    def _in_force(
        self, policies: list[tuple[int, Parsed]]
    ) -> tuple[list[tuple[int, Parsed]], dict[int, list[int]]]:
        """The policies that select a pod of this node, and by subject the positions of its own."""
        here = 0
        of_subject: dict[int, list[int]] = {}
        for number, _ in self._pods.local_profiles:
            here |= 1 << number
            of_subject[number] = []
        force: list[tuple[int, Parsed]] = []
        for numbered in policies:
            selected = self._pods.subjects.match(numbered[1].subject) & here
            if selected:
                position = len(force)
                force.append(numbered)
                while selected:
                    low = selected & -selected
                    of_subject[low.bit_length() - 1].append(position)
                    selected ^= low
        return force, of_subject

    def _tell_apart(
        self, selectors: list[PodSelector], names: list[PortName], blocks: list[Block]
    ) -> None:
        before = getattr(self, "addresses", None)
        wanted = selectors, names, blocks
        if (
            before is not None
            and wanted == (before.selectors, before.names, before.blocks)
            and before.count <= 2 * self._classes_at_first + 256
        ):
            # Classes keep their numbers, those that nobody has any more too.
            before.match()
            self.regions_moved = False
            return
        self.addresses = Addresses(selectors, names, blocks, self._pods.subjects, before)
        self.regions_moved = not self.addresses.same_regions(before)
        self._compiled = {}
        self._classes_at_first = 0
