"""The kernel's answers: test runs of the live programs, over the live maps, marked as dry.

The packet of each question runs through `from_pod` at its source's node; when it would leave
for another node of the cluster, what came out runs through `from_net` there. Nothing is
written: no connection, no counter, no event. A node's kernel is reached by its pins (pinned.py)
or through its agent (asked.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lockgate.bpf.btf import Schema
from lockgate.explain.names import Attempt, Names
from lockgate.explain.packet import addresses_of, first_packet
from lockgate.explain.question import Answer, Direction, Question, QuestionError, Side
from lockgate.objects.address import format_address
from lockgate.objects.model import Cluster

__all__ = ["DRY_MARK", "IFINDEX_BASE", "DryRun", "KernelEngine", "NodeKernel", "Ran"]

# bpf/types.h; macros leave no BTF.
DRY_MARK = 0x6C6B6761
IFINDEX_BASE = 65536
CELL_ALLOW = 0x8000_0000
CELL_REASON = 0x3FFF_FFFF
LINK_UNDERLAY, LINK_OUTSIDE, LINK_TUNNEL = 1, 2, 3
DRY_RESULT, DRY_EGRESS, DRY_INGRESS, DRY_TARGET = 0, 1, 2, 3
DIR_INGRESS, DIR_EGRESS = 1, 2
TO_HOP = 2
CAUSE_POLICY = 1


@dataclass(frozen=True, slots=True)
class DryRun:
    """A packet for a program, as if it came to interface `ifindex`; `own_socket`: as if a socket
    of the node itself had sent it."""

    program: str
    packet: bytes
    ifindex: int
    own_socket: bool = False


@dataclass(frozen=True, slots=True)
class Ran:
    """What came of it: the program's return value, `enum dry_answer`, the packet after it."""

    retval: int
    cb: Sequence[int]
    packet: bytes


class NodeKernel(Protocol):
    """One node's programs and tables. Methods raise QuestionError with a sentence."""

    name: str

    def refresh(self) -> None:
        """Pods come and go: what was read is read again."""

    def endpoint(self, address: bytes, pod: str) -> tuple[int, bytes, bytes]:
        """Slot, MAC and host MAC of the pod that has the address here."""

    def link(self, role: int) -> int:
        """Interface index of a network card by its role; any, when there is none of it."""

    def tunnel_end(self, hop: int) -> bytes | None:
        """The address that a hop tunnels to; None if it is no tunnel."""

    def run(self, batch: Sequence[DryRun]) -> list[Ran]:
        """The test runs, inside the node's network namespace."""

    def reason(self, reason: int) -> list[dict[str, Any]] | None:
        """The policies of a reason, as flow records have them."""

    def close(self) -> None: ...


@dataclass(slots=True)
class _Run:
    """One attempt on its way through the nodes."""

    attempt: Attempt
    answer: Answer
    next: DryRun | None = None
    egress: tuple[int, str] | None = None  # cell, node whose journal names its reason
    ingress: tuple[int, str] | None = None


