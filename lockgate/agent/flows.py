"""What a node remembers of clients outside (bpf/flow.h), and whom it sends their packets as."""

from __future__ import annotations

from ipaddress import ip_network
from typing import Annotated, Any

import msgspec

__all__ = ["Flows"]

#: Flows of a set: FLOW_WAYS of bpf/types.h.
_WAYS = 2


class Flows(msgspec.Struct, rename="camel", forbid_unknown_fields=True, frozen=True, kw_only=True):
    """Settings of balancing; the same on each node."""

    #: Whether it remembers which backend a flow has. TCP does without.
    remember: bool = True
    #: Flows that it learns a second, a quarter of that at once after a pause, but not more than a
    #: quarter of those that the table has room for: what is in use is seen again before a flood
    #: has filled it. 0 = no limit.
    learn: Annotated[int, msgspec.Meta(ge=0, le=1_000_000_000)] = 50_000
    #: Blocks of nobody's addresses, from which encapsulated packets come: a /16 and a /96, whose
    #: low bits are the flow's hash.
    outer4: str = "198.18.0.0/16"
    outer6: str = "100::/96"

    def constants(self, sets: int) -> dict[str, Any]:
        """Values for bpf/config.h, by name; `sets`: elements of the map. ValueError names the
        field."""
        learn = min(self.learn, max(sets * _WAYS // 4, 1))
        return {
            "config_flows": int(self.remember),
            "config_flow_ns": 1_000_000_000 // learn if learn else 0,
            "config_outer4": list(_block("outer4", self.outer4, 4, 16)),
            "config_outer6": list(_block("outer6", self.outer6, 6, 96)),
        }


def _block(field: str, text: str, version: int, length: int) -> bytes:
    try:
        block = ip_network(text)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from error
    if (block.version, block.prefixlen) != (version, length):
        raise ValueError(f"{field}: expected a block of IPv{version} with /{length}, got {text}")
    return block.network_address.packed
