"""The specification's answers: `lockgate.spec` asked about the same packets as the kernel."""

from __future__ import annotations

from collections.abc import Sequence

from lockgate.explain.names import Attempt, Names
from lockgate.explain.question import Answer, Direction, Question, Side
from lockgate.objects.model import Cluster
from lockgate.spec.answer import Judgement, Packet
from lockgate.spec.policy import judge

__all__ = ["SpecEngine"]


class SpecEngine:
    """Asks the specification; needs no kernel."""

    def __init__(self, cluster: Cluster) -> None:
        self.names = Names(cluster)

    def judge(self, attempts: Sequence[tuple[Question, Attempt]]) -> list[Answer]:
        return [self._one(question, attempt) for question, attempt in attempts]

    def _one(self, question: Question, attempt: Attempt) -> Answer:
        source, destination = attempt.source, attempt.destination
        answer = Answer(
            question,
            backend=attempt.backend,
            source_ip=source.ip,
            destination_ip=destination.ip if destination else "",
        )
        if attempt.unserved or destination is None:
            answer.cause = attempt.unserved or "no-backend"
            return answer
        protocol = attempt.protocol
        if protocol == "ICMP" and ":" in source.ip:
            protocol = "ICMPv6"
        found = judge(
            self.names.cluster,
            Packet(
                source.ip,
                destination.ip,
                protocol,
                attempt.port,
                from_own_node=source.node is not None
                and destination.pod is not None
                and source.node == destination.pod.spec.node_name,
            ),
        )
        answer.verdict, answer.direction = found.verdict, found.direction
        answer.policies = found.policies
        pairs: tuple[tuple[Direction, Judgement | None], ...] = (
            ("egress", found.egress),
            ("ingress", found.ingress),
        )
        answer.sides = {
            direction: Side(side.allowed, side.named(not side.allowed))
            for direction, side in pairs
            if side is not None
        }
        return answer
