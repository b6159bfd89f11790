"""XDP's object over the maps of a `World`: frames in, verdicts and frames out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from lockgate.bpf import clock, syscall
from lockgate.bpf.object import Object
from tests.bytecode.world import CARD_MAC, OUTSIDE, UNDERLAY, Outcome, World, mac_bytes

OBJECT = Path(__file__).parents[2] / "build" / "lockgate-xdp.bpf.o"
DROP, PASS, TX, REDIRECT = 1, 2, 3, 4  # enum xdp_action
_NATIVE = 1 << 2  # XDP_FLAGS_DRV_MODE


class Edge:
    """The program `program` of an object that shares the world's maps, with `constants`."""

    def __init__(
        self,
        world: World,
        constants: Mapping[str, Any] | None = None,
        path: Path = OBJECT,
        program: str = "xdp_net",
    ) -> None:
        self.world, self.program = world, program
        self.object = Object(path)
        self.object.share_maps(world.object)
        own: dict[str, Any] = {}
        if program in ("xdp_net", "xdp_generic"):
            macs = [int.from_bytes(mac_bytes(CARD_MAC), "little"), *[0] * 7]
            own = {"config_macs": macs, **clock.constants()}
        self.object.set_rodata({**own, **(constants or {})})
        self.object.load()

    def close(self) -> None:
        self.object.close()

    def __enter__(self) -> Edge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, frame: bytes, ifindex: int) -> Outcome:
        """One frame, as it comes by the interface; call it `inside` the world and while the
        interfaces are `awake`."""
        frame = bytes(frame)
        result = syscall.prog_test_run(
            self.object.prog_fd(self.program),
            frame,
            syscall.xdp_context(len(frame), ifindex),
            name=self.program,
        )
        return Outcome(result.retval, result.data, (), self.world.events())


@contextlib.contextmanager
def awake(edge: Edge) -> Iterator[None]:
    """The kernel lets test runs name an interface only while it has XDP in use; a veth does while
    a program is attached."""
    links = [
        syscall.link_create(
            edge.object.prog_fd(edge.program), ifindex, syscall.AttachType.XDP, flags=_NATIVE
        )
        for ifindex in (UNDERLAY, OUTSIDE)
    ]
    try:
        yield
    finally:
        for link in links:
            os.close(link)
