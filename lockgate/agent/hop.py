"""One way out of the node, as a value."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from lockgate.objects.address import is_ipv4, parse_address

__all__ = ["DROP", "NONE", "Hop", "masquerading"]

#: `hop_flag`
DROP = 4
#: No address.
NONE = bytes(16)


@dataclass(frozen=True, slots=True)
class Hop:
    """`struct hop_view`, addresses as 16 bytes."""

    ifindex: int = 0
    flags: int = DROP
    dmac: bytes = bytes(6)
    smac: bytes = bytes(6)
    mtu: int = 0
    via4: bytes = NONE
    via6: bytes = NONE
    masq4: bytes = NONE
    masq6: bytes = NONE
    remote: bytes = NONE
    local: bytes = NONE


def masquerading(hop: Hop, addresses: Iterable[str]) -> Hop:
    """The hop, behind the first address of each family (with prefix length)."""
    masq = {4: NONE, 6: NONE}
    for text in addresses:
        address = parse_address(text.partition("/")[0])
        family = 4 if is_ipv4(address) else 6
        if masq[family] == NONE:
            masq[family] = address
    return replace(hop, masq4=masq[4], masq6=masq[6])
