"""The programs and maps of one node in the kernel, and the pins that outlive the agent.

Pins are in `<bpffs>/lockgate/CLUSTER/NODE`: maps by name, links in `links/`. An agent that
starts finds the maps of the one before and goes on with them; pinned links get the new
programs in place, so packets are judged all the while.
"""

from __future__ import annotations

import contextlib
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np

from lockgate.agent.limits import Limits
from lockgate.bpf import links, syscall
from lockgate.bpf.maps import ArrayMap, ArrayOfMaps, HashMap, LpmTrie, MappedArray, PerCpuArray
from lockgate.bpf.object import LoadError, Object
from lockgate.bpf.syscall import TestRun

__all__ = ["Datapath", "Sizes"]

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sizes:
    """Elements of the maps that remember."""

    connections: int
    half_open: int
    nat: int
    sockets: int

    @classmethod
    def from_memory(cls, share: float = 0.01) -> Sizes:
        """So that the maps take about `share` of the machine's memory, within bounds. An entry
        of an LRU hash takes about 160 bytes, allocated beforehand."""
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        units = int(memory * share) // 160
        connections = 1 << max(14, min(21, units.bit_length() - 1))
        return cls(connections, connections // 8, connections // 4, connections // 4)


class Datapath:
    """Loaded programs and typed maps. Close it and all that is pinned goes on working."""

    def __init__(
        self,
        path: Path,
        pins: Path,
        sizes: Sizes | None = None,
        limits: Limits | None = None,
        tunnels: bool = True,
    ) -> None:
        """Load the object at `path` over what is pinned in `pins`, able to use tunnels or not.
        LoadError: see the message; what runs in the kernel is then as it was."""
        self.pins = pins
        self.links = pins / "links"
        self.links.mkdir(parents=True, exist_ok=True)
        self.object = Object(path)
        try:
            sizes = sizes or Sizes.from_memory()
            self.replaced = self._reuse(sizes)
            self.object.set_rodata((limits or Limits()).constants(sizes.half_open))
            self.object.set_rodata({"config_tunnel": int(tunnels)})
            self.object.load()
            for name in self.replaced:
                (pins / name).unlink(missing_ok=True)
            self.object.pin_maps(pins)
        except BaseException:
            self.object.close()
            raise
        obj, dtype = self.object, self.object.schema.dtype
        u32 = np.dtype("<u4")
        self.state = MappedArray.of(obj, "state", dtype("node_state"))
        self.ids = MappedArray.of(obj, "ids", dtype("last_ids"))
        self.images = ArrayOfMaps.of(obj, "images", np.dtype("<u8"))
        self.peers = HashMap.of(obj, "peers", dtype("addr"), dtype("peer"))
        self.endpoints = MappedArray.of(obj, "endpoints", dtype("endpoint"))
        self.services = HashMap.of(obj, "services", dtype("service_key"), dtype("service"))
        self.backends = HashMap.of(
            obj, "service_backends", dtype("backend_key"), dtype("backend_state")
        )
        self.hops = MappedArray.of(obj, "hops", dtype("hop"))
        self.routes = LpmTrie.of(obj, "routes", dtype("route_key"), u32)
        self.link_roles = HashMap.of(obj, "link_roles", u32, u32)
        self.connections = HashMap.of(obj, "connections", dtype("ct_key"), dtype("ct"))
        self.half_open = HashMap.of(obj, "half_open", dtype("ct_key"), dtype("ct"))
        self.nat = HashMap.of(obj, "nat", dtype("tuple"), dtype("nat"))
        self.fragments = HashMap.of(obj, "fragments", dtype("frag_key"), dtype("frag"))
        self.counters = PerCpuArray.of(obj, "counters", np.dtype("<u8"))

    def close(self) -> None:
        """Close descriptors; nothing is detached."""
        for value in vars(self).values():
            if isinstance(value, ArrayMap | ArrayOfMaps | HashMap | LpmTrie | PerCpuArray):
                value.close()
        self.object.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- Attaching -----------------------------------------------------------------

    def attach_pod(self, slot: int, ifindex: int) -> None:
        """Programs on a pod's host veth, or the new ones in place of old ones."""
        to_pod, from_pod = self._pod_pins(slot)
        # to_pod first: whoever may send into the pod is judged before the pod may speak.
        self._tcx("to_pod", ifindex, "egress", to_pod)
        self._tcx("from_pod", ifindex, "ingress", from_pod)

    def detach_pod(self, slot: int) -> None:
        """Remove a pod's links. Nothing there is success."""
        for path in self._pod_pins(slot):
            links.remove(str(path))

    def pod_slots(self) -> set[int]:
        """Slots that links are pinned for."""
        found = set()
        for name in links.links_in(str(self.links)):
            head, _, tail = name.rpartition("-")
            if head in ("from_pod", "to_pod") and tail.isdecimal():
                found.add(int(tail))
        return found

    def attach_net(self, name: str, ifindex: int) -> None:
        """from_net on a network card."""
        self._tcx("from_net", ifindex, "ingress", self.links / f"from_net-{name}")

    def detach_net(self, name: str) -> None:
        """Remove a card's link. Nothing there is success."""
        links.remove(str(self.links / f"from_net-{name}"))

    def attach_cgroup(self, cgroup: Path) -> None:
        """The socket programs on the node's cgroup."""
        for name, section in self.object.programs.items():
            if section.startswith("cgroup/"):
                fd = self.object.prog_fd(name)
                links.attach_cgroup(fd, str(cgroup), section, str(self.links / name)).close()

    def _tcx(self, program: str, ifindex: int, direction: links.Direction, path: Path) -> None:
        fd = self.object.prog_fd(program)
        links.attach_tcx(fd, ifindex, direction, str(path)).close()

    def _pod_pins(self, slot: int) -> tuple[Path, Path]:
        return self.links / f"to_pod-{slot}", self.links / f"from_pod-{slot}"

    # ---- Asking --------------------------------------------------------------------

    def dry_run(
        self, program: str, packet: bytes, ifindex: int, mark: int, *, own_socket: bool = False
    ) -> TestRun:
        """Run a live program on a packet; see `enum dry_answer` for its cb. `own_socket`: as if
        a socket of the node itself had sent it."""
        context = syscall.skb_context(
            mark=mark, cb=(int(own_socket),), ifindex=ifindex, ingress_ifindex=ifindex
        )
        return syscall.prog_test_run(self.object.prog_fd(program), packet, context, name=program)

    # ---- Inside --------------------------------------------------------------------

    def _reuse(self, sizes: Sizes) -> list[str]:
        """Take over pinned maps; returns those that are of another version and will be new."""
        wanted = {
            "connections": sizes.connections,
            "half_open": sizes.half_open,
            "nat": sizes.nat,
            "sockets": sizes.sockets,
        }
        replaced = []
        for name in self.object.maps:
            if name.startswith("."):
                continue
            path = self.pins / name
            if path.exists():
                fd = syscall.obj_get(str(path))
                try:
                    self.object.reuse_map(name, fd)
                    continue
                except LoadError as error:
                    log.warning("%s; it is replaced and what it held is lost", error)
                    replaced.append(name)
                finally:
                    os.close(fd)
            if name in wanted:
                with contextlib.suppress(LoadError):
                    self.object.set_max_entries(name, wanted[name])
        return replaced
