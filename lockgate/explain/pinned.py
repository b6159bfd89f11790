"""A node's kernel, by what it has pinned: for the standalone cluster, on whose machine we are."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import ArrayMap, HashMap
from lockgate.bpf.pins import pin_names
from lockgate.bpf.syscall import link_info, obj_get, prog_fd_by_id, prog_test_run, skb_context
from lockgate.explain.kernel import DRY_MARK, DryRun, Ran
from lockgate.explain.question import QuestionError
from lockgate.net import filters, pods
from lockgate.net.filters import Direction
from lockgate.net.links import IFINDEX_BASE
from lockgate.net.namespaces import inside
from lockgate.objects.address import format_address
from lockgate.observer.journal import Journal

__all__ = ["NodePlace", "PinnedNode"]


HOP_TUNNEL = 8  # bpf/types.h


@dataclass(frozen=True, slots=True)
class NodePlace:
    """Where a node's pins, network namespace and journal are."""

    pins: Path
    netns: Path
    journal: Path


class PinnedNode:
    """See NodeKernel. Needs root. QuestionError when the node's programs are not there."""

    def __init__(self, name: str, place: NodePlace, schema: Schema) -> None:
        self.name = name
        self._place = place
        self._endpoint_dtype = schema.dtype("endpoint")
        self._hop_dtype, self._state_dtype = schema.dtype("hop"), schema.dtype("node_state")
        self._names = pin_names(schema)
        self._contexts: dict[tuple[int, bool], bytes] = {}
        self._programs: dict[str, int] = {}
        with ExitStack() as undo:
            undo.callback(self.close)
            try:
                self._programs["from_net"] = _linked(place.pins / "links", "from_net")
                with inside(place.netns):
                    self._programs["from_pod"] = _filter("ingress")
                    self._programs["to_pod"] = _filter("egress")
                for program in ("from_pod", "to_pod"):
                    if self._programs[program] < 0:
                        # Links, where others have programs too (lockgate.agent.guard).
                        self._programs[program] = _linked(place.pins / "links", program)
                with HashMap.open(self._pin("link_roles"), "<u4", "<u4") as roles:
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
        with ArrayMap.open(self._pin("endpoints"), self._endpoint_dtype) as endpoints:
            records = endpoints.values()
        self._endpoints: dict[bytes, tuple[int, bytes, bytes]] = {}
        for slot in np.flatnonzero(records["flags"] & 1):
            record = records[slot]
            ends = int(slot), record["mac"].tobytes(), record["host_mac"].tobytes()
            for key in ("addr4", "addr6"):
                address = _address(record[key])
                if any(address):
                    self._endpoints[address] = ends

    def _pin(self, name: str) -> str:
        return str(self._place.pins / self._names[name])

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

    def tunnel_end(self, hop: int) -> bytes | None:
        """The address that a hop tunnels to; None if it is no tunnel."""
        with (
            ArrayMap.open(self._pin("state"), self._state_dtype) as state,
            ArrayMap.open(self._pin("hops"), self._hop_dtype) as hops,
        ):
            view = hops[hop]["view"][int(state[0]["epoch"]) & 1]
        return _address(view["remote"]) if view["flags"] & HOP_TUNNEL else None

    def _context(self, ifindex: int, own_socket: bool) -> bytes:
        key = ifindex, own_socket
        if key not in self._contexts:
            self._contexts[key] = skb_context(
                mark=DRY_MARK,
                cb=(1 if own_socket else 0, 0, 0, 0, 0),
                ifindex=ifindex,
                ingress_ifindex=ifindex,
            )
        return self._contexts[key]

    def run(self, batch: Sequence[DryRun]) -> list[Ran]:
        results = []
        with inside(self._place.netns):
            for one in batch:
                done = prog_test_run(
                    self._programs[one.program],
                    one.packet,
                    self._context(one.ifindex, one.own_socket),
                    name=one.program,
                )
                results.append(Ran(done.retval, done.cb, done.data))
        return results

    def reason(self, reason: int) -> list[dict[str, Any]] | None:
        found = self._journal.reasons.get(reason)
        if found is None:
            self._journal.refresh()
            found = self._journal.reasons.get(reason)
        return None if found is None else found.policies


def _filter(direction: Direction) -> int:
    """Descriptor of the program that is on pods' links now, in the calling thread's namespace;
    where there are no pods no question needs it, and the answer is -1. Raises OSError."""
    for slot in pods.seals():
        program, _ = filters.seat(IFINDEX_BASE + slot, direction)
        if program:
            return prog_fd_by_id(program)
    return -1


def _linked(links: Path, program: str) -> int:
    """Descriptor of the program that is attached now, by one of its pinned links; -1 where none
    is. Raises OSError."""
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
