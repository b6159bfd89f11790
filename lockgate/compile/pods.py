"""The pods of a compilation, patched by key: who has which address, and what tells pods apart."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from lockgate.compile.cidr import pack
from lockgate.compile.labels import Subjects
from lockgate.compile.policy import PortName
from lockgate.compile.tables import PORT_TABLE
from lockgate.objects.changes import Name
from lockgate.objects.model import MOST_WEIGHT, WEIGHT, Pod, read_weight

__all__ = ["PodFacts", "Pods", "Profile"]

#: What policies can tell pods apart by: labels (as a subject) and named ports.
Profile = tuple[int, tuple[tuple[PortName, int], ...]]


@dataclass(slots=True)
class PodFacts:
    """What the compiler asks of a pod, read once per object. One that is finished or on the
    host's network is no member: it has no addresses and no profile that counts."""

    pod: Pod
    profile: Profile
    addresses: tuple[bytes, ...]
    member: bool
    weight: int = MOST_WEIGHT


class Pods:
    """All pods. `touched` are the addresses whose owner, or what there is to say of it, may be
    another since it was emptied; `fresh` the profiles that were not there before."""

    def __init__(self, node: str) -> None:
        self._node = node
        self.subjects = Subjects()
        self.facts: dict[Name, PodFacts] = {}
        self.owners: dict[bytes, PodFacts] = {}
        #: Members on this node.
        self.local: dict[Name, PodFacts] = {}
        #: How many members have a profile, and how many of those on this node.
        self.profiles: Counter[Profile] = Counter()
        self.local_profiles: Counter[Profile] = Counter()
        self.touched: dict[bytes, None] = {}
        self.fresh: set[Profile] = set()
        #: Equal profiles, kept once.
        self._known: dict[Profile, Profile] = {}
        #: Of addresses that several pods have: those pods.
        self._claims: dict[bytes, list[PodFacts]] = {}
        self._unreadable: dict[Name, list[str]] = {}

    def change(self, key: Name, pod: Pod | None) -> None:
        """A pod is another, or went (None)."""
        old = self.facts.get(key)
        if old is not None:
            self._leave(key, old)
        if pod is None:
            self.facts.pop(key, None)
            return
        new = self.facts[key] = self._read(key, pod)
        if not new.member:
            return
        self.touched.update(dict.fromkeys(new.addresses))
        for address in new.addresses:
            self._claim(address, new)
        if not self.profiles[new.profile]:
            self.fresh.add(new.profile)
        self.profiles[new.profile] += 1
        if pod.spec.node_name == self._node:
            self.local[key] = new
            self.local_profiles[new.profile] += 1

    def errors(self) -> list[str]:
        """What is wrong with pods, each named."""
        found = [text for _, texts in sorted(self._unreadable.items()) for text in texts]
        for _, claims in sorted(self._claims.items()):
            winner, *losers = sorted(claims, key=_precedence)
            found += [
                f"Pod {'/'.join(one.pod.key)}: status.podIPs: an address is"
                f" Pod {'/'.join(winner.pod.key)}'s as well, which keeps it"
                for one in losers
            ]
        return found

    # ---- Inside ----------------------------------------------------------------------

    def _leave(self, key: Name, old: PodFacts) -> None:
        self._unreadable.pop(key, None)
        if not old.member:
            return
        self.touched.update(dict.fromkeys(old.addresses))
        for address in old.addresses:
            self._unclaim(address, old)
        _less(self.profiles, old.profile)
        if not self.profiles[old.profile]:
            self._known.pop(old.profile, None)
        if self.local.pop(key, None) is not None:
            _less(self.local_profiles, old.profile)

    def _claim(self, address: bytes, facts: PodFacts) -> None:
        owner = self.owners.setdefault(address, facts)
        if owner is not facts:
            claims = self._claims.setdefault(address, [owner])
            claims.append(facts)
            self.owners[address] = min(claims, key=_precedence)

    def _unclaim(self, address: bytes, facts: PodFacts) -> None:
        claims = self._claims.get(address)
        if claims is None:
            del self.owners[address]
            return
        claims[:] = [one for one in claims if one is not facts]
        self.owners[address] = min(claims, key=_precedence)
        if len(claims) == 1:
            del self._claims[address]

    def _read(self, key: Name, pod: Pod) -> PodFacts:
        addresses: list[bytes] = []
        errors: list[str] = []
        member = not pod.finished and not pod.spec.host_network
        for ip in pod.ips if member else ():
            try:
                addresses.append(pack(ip))
            except ValueError as error:
                errors.append(f"Pod {'/'.join(key)}: status.podIPs: {error}")
        weight: int | None = MOST_WEIGHT
        text = pod.metadata.annotations.get(WEIGHT)
        if text is not None and (weight := read_weight(text)) is None:
            errors.append(
                f"Pod {'/'.join(key)}: metadata.annotations[{WEIGHT}]: expected per cent, from 1 to"
                f" {MOST_WEIGHT}, got {text!r}"
            )
        if errors:
            self._unreadable[key] = errors
        ports: dict[PortName, int] = {}
        for container in pod.spec.containers:
            for port in container.ports:
                if port.name and 0 < port.container_port <= 65535:
                    # The first of a name and protocol counts, as for kubelet's probes.
                    ports.setdefault((port.name, PORT_TABLE[port.protocol]), port.container_port)
        subject = self.subjects.number(key[0], pod.metadata.labels)
        profile = subject, tuple(sorted(ports.items()))
        return PodFacts(
            pod,
            self._known.setdefault(profile, profile),
            tuple(dict.fromkeys(addresses)) if len(addresses) > 1 else tuple(addresses),
            member,
            weight or MOST_WEIGHT,
        )


def _less(counter: Counter[Profile], profile: Profile) -> None:
    counter[profile] -= 1
    if not counter[profile]:
        del counter[profile]


def _precedence(facts: PodFacts) -> tuple[bool, Name]:
    """Two claims: the pod that is not going away, then the first by name, as the specification
    has it (a uid does not tell which pod is newer)."""
    return facts.pod.metadata.deletion_timestamp is not None, facts.pod.key
