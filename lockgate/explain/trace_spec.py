"""The specification's answer to where a packet may go: all backends that are permitted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lockgate.explain.names import Names
from lockgate.explain.trace import Asked, entry, join
from lockgate.objects.address import format_address, parse_address
from lockgate.objects.model import Cluster
from lockgate.spec.answer import Packet
from lockgate.spec.policy import judge
from lockgate.spec.services import Backend, Choice, Client, Frontend, choose

__all__ = ["SpecTrace", "by_the_specification"]


@dataclass(frozen=True, slots=True)
class SpecTrace:
    """Who may serve the client at `node`, and whether policies allow each."""

    asked: Asked
    node: str
    choice: Choice
    allowed: dict[Backend, bool]

    @property
    def reaches(self) -> bool:
        """Whichever is chosen: those that end take no new connection."""
        taking = [ok for backend, ok in self.allowed.items() if not backend.ends]
        return bool(taking) and all(taking)

    def json(self) -> dict[str, Any]:
        return {
            "node": self.node,
            "verdict": self.choice.verdict,
            "cause": self.choice.cause or None,
            "backends": [
                {
                    "address": backend.address,
                    "port": backend.port,
                    "ends": backend.ends,
                    "verdict": "allow" if ok else "deny",
                }
                for backend, ok in self.allowed.items()
            ],
        }

    def text(self) -> str:
        lines = [f"{self.asked.text}, at {self.node}, by the specification", ""]
        if self.choice.verdict == "none":
            return "\n".join([*lines, "no frontend of a service for this client"])
        if self.choice.verdict != "serve":
            return "\n".join([*lines, f"{self.choice.verdict}: {self.choice.cause}"])
        for backend, ok in self.allowed.items():
            ends = ", only what it has already: it ends" if backend.ends else ""
            verdict = "allow" if ok else "deny "
            lines.append(f"  {verdict}  {join(backend.address, backend.port)}{ends}")
        return "\n".join(lines)


def by_the_specification(cluster: Cluster, one: Asked, via: str = "") -> SpecTrace:
    """For a client outside at the node `via`, else where its packets come in; for one inside at its
    own node."""
    names = Names(cluster)
    client = one.client
    if client.pod is not None:
        node, place = client.pod.spec.node_name, "pod"
    else:
        node = via or entry(names, one)
        place = "node" if client.node == node else "outside"
    address = format_address(one.frontend)
    choice = choose(
        cluster,
        node,
        Client(place, client.ip),  # type: ignore[arg-type]
        Frontend(address, one.port, one.protocol),
    )
    allowed = {
        backend: judge(
            cluster,
            Packet(
                client.ip,
                backend.address,
                one.protocol,
                backend.port,
                from_own_node=client.node is not None and client.node == _node_of(names, backend),
            ),
        ).verdict
        == "allow"
        for backend in sorted(choice.backends, key=lambda one: (one.address, one.port))
    }
    return SpecTrace(one, node, choice, allowed)


def _node_of(names: Names, backend: Backend) -> str | None:
    end = names.end_at(parse_address(backend.address))
    return end.pod.spec.node_name if end.pod else end.node
