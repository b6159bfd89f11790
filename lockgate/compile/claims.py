"""Who has which entry: of two that claim the same the first has it.

A load balancer's address comes first, as whoever may write services' status gave it, then what
services ask for, then pods' hostPorts; else it goes by name.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lockgate.compile.frontends import Ask
from lockgate.compile.tables import PROTOCOL_NUMBER, ServiceKey
from lockgate.objects.address import format_address

__all__ = ["POD", "SERVICE", "Claim", "Claims", "Holder", "claim", "conflict", "title"]

SERVICE, POD = 0, 1
#: Kind, namespace and name, in the order in which they have what two of them claim.
Holder = tuple[int, str, str]
#: The key of an entry, and how soon it is served.
Claim = tuple[ServiceKey, int]
_TITLES = {SERVICE: "Service", POD: "Pod"}
_FIELDS = {
    "cluster": "spec.clusterIPs",
    "balancer": "status.loadBalancer.ingress",
    "external": "spec.externalIPs",
}
_PROTOCOLS = {number: name for name, number in PROTOCOL_NUMBER.items()}


def claim(ask: Ask) -> Claim:
    """That of a cluster IP is of the address without a port, and comes before all others there."""
    if ask.kind == "cluster":
        return (ask.key[0], 0, 0), 0
    return ask.key, 0 if ask.kind == "balancer" else 1


class Claims:
    """All claims. Of one key a holder has one."""

    def __init__(self) -> None:
        self._claims: dict[ServiceKey, tuple[tuple[int, Holder], ...]] = {}
        self._at: dict[bytes, set[Holder]] = {}

    def is_cluster_ip(self, address: bytes) -> bool:
        return (address, 0, 0) in self._claims

    def holder(self, key: ServiceKey) -> Holder:
        """Who has an entry that is claimed."""
        whole = self._claims.get((key[0], 0, 0))
        return min(whole if whole is not None else self._claims[key])[1]

    def at(self, address: bytes) -> Iterable[Holder]:
        """Who claims anything at an address."""
        return self._at.get(address, ())

    def change(
        self, holder: Holder, before: Collection[Claim], after: Collection[Claim]
    ) -> set[Holder]:
        """What one claims is another: the others that may have got or lost something by it."""
        concerned: set[Holder] = set()
        # Most have no rival: one tuple for all of theirs.
        alone = tuple(((rank, holder),) for rank in (0, 1))
        for key, _ in set(before).difference(after):
            left = tuple(one for one in self._claims[key] if one[1] != holder)
            if left:
                self._claims[key] = left
            else:
                del self._claims[key]
            concerned.update(self._rivals(key))
        for key, rank in set(after).difference(before):
            known = self._claims.get(key)
            self._claims[key] = alone[rank] if known is None else (*known, *alone[rank])
            concerned.update(self._rivals(key))
        at = {key[0] for key, _ in after}
        for address in {key[0] for key, _ in before} - at:
            self._at[address].discard(holder)
            if not self._at[address]:
                del self._at[address]
        for address in at:
            self._at.setdefault(address, set()).add(holder)
        concerned.discard(holder)
        return concerned

    def _rivals(self, key: ServiceKey) -> Iterable[Holder]:
        if key[1:] == (0, 0):
            return self.at(key[0])
        return [one for _, one in self._claims.get(key, ())]


def title(holder: Holder) -> str:
    return f"{_TITLES[holder[0]]} {'/'.join(holder[1:])}"


def conflict(loser: Holder, ask: Ask, owner: str) -> str:
    """What is to be told of an entry that another has."""
    address, number, protocol = ask.key
    port = f"port {number}/{_PROTOCOLS[protocol]}"
    if ask.kind == "cluster":
        what = format_address(address)
    elif ask.kind in _FIELDS:
        what = f"{format_address(address)}, {port},"
    else:
        what = f"{port} of this node"
    field = _FIELDS.get(ask.kind) or (
        "spec.containers.ports.hostPort" if loser[0] == POD else "spec.ports.nodePort"
    )
    return f"{title(loser)}: {field}: {what} is taken by {owner}"
