"""The programs and maps of one node in the kernel, and the pins that outlive the agent.

Pins are in `<bpffs>/lockgate/CLUSTER/NODE`: maps by name and version, links in `links/`. An
agent that starts finds the maps of the one before and goes on with them; pinned links, and the
filters on pods' links, get the new programs in place, so packets are judged all the while. Maps
of other versions are left to the programs that use them until ours can do without (`pending`).
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Self

import numpy as np

from lockgate.agent.flows import Flows
from lockgate.agent.guard import Guard
from lockgate.agent.limits import Limits
from lockgate.agent.others import Table, inherit
from lockgate.agent.sizes import SHARE, Sizes, flow_tags
from lockgate.bpf import clock, links, syscall
from lockgate.bpf.maps import ArrayMap, ArrayOfMaps, HashMap, LpmTrie, MappedArray, PerCpuArray
from lockgate.bpf.object import Object
from lockgate.bpf.pins import TOGETHER, other_pins, pin_names
from lockgate.bpf.syscall import TestRun
from lockgate.net import namespaces

__all__ = ["Datapath"]

log = logging.getLogger(__name__)
#: Programs of the other object, whose links are pinned beside ours (lockgate/agent/edge.py).
_EDGE = ("xdp_net",)
_AT_CARDS: tuple[tuple[str, links.Direction], ...] = (
    ("from_net", "ingress"),
    ("to_net", "egress"),
)


class Datapath:
    """Loaded programs and typed maps. Close it and all that is pinned goes on working."""

    def __init__(
        self,
        path: Path,
        pins: Path,
        sizes: Sizes | None = None,
        share: float = SHARE,
        limits: Limits | None = None,
        tunnels: bool = True,
        flows: Flows | None = None,
    ) -> None:
        """Load the object at `path` over what is pinned in `pins`, able to use tunnels or not.
        `sizes`, or the `share` of memory, is for tables that are made now: those that are there
        keep theirs, also in another layout, lest connections are lost for it. LoadError: see the
        message; what runs in the kernel is then as it was."""
        self.pins = pins
        self.links = pins / "links"
        self.links.mkdir(parents=True, exist_ok=True)
        self.object = Object(path)
        try:
            self.names = pin_names(self.object.schema)
            self._set_aside()
            flows = flows or Flows()
            wanted = (sizes or Sizes.from_memory(self.object.schema, share)).by_map()
            if not flows.remember:
                wanted["flows"] = 1
            entries = self._reuse(wanted)
            #: Values of bpf/config.h, for all objects.
            self.constants = {
                **(limits or Limits()).constants(entries["half_open"]),
                **flows.constants(entries["flows"]),
                "config_flow_mask": entries["flows"] - 1,
                "config_tunnel": int(tunnels),
                "config_netns_cookie": namespaces.cookie(),
                **clock.constants(),
            }
            self.object.set_rodata(self.constants)
            self.object.load()
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
        self.crowd = HashMap.of(obj, "crowd", dtype("ct_key"), dtype("ct"))
        self.nat = HashMap.of(obj, "nat", dtype("tuple"), dtype("nat"))
        self.fragments = HashMap.of(obj, "fragments", dtype("frag_key"), dtype("frag"))
        self.sockets = HashMap.of(obj, "sockets", dtype("socket_key"), dtype("socket_peer"))
        self.affinities = HashMap.of(obj, "affinities", dtype("affinity_key"), dtype("affinity"))
        self.flows = MappedArray.of(obj, "flows", dtype("flow_set"))
        self.flow_tags = MappedArray.of(obj, "flow_tags", np.dtype("<u8"))
        self.peer_bits = MappedArray.of(obj, "peer_bits", np.dtype("<u8"))
        self.frontend_bits = MappedArray.of(obj, "frontend_bits", np.dtype("<u8"))
        self.counters = PerCpuArray.of(obj, "counters", np.dtype("<u8"))
        #: The programs on pods' links.
        self.guard = Guard(obj, self.links)
        #: Maps of other versions, which programs that are attached may be using.
        self.others = other_pins(pins, self.names)
        #: The last epoch that any of those was in: ours are not to be confounded with them.
        self.beyond = 0
        try:
            tables: dict[str, Table] = {
                "hops": self.hops,
                "routes": self.routes,
                "link_roles": self.link_roles,
            }
            self.beyond = inherit(self.others, self.state, self.ids, tables)
            # Not before: what is pinned is whole.
            self.object.pin_maps(pins, self.names)
        except BaseException:
            self.close()
            raise

    @property
    def pending(self) -> bool:
        """Are there maps of other versions? Then nothing is to be attached before ours hold all
        that our programs need; what is attached goes on with the others meanwhile."""
        return bool(self.others)

    def settle(self) -> None:
        """All programs are attached, and nothing uses the maps of other versions any more."""
        for pin in self.others:
            pin.path.unlink(missing_ok=True)
        self.others = []
        self.tidy()

    def tidy(self) -> int:
        """Unpin links whose interface or cgroup is gone, and those of programs that are none of
        ours (of a later version, after a downgrade). Returns how many."""
        if self.pending:
            return 0
        count = 0
        known = {*self.object.programs, *_EDGE}
        for name, info in links.links_in(str(self.links)).items():
            program = name if name in known else name.partition("-")[0]
            severed = info.ifindex == 0 and info.cgroup_id == 0
            if severed or program not in known:
                count += links.remove(str(self.links / name))
        return count

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

    def attach_net(self, name: str, ifindex: int) -> None:
        """from_net and to_net on a network card."""
        for program, direction in _AT_CARDS:
            path = self.links / f"{program}-{name}"
            links.attach_tcx(self.object.prog_fd(program), ifindex, direction, str(path)).close()

    def detach_net(self, name: str) -> None:
        """Remove a card's links. Nothing there is success."""
        for program, _ in _AT_CARDS:
            links.remove(str(self.links / f"{program}-{name}"))

    def attach_cgroup(self, cgroup: Path) -> None:
        """The socket programs on the node's cgroup."""
        for name, section in self.object.programs.items():
            if section.startswith("cgroup/"):
                fd = self.object.prog_fd(name)
                links.attach_cgroup(fd, str(cgroup), section, str(self.links / name)).close()

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

    def _set_aside(self) -> None:
        """Where some pins of maps that are read together are missing (an agent ended while it
        pinned, or somebody removed one), the others are not ours either."""
        for group in TOGETHER:
            paths = [self.pins / self.names[name] for name in group]
            there = [path for path in paths if path.exists()]
            if len(there) < len(paths):
                for path in there:
                    log.warning("%s is not whole any more and will be made anew", path)
                    path.rename(path.with_name(f"{path.name}-incomplete"))

    def _reuse(self, wanted: dict[str, int]) -> dict[str, int]:
        """Take over the maps of this version; make the others as large as those of another
        version, or as `wanted`. Returns the elements of each map in `wanted`."""
        entries = wanted | self._sizes_of_others(wanted)
        entries["flow_tags"] = flow_tags(entries["flows"])
        for name, pin in self.names.items():
            path = self.pins / pin
            if path.exists():
                fd = syscall.obj_get(str(path))
                try:
                    self.object.reuse_map(name, fd)
                    if name in wanted:
                        entries[name] = syscall.map_info(fd).max_entries
                finally:
                    os.close(fd)
            elif name in wanted:
                self.object.set_max_entries(name, entries[name])
        return entries

    def _sizes_of_others(self, wanted: Iterable[str]) -> dict[str, int]:
        found: dict[str, int] = {}
        for pin in other_pins(self.pins, self.names):
            if pin.name in wanted:
                fd = syscall.obj_get(str(pin.path))
                try:
                    found[pin.name] = max(found.get(pin.name, 0), syscall.map_info(fd).max_entries)
                finally:
                    os.close(fd)
        return found
