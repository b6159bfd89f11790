"""A node's kernel, through its agent's and observer's calls: for clusters that are elsewhere."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from lockgate.access import Access, Refused
from lockgate.explain.kernel import DryRun, Ran
from lockgate.explain.question import QuestionError
from lockgate.objects.address import format_address, parse_address

__all__ = ["AskedNode"]

_AT_ONCE = 2000  # packets in a call


class AskedNode:
    """See NodeKernel. What is read is what the agent has in force at that moment."""

    def __init__(self, access: Access, name: str) -> None:
        self.name = name
        self._access = access
        self._reasons: dict[int, list[dict[str, Any]] | None] = {}
        self.refresh()

    def close(self) -> None:
        pass

    def refresh(self) -> None:
        facts = self._call("agent", "GET", "/v1/dryrun")
        self._endpoints: dict[bytes, tuple[int, bytes, bytes]] = {}
        for one in facts["endpoints"]:
            ends = one["slot"], bytes.fromhex(one["mac"]), bytes.fromhex(one["hostMac"])
            for ip in one["ips"]:
                self._endpoints[parse_address(ip)] = ends
        self._links = {int(role): int(index) for role, index in facts["links"].items()}
        self._tunnels = {int(hop): parse_address(ip) for hop, ip in facts["tunnels"].items()}

    def endpoint(self, address: bytes, pod: str) -> tuple[int, bytes, bytes]:
        found = self._endpoints.get(address)
        if found is None:
            raise QuestionError(
                f"pod {pod} ({format_address(address)}) is not wired on node {self.name} yet"
            )
        return found

    def link(self, role: int) -> int:
        for found in (self._links.get(role), *self._links.values()):
            if found is not None:
                return found
        raise QuestionError(f"node {self.name} has no network card that the data plane knows")

    def tunnel_end(self, hop: int) -> bytes | None:
        return self._tunnels.get(hop)

    def run(self, batch: Sequence[DryRun]) -> list[Ran]:
        results: list[Ran] = []
        for start in range(0, len(batch), _AT_ONCE):
            packets = [
                {
                    "at": one.program,
                    "packet": base64.b64encode(one.packet).decode(),
                    "ifindex": one.ifindex,
                    "ownSocket": one.own_socket,
                }
                for one in batch[start : start + _AT_ONCE]
            ]
            for answer in self._call("agent", "POST", "/v1/dryrun", {"packets": packets})[
                "answers"
            ]:
                if "error" in answer:
                    raise QuestionError(f"node {self.name}: {answer['error']}")
                packet = base64.b64decode(answer["packet"])
                results.append(Ran(answer["retval"], answer["cb"], packet))
        return results

    def reason(self, reason: int) -> list[dict[str, Any]] | None:
        if self._reasons.get(reason) is None:
            found = self._call("observer", "GET", f"/v1/reasons?id={reason}")
            self._reasons[reason] = found.get(str(reason))
        return self._reasons[reason]

    def _call(self, role: Any, method: str, url: str, body: Any = None) -> Any:
        try:
            return self._access.call(self.name, role, method, url, body)
        except (OSError, Refused) as error:
            raise QuestionError(f"node {self.name}: its {role} does not answer: {error}") from error
