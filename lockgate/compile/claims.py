"""Who has which entry: of two that claim the same the first, services before pods, then by name."""

from __future__ import annotations

from collections.abc import Collection, Iterable

from lockgate.compile.frontends import Ask
from lockgate.compile.tables import PROTOCOL_NUMBER, ServiceKey
from lockgate.objects.address import format_address

__all__ = ["POD", "SERVICE", "Claims", "Holder", "conflict", "title"]

SERVICE, POD = 0, 1
#: Kind, namespace and name, in the order in which they have what two of them claim.
Holder = tuple[int, str, str]
_TITLES = {SERVICE: "Service", POD: "Pod"}
_FIELDS = {
    "cluster": "spec.clusterIPs",
    "balancer": "status.loadBalancer.ingress",
    "external": "spec.externalIPs",
}
_PROTOCOLS = {number: name for name, number in PROTOCOL_NUMBER.items()}


class Claims:
    """Claims are keys of entries; that of a cluster IP is of the address without a port, and
    comes before all others' there."""

    def __init__(self) -> None:
        self._claims: dict[ServiceKey, tuple[Holder, ...]] = {}
        #: Who claims anything at an address.
        self._at: dict[bytes, set[Holder]] = {}

    def is_cluster_ip(self, address: bytes) -> bool:
        return (address, 0, 0) in self._claims

    def holder(self, key: ServiceKey) -> Holder:
        """Who has an entry that is claimed."""
        whole = self._claims.get((key[0], 0, 0))
        return min(whole if whole is not None else self._claims[key])

    def change(
        self, holder: Holder, before: Collection[ServiceKey], after: Collection[ServiceKey]
    ) -> set[Holder]:
        """What one claims is another: the others that may have got or lost something by it."""
        concerned: set[Holder] = set()
        alone = (holder,)
        for claim in set(before).difference(after):
            left = tuple(one for one in self._claims[claim] if one != holder)
            if left:
                self._claims[claim] = left
            else:
                del self._claims[claim]
            concerned.update(self._rivals(claim))
        for claim in set(after).difference(before):
            known = self._claims.get(claim)
            self._claims[claim] = alone if known is None else (*known, holder)
            concerned.update(self._rivals(claim))
        at = {claim[0] for claim in after}
        for address in {claim[0] for claim in before} - at:
            self._at[address].discard(holder)
            if not self._at[address]:
                del self._at[address]
        for address in at:
            self._at.setdefault(address, set()).add(holder)
        concerned.discard(holder)
        return concerned

    def _rivals(self, claim: ServiceKey) -> Iterable[Holder]:
        if claim[1:] == (0, 0):
            return self._at.get(claim[0], ())
        return self._claims.get(claim, ())


def title(holder: Holder) -> str:
    return f"{_TITLES[holder[0]]} {'/'.join(holder[1:])}"


def conflict(loser: Holder, ask: Ask, holder: Holder) -> str:
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
    return f"{title(loser)}: {field}: {what} is taken by {title(holder)}"
