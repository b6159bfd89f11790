"""How a user reaches a cluster: the objects in it, and the agent and observer of each node.

One small protocol, `Access`, with two implementations: the standalone cluster's sockets
(standalone.py) and a kubeconfig (kubernetes.py). Commands know only the protocol.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Protocol

import msgspec

from lockgate.objects.model import Cluster, Pod

__all__ = ["Access", "Place", "Refused", "Result", "Role", "Target", "Unreachable"]

Role = Literal["agent", "observer"]
ROLES: tuple[Role, ...] = ("agent", "observer")


class Refused(Exception):
    """The other side answered with an error; the message is its sentence."""


class Unreachable(OSError):
    """Nobody answered; the message is one sentence."""


class Target(msgspec.Struct, rename="camel", omit_defaults=True):
    """A connection to try: protocol "tcp" or "udp", a numeric address, a port, seconds of
    patience. `payload` (base64) is sent instead of an empty datagram; over UDP only."""

    protocol: str
    address: str
    port: int
    timeout: float = 1.0
    payload: str = ""


class Result(msgspec.Struct, rename="camel", omit_defaults=True):
    """ok · refused · timeout · unreachable · error; as `lockgate-pod probe` has them. `port`: of
    the source, for a timeout at least; 0 if it is not known."""

    result: str
    detail: str = ""
    port: int = 0


class Place(msgspec.Struct):
    """Where a connection is made: in a pod, or (None) by the node itself."""

    node: str
    pod: Pod | None = None


class Access(Protocol):
    """One cluster. Methods may be called from several threads, and raise Refused or OSError."""

    #: As people call it: "cluster default", "context admin@prod".
    title: str
    #: Whether pods are those of the standalone cluster, which answer with their names.
    standalone: bool

    def objects(self) -> Cluster:
        """All objects as they are now."""

    def nodes(self) -> list[str]:
        """Names of the nodes that have, or should have, an agent."""

    def call(
        self, node: str, role: Role, method: str, url: str, body: Any = None, timeout: float = 30
    ) -> Any:
        """One JSON request to a node's agent or observer."""

    def stream(
        self, node: str, role: Role, url: str, timeout: float | None = None
    ) -> Iterator[Any]:
        """The objects of an ndjson answer as they come; `timeout` is between two of them."""

    def status(self) -> dict[str, Any]:
        """What is known without asking the nodes: docs/operate.md, `status --json`."""

    def probe(self, place: Place, targets: Sequence[Target]) -> Iterator[tuple[int, Result]]:
        """Tries all targets at once; (index, result) as they come."""

    def logs(self, node: str, role: Role, lines: int) -> str:
        """The end of what a node's agent or observer wrote."""

    def resources(self) -> list[str]:
        """The kinds that the API has, as "plural.group"; none on a standalone cluster."""

    def count(self, resource: str) -> int:
        """How many objects of a kind of `resources` there are."""

    def close(self) -> None:
        """May be called again."""
