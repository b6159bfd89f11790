"""What the compilers produce: the verdict image and the views of one node.

The constants mirror bpf/types.h; a test of the agent compares them with the
BTF of the programs. Addresses are 16 bytes in network order (IPv4 is
::ffff:a.b.c.d), ports are plain integers, protocols are IP protocol numbers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from lockgate.objects.model import Pod

__all__ = [
    "EndpointView",
    "Host",
    "Ids",
    "PeerView",
    "Rule",
    "ServiceView",
    "Tables",
]

IMAGE_PORTS = 0
IMAGE_PORT_WORDS = 49152
IMAGE_CIDRS = IMAGE_PORT_WORDS
CIDR_NEXT = 0x8000_0000
CIDR_STRIDE = 0x7C00_0000
CIDR_STRIDE_SHIFT = 26
CIDR_WORD = 0x03FF_FFFF
CIDR_SKIP = 63
CIDR_LEVELS = 17
BACKEND_WORDS = 3

CELL_ALLOW = 0x8000_0000
CELL_LOG = 0x4000_0000
CELL_REASON = 0x3FFF_FFFF

PEER_NONE = 0
PEER_LOCAL = 1
PEER_REMOTE = 2
PEER_NODE = 3
PEER_HOST = 4

ISOLATED_INGRESS = 1
ISOLATED_EGRESS = 2

OWNERS = 4
#: A number has 16 bits at most, and all ones are nobody's.
MOST_OWNERS = 0xFFFF

SVC_PRESENT = 1
SVC_FRONTEND = 2
SVC_SNAT = 4
SVC_LOCAL = 8
SVC_RANGES = 16
SVC_OPEN = 32
SVC_HOST_ONLY = 64
SVC_INTERNAL_LOCAL = 128

OWNER_ENDS = 1

LIVE_INSIDE = 1
LIVE_LOCAL = 2
LIVE_OUTSIDE = 4
LIVE_KEEPS = 8

TO_NOWHERE = 0
TO_LOCAL = 1
TO_HOP = 2
TO_HOST = 3
#: Bits below the kind of a target.
TARGET_SHIFT = 28

NO_SLOT = 0xFFFF_FFFF
#: In the place of a slot: a pod that is reached by the node's stack.
ON_HOST = -1
NO_CLASS = 0xFFFF_FFFF

TCP, UDP, SCTP = 6, 17, 132
PROTOCOL_NUMBER = {"TCP": TCP, "UDP": UDP, "SCTP": SCTP}
#: Row of IMAGE_PORTS by the protocol's name and by its number.
PORT_TABLE = {"TCP": 0, "UDP": 1, "SCTP": 2}
PORT_TABLE_BY_NUMBER = {TCP: 0, UDP: 1, SCTP: 2}

Verdict = Literal["allow", "deny"]
Direction = Literal["ingress", "egress"]

#: (namespace, policy name, index of the rule). These indices name the policy itself, and one
#: whose rules can't be read.
Rule = tuple[str, str, int]
POLICY, UNREADABLE = -1, -2
Words = NDArray[np.uint64]


class PeerView(NamedTuple):
    """`struct peer_view`: what an address is to this node."""

    cls: int
    endpoint: int
    kind: int
    target: int


class EndpointView(NamedTuple):
    """`struct endpoint_view`, the first half: where a local pod's rows and columns start. What
    the pod's own addresses are follows from `Tables.peers`."""

    rows: int
    cols: int
    isolated: int


@dataclass(slots=True, frozen=True)
class Host:
    """What an agent knows of its own node besides its objects: addresses of its cards, and how
    clients outside reach other nodes' backends where a Service does not say."""

    addresses: frozenset[bytes] = frozenset()
    snat: bool = False


@dataclass(slots=True, frozen=True)
class ServiceView:
    """`struct service_view`: one port of a service at one address."""

    id: int
    backends: int
    count: int
    flags: int
    affinity: int = 0
    """Seconds that a client keeps its backend; 0: it keeps none."""
    table: int = 0
    owners: int = 0
    slot_bits: int = 0
    number_bits: int = 0
    owner_count: int = 0
    ranges: int = 0


class Ids(Protocol):
    """Numbers that outlive a compilation. The agent journals them; none is ever reused."""

    def endpoint(self, pod: Pod) -> int:
        """Id of the pod (by uid), never 0."""

    def reason(self, verdict: Verdict, direction: Direction, rules: tuple[Rule, ...]) -> int:
        """Id of an ordered list of rules (allow) or policies (deny), never 0."""

    def service(self, namespace: str, name: str, port_name: str, protocol: str, port: int) -> int:
        """Id of one port of a service, never 0."""

    def slot(self, uid: str) -> int | None:
        """Endpoint slot of a pod of this node; None while it has no interface, ON_HOST for one
        that another CNI plugin wired."""

    def hop(self, node: str) -> int | None:
        """Hop towards another node; None while none is known."""


#: Address, port, protocol; port and protocol 0 stand for the address itself.
ServiceKey = tuple[bytes, int, int]
#: Address, service id, port, protocol.
BackendKey = tuple[bytes, int, int, int]


@dataclass(slots=True)
class Delta:
    """What differs from the tables with the serial `base`: keys, and what they had there (None:
    nothing); ranges of the image's words (first, behind the last), None for all."""

    base: int
    peers: dict[bytes, PeerView | None] = field(default_factory=dict)
    services: dict[ServiceKey, ServiceView | None] = field(default_factory=dict)
    backends: dict[BackendKey, int | None] = field(default_factory=dict)
    words: list[tuple[int, int]] | None = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(
            self.peers or self.services or self.backends or self.words is None or self.words
        )


@dataclass(slots=True, eq=False)
class Tables:
    """Everything one view holds. `delta`, if there is one, tells it from the tables before, whose
    containers these are, patched: of the tables of a node only the newest are whole. `cache` is
    what the next compilation goes on from."""

    image: Words
    peers: Mapping[bytes, PeerView] = field(default_factory=dict)
    endpoints: dict[int, EndpointView] = field(default_factory=dict)
    services: dict[ServiceKey, ServiceView] = field(default_factory=dict)
    #: LIVE_ bits of each.
    backends: dict[BackendKey, int] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    delta: Delta | None = None
    serial: int = field(default_factory=itertools.count(1).__next__)
    cache: Any = field(default=None, repr=False)
    #: Do processes of the node serve clients outside? See bpf/to_net.h.
    host_backends: bool = False


class Builder:
    """The image while it grows; equal runs of words are stored once."""

    def __init__(self, head: bytes) -> None:
        self._chunks = [head]
        self._words = len(head) // 8
        self._known: dict[bytes, int] = {}

    @property
    def words(self) -> int:
        """How long it is already."""
        return self._words

    def add(self, words: bytes) -> int:
        """The word at which `words` (a multiple of 8 bytes) stands in the image."""
        at = self._known.get(words)
        if at is None:
            at = self._known[words] = self._words
            self._chunks.append(words)
            self._words += len(words) // 8
        return at

    def image(self) -> Words:
        if self._words >= 1 << 32:
            raise OverflowError(f"the verdict image needs {self._words} words, the limit is 2^32")
        return np.frombuffer(bytearray().join(self._chunks), dtype="<u8").view(np.uint64)
