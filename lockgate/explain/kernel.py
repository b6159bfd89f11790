"""The kernel's answers: test runs of the live programs, over the live maps, marked as dry.

The packet of each question runs through `from_pod` at its source's node; when it would leave
for another node of the cluster, what came out runs through `from_net` there. Nothing is
written: no connection, no counter, no event. Programs and maps are opened by their pins.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import ArrayMap, HashMap
from lockgate.bpf.syscall import (
    TestRun,
    link_info,
    obj_get,
    prog_fd_by_id,
    prog_test_run,
    skb_context,
)
from lockgate.explain.names import Attempt, Names
from lockgate.explain.packet import addresses_of, first_packet
from lockgate.explain.question import Answer, Direction, Question, QuestionError, Side
from lockgate.net.namespaces import inside
from lockgate.objects.address import format_address
from lockgate.objects.model import Cluster
from lockgate.observer.journal import Journal

__all__ = ["KernelEngine", "NodePlace"]

# bpf/types.h; macros leave no BTF.
DRY_MARK = 0x6C6B6761
IFINDEX_BASE = 65536
CELL_ALLOW = 0x8000_0000
CELL_REASON = 0x3FFF_FFFF
LINK_UNDERLAY, LINK_OUTSIDE = 1, 2
DRY_RESULT, DRY_EGRESS, DRY_INGRESS, DRY_TARGET = 0, 1, 2, 3
DIR_INGRESS, DIR_EGRESS = 1, 2
TO_HOP = 2
CAUSE_POLICY = 1


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Where a node's pins, network namespace and journal are."""

    pins: Path
    netns: Path
    journal: Path


@dataclass(slots=True)
class _Run:
    """One attempt on its way through the nodes."""

    attempt: Attempt
    answer: Answer
    program: str = ""
    packet: bytes = b""
    context: bytes = b""
    egress: tuple[int, str] | None = None  # cell, node whose journal names its reason
    ingress: tuple[int, str] | None = None


class KernelEngine:
    """Asks the kernel. Close it, or use it as a context manager. Needs root.

    QuestionError when a node's programs are not there. `cluster` should be what is in force:
    it only tells which addresses names have, verdicts are the kernel's alone.
    """

    def __init__(self, cluster: Cluster, places: Mapping[str, NodePlace], schema: Schema) -> None:
        self.names = Names(cluster)
        self._places = places
        self._schema = schema
        self._nodes: dict[str, _Node] = {}
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
                results = self._node(name).run(batch)
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

    def _node(self, name: str) -> _Node:
        node = self._nodes.get(name)
        if node is None:
            place = self._places.get(name)
            if place is None:
                raise QuestionError(f"node {name} is not of this cluster")
            node = self._nodes[name] = _Node(name, place, self._schema)
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
            run.program = "from_pod"
            run.packet = first_packet(*packet_of, source_mac=mac, destination_mac=host_mac)
            run.context = at.context(IFINDEX_BASE + slot)
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
            run.program, run.context = "to_pod", at.context(IFINDEX_BASE + slot, own_socket=True)
        else:
            role = LINK_OUTSIDE if source.node is None else LINK_UNDERLAY
            run.program, run.context = "from_net", at.context(at.link(role))
        run.packet = first_packet(*packet_of)
        return at.name

    def _continue(self, run: _Run, node: str, result: TestRun) -> str | None:
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
        _, destination = addresses_of(result.data)
        pod = self.names.end_at(destination).pod
        if pod is None or pod.spec.node_name == node:
            return None  # to the world, or to another node itself
        run.program, run.packet = "from_net", result.data
        try:
            at = self._node(pod.spec.node_name)
            run.context = at.context(at.link(LINK_UNDERLAY))
        except QuestionError as error:
            answer.error = str(error)
            return None
        return at.name

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


class _Node:
    """One node's programs and maps, opened by their pins."""

    def __init__(self, name: str, place: NodePlace, schema: Schema) -> None:
        self.name = name
        self._place = place
        self._endpoint_dtype = schema.dtype("endpoint")
        self._contexts: dict[tuple[int, bool], bytes] = {}
        self._programs: dict[str, int] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            try:
                for program in ("from_pod", "to_pod", "from_net"):
                    self._programs[program] = _attached(place.pins / "links", program)
                with HashMap.open(str(place.pins / "link_roles"), "<u4", "<u4") as roles:
                    links, kinds = roles.items()
            except OSError as error:
                raise QuestionError(
                    f"node {name}: its programs are not in the kernel ({error.strerror})"
                ) from error
            self._links = {
                int(kind): int(link) for link, kind in sorted(zip(links, kinds, strict=True))
            }
            self._journal = Journal(place.journal)
            self.refresh()
            undo.pop_all()

    def close(self) -> None:
        for fd in self._programs.values():
            if fd >= 0:
                os.close(fd)
        self._programs.clear()

    def refresh(self) -> None:
        """Reads endpoints and journal again: pods come and go."""
        self._journal.refresh()
        with ArrayMap.open(str(self._place.pins / "endpoints"), self._endpoint_dtype) as endpoints:
            records = endpoints.values()
        self._endpoints: dict[bytes, tuple[int, bytes, bytes]] = {}
        for slot in np.flatnonzero(records["flags"] & 1):
            record = records[slot]
            ends = int(slot), record["mac"].tobytes(), record["host_mac"].tobytes()
            for key in ("addr4", "addr6"):
                address = _address(record[key])
                if any(address):
                    self._endpoints[address] = ends

    def endpoint(self, address: bytes, pod: str) -> tuple[int, bytes, bytes]:
        """Slot, MAC and host MAC of the pod that has the address here."""
        found = self._endpoints.get(address)
        if found is None:
            raise QuestionError(
                f"pod {pod} ({format_address(address)}) is not wired on node {self.name} yet"
            )
        return found

    def link(self, role: int) -> int:
        """Interface index of a network card by its role; any, when there is none of it."""
        for found in (self._links.get(role), *self._links.values()):
            if found is not None:
                return found
        raise QuestionError(f"node {self.name} has no network card that the data plane knows")

    def context(self, ifindex: int, *, own_socket: bool = False) -> bytes:
        key = ifindex, own_socket
        if key not in self._contexts:
            self._contexts[key] = skb_context(
                mark=DRY_MARK,
                cb=(1 if own_socket else 0, 0, 0, 0, 0),
                ifindex=ifindex,
                ingress_ifindex=ifindex,
            )
        return self._contexts[key]

    def run(self, batch: Iterable[_Run]) -> list[TestRun]:
        """The test runs, inside the node's network namespace."""
        with inside(self._place.netns):
            return [
                prog_test_run(
                    self._programs[run.program], run.packet, run.context, name=run.program
                )
                for run in batch
            ]

    def reason(self, reason: int) -> list[dict[str, Any]] | None:
        found = self._journal.reasons.get(reason)
        if found is None:
            self._journal.refresh()
            found = self._journal.reasons.get(reason)
        return None if found is None else found.policies


def _attached(links: Path, program: str) -> int:
    """Descriptor of the program that is attached now, by one of its pinned links; where none is
    (a node without pods), no question needs it, and the answer is -1. Raises OSError."""
    for link in sorted(links.iterdir()):
        if link.name.rpartition("-")[0] == program:
            fd = obj_get(str(link))
            try:
                return prog_fd_by_id(link_info(fd).prog_id)
            finally:
                os.close(fd)
    return -1


def _address(value: Any) -> bytes:
    """16 bytes of a `struct addr`, whichever way the schema shows it."""
    return bytes(np.asarray(value).tobytes())
