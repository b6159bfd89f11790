"""Questions, and answers as they are printed (docs/architecture.md, explain)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from lockgate.explain.packet import PROTOCOLS

__all__ = [
    "Answer",
    "Direction",
    "Family",
    "Question",
    "QuestionError",
    "Side",
    "parse_port",
    "parse_question",
]

Family = Literal[4, 6]
Direction = Literal["ingress", "egress"]


class QuestionError(Exception):
    """A question that cannot be asked; one sentence that names the object."""


@dataclass(frozen=True, slots=True)
class Question:
    """May `source` open a connection to `target`? Names as the user wrote them."""

    source: str
    target: str
    port: int | None
    protocol: str = "TCP"
    family: Family | None = None  # None: the first that both ends have


@dataclass(frozen=True, slots=True)
class Side:
    """What the policies of one end say. `policies` as in the answer; empty: none isolates."""

    allowed: bool
    policies: list[dict[str, Any]]


@dataclass(slots=True)
class Answer:
    """`error` instead of a verdict when the question cannot be asked."""

    question: Question
    verdict: Literal["allow", "deny"] = "deny"
    direction: Direction | None = None
    policies: list[dict[str, Any]] = field(default_factory=list)
    cause: str | None = None
    backend: str | None = None
    source_ip: str = ""
    destination_ip: str = ""
    error: str | None = None
    sides: dict[Direction, Side] = field(default_factory=dict)  # not printed as JSON

    def json(self) -> dict[str, Any]:
        asked = self.question
        answer: dict[str, Any] = {
            "from": asked.source,
            "to": asked.target,
            "port": asked.port,
            "protocol": asked.protocol,
        }
        if self.error is not None:
            return answer | {"verdict": None, "error": self.error}
        first = self.policies[0] if self.policies else None
        rules = [rule for policy in self.policies for rule in policy["rules"]]
        answer |= {
            "verdict": self.verdict,
            "direction": self.direction,
            "policy": {k: first[k] for k in ("kind", "namespace", "name")} if first else None,
            "rule": rules[0] if rules else None,
            "policies": self.policies,
        }
        if self.cause is not None:
            answer["cause"] = self.cause
        if self.backend is not None:
            answer["backend"] = self.backend
        return answer


def parse_port(text: str) -> tuple[int | None, str]:
    """`PORT[/PROTO]` or `icmp`: port and protocol. QuestionError."""
    number, slash, name = text.partition("/")
    protocol = name.upper() if slash else "TCP"
    if text.upper() == "ICMP":
        return None, "ICMP"
    if protocol not in PROTOCOLS:
        raise QuestionError(f"{text}: the protocol is one of tcp, udp, sctp or icmp")
    if protocol == "ICMP":
        return None, protocol
    if not (number.isascii() and number.isdigit() and 1 <= int(number) <= 65535):
        raise QuestionError(f"{text}: expected PORT[/PROTO], the port from 1 to 65535")
    return int(number), protocol


def parse_question(value: Any) -> Question:
    """From one object of a batch: {"from", "to", "port", "protocol"?, "family"?}."""
    if not isinstance(value, dict):
        raise QuestionError("a question is an object with from, to, port and protocol")
    ends = [value.get("from"), value.get("to")]
    for name, end in zip(("from", "to"), ends, strict=True):
        if not isinstance(end, str) or not end:
            raise QuestionError(f"{name}: expected ns/pod, a service or an address, got {end!r}")
    protocol = str(value.get("protocol") or "TCP").upper()
    if protocol == "ICMPV6":
        protocol = "ICMP"
    if protocol not in PROTOCOLS:
        raise QuestionError(f"protocol: expected one of {', '.join(PROTOCOLS)}, got {protocol}")
    port, family = value.get("port"), value.get("family")
    if family not in (None, 4, 6, "4", "6", "IPv4", "IPv6"):
        raise QuestionError(f"family: expected 4 or 6, got {family!r}")
    if protocol != "ICMP" and (
        not isinstance(port, int) or isinstance(port, bool) or not 1 <= port <= 65535
    ):
        raise QuestionError(f"port: expected a number from 1 to 65535, got {port!r}")
    wanted: Family | None = None if family is None else 6 if str(family).endswith("6") else 4
    return Question(
        str(ends[0]), str(ends[1]), None if protocol == "ICMP" else port, protocol, wanted
    )
