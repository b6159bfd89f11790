"""The compiler's ids on a node."""

from __future__ import annotations

from lockgate.agent.endpoints import Endpoints
from lockgate.agent.foreign import Foreign
from lockgate.agent.hops import Hops
from lockgate.agent.journal import Journal
from lockgate.compile.tables import ON_HOST, Direction, Rule, Verdict
from lockgate.objects.model import Pod

__all__ = ["NodeIds"]


class NodeIds:
    """The compiler's ids: the journal's, slots and hops (`lockgate.compile.Ids`)."""

    def __init__(
        self, journal: Journal, endpoints: Endpoints, foreign: Foreign, hops: Hops
    ) -> None:
        self._journal, self._endpoints = journal, endpoints
        self._foreign, self._hops = foreign, hops

    def endpoint(self, pod: Pod) -> int:
        return self._journal.endpoint(pod)

    def reason(self, verdict: Verdict, direction: Direction, rules: tuple[Rule, ...]) -> int:
        return self._journal.reason(verdict, direction, rules)

    def service(self, namespace: str, name: str, port_name: str, protocol: str, port: int) -> int:
        return self._journal.service(namespace, name, port_name, protocol, port)

    def slot(self, uid: str) -> int | None:
        return ON_HOST if uid in self._foreign.pods else self._endpoints.slot(uid)

    def hop(self, node: str) -> int | None:
        return self._hops.number(node)