class KernelEngine:
    """Asks the kernel. Close it, or use it as a context manager. Needs root.

    QuestionError when a node's programs are not there. `cluster` should be what is in force:
    it only tells which addresses names have, verdicts are the kernel's alone.
    """

    def __init__(self, cluster: Cluster, node: Callable[[str], NodeKernel], schema: Schema) -> None:
        """`node` opens one of the cluster's nodes by its name."""
        self.names = Names(cluster)
        self._known = set(cluster.nodes)
        self._open = node
        self._nodes: dict[str, NodeKernel] = {}
        self._causes = {
            number: name.removeprefix("CAUSE_").lower().replace("_", "-")
            for name, number in schema.enum("cause").items()
        }

    def __enter__(self) -> KernelEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        for node in self._nodes.values():
            node.close()
        self._nodes.clear()

    def judge(self, attempts: Sequence[tuple[Question, Attempt]]) -> list[Answer]:
        runs = []
        waiting: dict[str, list[_Run]] = {}
        for node in self._nodes.values():
            node.refresh()
        for question, attempt in attempts:
            answer = Answer(
                question,
                backend=attempt.backend,
                source_ip=attempt.source.ip,
                destination_ip=attempt.destination.ip if attempt.destination else "",
            )
            run = _Run(attempt, answer)
            runs.append(run)
            try:
                at = self._begin(run)
            except QuestionError as error:
                answer.error = str(error)
                continue
            if at is not None:
                waiting.setdefault(at, []).append(run)
        while waiting:  # at most two rounds: a packet crosses at most two nodes
            following: dict[str, list[_Run]] = {}
            for name, batch in waiting.items():
                results = self._node(name).run([run.next for run in batch if run.next])
                for run, result in zip(batch, results, strict=True):
                    at = self._continue(run, name, result)
                    if at is not None:
                        following.setdefault(at, []).append(run)
            waiting = following
        for run in runs:
            try:
                self._conclude(run)
            except QuestionError as error:
                run.answer.error = str(error)
        return [run.answer for run in runs]

    # ---- Inside -------------------------------------------------------------------

    def _node(self, name: str) -> NodeKernel:
        node = self._nodes.get(name)
        if node is None:
            if name not in self._known:
                raise QuestionError(f"node {name} is not of this cluster")
            node = self._nodes[name] = self._open(name)
        return node

    def _begin(self, run: _Run) -> str | None:
        """Puts the first packet together; the node that is asked, or None: decided already."""
        attempt = run.attempt
        source, destination = attempt.source, attempt.destination
        if destination is None:
            run.answer.cause = attempt.unserved or "no-backend"
            return None
        packet_of = (source.address, destination.address, attempt.protocol, attempt.port)
        if source.pod is not None:
            at = self._node(source.pod.spec.node_name)
            slot, mac, host_mac = at.endpoint(source.address, "/".join(source.pod.key))
            packet = first_packet(*packet_of, source_mac=mac, destination_mac=host_mac)
            run.next = DryRun("from_pod", packet, IFINDEX_BASE + slot)
            return at.name
        if attempt.unserved:  # a node's own socket is refused at connect
            run.answer.cause = attempt.unserved
            return None
        if destination.pod is None:
            run.answer.verdict = "allow"  # no pod at either end: no policy can apply
            return None
        at = self._node(destination.pod.spec.node_name)
        if source.node == at.name:
            slot, _, _ = at.endpoint(destination.address, "/".join(destination.pod.key))
            run.next = DryRun("to_pod", first_packet(*packet_of), IFINDEX_BASE + slot, True)
        else:
            role = LINK_OUTSIDE if source.node is None else LINK_UNDERLAY
            run.next = DryRun("from_net", first_packet(*packet_of), at.link(role))
        return at.name

    def _continue(self, run: _Run, node: str, result: Ran) -> str | None:
        """Reads the answer of one node; the next node that must be asked, or None."""
        cells, answer = result.cb, run.answer
        word = cells[DRY_RESULT]
        judged = word >> 16
        if result.retval == -1 and not judged:  # TCX_NEXT: not the data plane's to decide
            answer.cause = "not-ready"
            return None
        if judged & 1 << DIR_EGRESS:
            run.egress = cells[DRY_EGRESS], node
        if judged & 1 << DIR_INGRESS:
            run.ingress = cells[DRY_INGRESS], node
        cause = word >> 8 & 0xFF
        answer.verdict = "allow" if word & 1 else "deny"
        if answer.verdict == "deny" and cause != CAUSE_POLICY:
            answer.cause = self._causes.get(cause, str(cause))
        if answer.verdict == "deny" or cells[DRY_TARGET] >> 28 != TO_HOP:
            return None
        _, destination = addresses_of(result.packet)
        pod = self.names.end_at(destination).pod
        if pod is None or pod.spec.node_name == node:
            return None  # to the world, or to another node itself
        try:
            remote = self._node(node).tunnel_end(cells[DRY_TARGET] & 0xFFFFFFF)
            at = self._node(pod.spec.node_name if remote is None else self._node_at(remote, node))
            role = LINK_UNDERLAY if remote is None else LINK_TUNNEL
            run.next = DryRun("from_net", result.packet, at.link(role))
        except QuestionError as error:
            answer.error = str(error)
            return None
        return at.name

    def _node_at(self, remote: bytes, node: str) -> str:
        """The node at the other end of a tunnel from `node`."""
        found = self.names.end_at(remote).node
        if found is None:
            raise QuestionError(
                f"node {node}: its tunnel leads to {format_address(remote)}, which is no node's"
            )
        return found

    def _conclude(self, run: _Run) -> None:
        """Direction and policies out of the cells."""
        answer = run.answer
        if answer.error is not None:
            return
        cells: tuple[tuple[Direction, tuple[int, str] | None], ...] = (
            ("egress", run.egress),
            ("ingress", run.ingress),
        )
        for direction, found in cells:
            if found is None:
                continue
            cell, node = found
            policies = self._policies(cell & CELL_REASON, node)
            allowed = bool(cell & CELL_ALLOW)
            answer.sides[direction] = Side(allowed, policies)
            decided = answer.verdict == "deny" and answer.cause is None and not allowed
            if decided or (answer.verdict == "allow" and cell & CELL_REASON):
                answer.direction, answer.policies = direction, policies

    def _policies(self, reason: int, node: str) -> list[dict[str, Any]]:
        if not reason:
            return []
        known = self._node(node).reason(reason)
        if known is None:
            raise QuestionError(f"node {node}: its journal does not name reason {reason}")
        return known
