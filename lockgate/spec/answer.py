"""Questions to the specification and its answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["Answer", "Direction", "Judgement", "Packet", "Rule"]

Direction = Literal["ingress", "egress"]
Rule = tuple[str, str, Direction, int]  # namespace and name of the policy, index in its list


@dataclass(frozen=True)
class Packet:
    """First packet of a connection, as it leaves its source after service translation."""

    source: str
    destination: str
    protocol: str  # "TCP", "UDP", "SCTP", or one that has no ports: "ICMP", "ICMPv6", …
    port: int | None = None  # destination port
    from_own_node: bool = False  # sent by a socket of the node that the destination pod runs on


@dataclass(frozen=True)
class Judgement:
    """What the policies of one pod say in one direction."""

    isolated: bool
    allowed: bool
    rules: tuple[Rule, ...] = ()  # that match, sorted; none when not isolated
    policies: tuple[tuple[str, str], ...] = ()  # (namespace, name) of those that isolate, sorted
    unreadable: tuple[tuple[str, str], ...] = ()  # of these, those whose rules can't be read

    def named(self, denied: bool) -> list[dict[str, Any]]:
        """Allowed: the policies that allow, with their matching rules. Denied: those that
        isolate; of one whose rules can't be read it says that."""
        matched: dict[tuple[str, str], list[str]] = {}
        if denied:
            matched = {p: ["unreadable"] if p in self.unreadable else [] for p in self.policies}
        for namespace, name, direction, index in self.rules:
            matched.setdefault((namespace, name), []).append(f"{direction}[{index}]")
        return [{**_reference(*policy), "rules": rules} for policy, rules in matched.items()]


@dataclass(frozen=True)
class Answer:
    """The verdict, the direction that decided (None: no policy applies), and both judgements.

    A judgement is None when that end is no pod, or when the packet is exempt.
    """

    verdict: Literal["allow", "deny"]
    direction: Direction | None = None
    egress: Judgement | None = None
    ingress: Judgement | None = None

    @property
    def decisive(self) -> Judgement | None:
        return {"egress": self.egress, "ingress": self.ingress, None: None}[self.direction]

    @property
    def policies(self) -> list[dict[str, Any]]:
        """Those that decided (`Judgement.named`)."""
        found = self.decisive
        return [] if found is None else found.named(self.verdict == "deny")

    @property
    def policy(self) -> dict[str, str] | None:
        """The first of `policies`."""
        return next((_reference(p["namespace"], p["name"]) for p in self.policies), None)

    @property
    def rule(self) -> str | None:
        """The first rule that allows, such as "ingress[0]"; None for a deny: no rule denies,
        but "unreadable" of a policy whose rules can't be read."""
        return next((rule for policy in self.policies for rule in policy["rules"]), None)


def _reference(namespace: str, name: str) -> dict[str, str]:
    return {"kind": "NetworkPolicy", "namespace": namespace, "name": name}
