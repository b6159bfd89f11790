"""Our programs on pods' links, first of all that run there.

They are filters (`lockgate.net.filters` says why). A tcx program of somebody else runs before
any filter, and what it passes or redirects ours would never see. Where there is one, or another
filter came before ours, our program goes in front of all as a tcx link, whose pin is
`links/PROGRAM-SLOT`, and the filter goes, so that nothing is judged twice; when the other has
gone, it is a filter again. Programs of others are never detached.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path

from lockgate.bpf import links, syscall
from lockgate.bpf.object import Object
from lockgate.net import filters
from lockgate.net.filters import Direction, Programs

__all__ = ["Guard", "Place"]


@dataclass(frozen=True, slots=True)
class Place:
    """What runs at one direction of a link: ids of the tcx programs in their order, that of the
    program in our filter (0: none), and whether that is the first filter."""

    tcx: tuple[int, ...]
    filter: int
    first: bool

    def guarded(self, mine: int) -> bool:
        """Does our program run before all others?"""
        if self.tcx:
            return self.tcx[0] == mine
        return self.filter == mine and self.first

    def settled(self, mine: int) -> bool:
        """Does it so once, and as a link only where it must be one?"""
        if mine in self.tcx:
            return self.tcx[0] == mine and len(self.tcx) > 1 and not self.filter
        return self.guarded(mine)


class Guard:
    """Of one agent's programs; pins in `pins`. In the network namespace of the calling thread."""

    def __init__(self, object_: Object, pins: Path) -> None:
        self._pins = pins
        # to_pod first: whoever may send into the pod is judged before the pod may speak.
        self.programs: Programs = {
            "egress": ("to_pod", object_.prog_fd("to_pod")),
            "ingress": ("from_pod", object_.prog_fd("from_pod")),
        }
        self._ids = {
            direction: syscall.prog_info(fd).id for direction, (_, fd) in self.programs.items()
        }

    def missing(self, ifindex: int) -> list[str]:
        """Names of programs that are not where they should be. OSError with ENODEV if there is
        no interface."""
        return [
            name
            for direction, (name, _) in self.programs.items()
            if not self._look(ifindex, direction).guarded(self._ids[direction])
        ]

    def disturbed(self, ifindex: int) -> bool:
        """Is there anything to settle? OSError with ENODEV if there is no interface."""
        return not all(
            self._look(ifindex, direction).settled(mine) for direction, mine in self._ids.items()
        )

    def take_over(self, slot: int, ifindex: int) -> None:
        """Our programs in place of an earlier agent's, as filters or links, without a gap."""
        for direction, (name, fd) in self.programs.items():
            pinned = links.open_link(str(self._pin(name, slot)))
            if pinned is not None:
                pinned.close()
                links.attach_tcx(fd, ifindex, direction, str(self._pin(name, slot))).close()
        self.settle(slot, ifindex)

    def settle(self, slot: int, ifindex: int) -> list[str]:
        """Put our programs first. Returns what had to be done, one clause each ("put program
        from_pod back"). OSError when something resists; ENODEV if there is no interface."""
        return [
            text for direction in self.programs for text in self._settle(slot, ifindex, direction)
        ]

    def forget(self, slots: list[int]) -> None:
        """Unpin the links of slots whose interfaces have gone."""
        for slot in slots:
            for name, _ in self.programs.values():
                with contextlib.suppress(FileNotFoundError):
                    self._pin(name, slot).unlink()

    def others(self, ifindex: int) -> list[str]:
        """Programs of others that run in tcx, as "NAME (id N, tcx ingress)"."""
        return [
            f"{links.program_name(one)} (id {one}, tcx {direction})"
            for direction in self.programs
            for one in links.tcx_programs(ifindex, direction)
            if one != self._ids[direction]
        ]

    # ---- Inside ----------------------------------------------------------------------

    def _settle(self, slot: int, ifindex: int, direction: Direction) -> list[str]:
        name, fd = self.programs[direction]
        mine = self._ids[direction]
        place = self._look(ifindex, direction)
        if place.settled(mine):
            return []
        told = []
        ours = {direction: (name, fd)}
        path = str(self._pin(name, slot))
        if set(place.tcx) <= {mine}:
            if place.filter != mine:
                with contextlib.suppress(OSError):
                    # Others may have left no room for it; then it is a link below.
                    filters.put(ifindex, ours)
                    told.append(f"put program {name} back")
            place = self._look(ifindex, direction)
            if place.filter == mine and place.first:
                links.remove(path)
                return told if mine not in place.tcx else [f"made program {name} a filter again"]
        if mine in place.tcx and place.tcx[0] != mine:
            # To be moved it must go; the filter judges meanwhile.
            with contextlib.suppress(OSError):
                filters.put(ifindex, ours)
            links.remove(path)
            place = self._look(ifindex, direction)
        if mine not in place.tcx:
            links.attach_tcx(fd, ifindex, direction, path, first=True).close()
            told.append(f"put program {name} in front of others")
        if place.filter:
            filters.remove(ifindex, direction)
        return told

    def _pin(self, program: str, slot: int) -> Path:
        return self._pins / f"{program}-{slot}"

    def _look(self, ifindex: int, direction: Direction) -> Place:
        program, first = filters.seat(ifindex, direction)
        if program == self._ids["ingress" if direction == "egress" else "egress"]:
            # Somebody made the clsact an `ingress` qdisc, which shows its filters for both.
            program = 0
        return Place(tuple(links.tcx_programs(ifindex, direction)), program, first)
