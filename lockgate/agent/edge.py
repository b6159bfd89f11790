"""XDP at the cards that clients outside come by: loaded and attached while something needs it.

It is a shortcut past the stack, and the firewall in front of it. Where it is not, from_net does
the same by itself, but for the firewall. Programs of others are never touched.

Pins: the links in `links/`, as all links; what maps XDP has beside those of the other object in
`xdp/`, by name and layout, as long as it is loaded.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from lockgate.agent.cards import Card, Cards
from lockgate.agent.datapath import Datapath
from lockgate.bpf import links, syscall
from lockgate.bpf.links import XdpMode, attach_xdp
from lockgate.bpf.object import LoadError, Object
from lockgate.bpf.pins import map_version
from lockgate.compile.tables import (
    SVC_FRONTEND,
    SVC_HOST_ONLY,
    SVC_LOCAL,
    SVC_SNAT,
    ServiceKey,
    ServiceView,
    Tables,
)
from lockgate.net import xdp

__all__ = ["Edge", "Place", "Setting", "places"]

log = logging.getLogger(__name__)

Setting = Literal["auto", "native", "generic", "off"]
#: As which a card's link is pinned.
_PIN = "xdp_net"
_PROGRAMS: dict[XdpMode, str] = {"native": "xdp_net", "generic": "xdp_generic"}
#: What drivers say when they can't as things are: no XDP, or not with this MTU, these queues, …
_REFUSALS = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOMEM, errno.ERANGE, errno.ENOSPC)
#: Another program is there: of the same mode, or of another.
_TAKEN = (errno.EBUSY, errno.EEXIST)


@dataclass(frozen=True, slots=True)
class Place:
    """How XDP is to run at a card (None: not at all), and why."""

    mode: XdpMode | None
    why: str = ""
    #: Clients come by it; else it is only there so that others can send by it.
    faces_clients: bool = True


def places(
    cards: Cards, setting: Setting, balance: bool, firewall: bool, ours: Mapping[str, int]
) -> dict[str, Place]:
    """By name of each card. What needs it: the balancer, the firewall. `ours`: ids of our programs
    that are attached, by card."""
    outside = {card.index for card in (cards.outside, cards.outside6) if card is not None}
    if outside:
        outside |= {card.index for card in cards.others}
    underlay = {card.index for card in (cards.underlay, cards.underlay2) if card is not None}
    found = {}
    for card in cards.all:
        if setting == "off":
            place = Place(None, "switched off")
        elif not balance and not firewall:
            place = Place(None, "nothing needs it")
        elif card.xdp.program not in (0, ours.get(card.name)):
            place = Place(None, f"another program is there: {_title(card.xdp.program)}")
        elif outside and card.index not in outside:
            place = _sender(card, setting, balance)
        else:
            place = _place(card, setting, card.index in underlay, balance)
        found[card.name] = place
    return found


def _sender(card: Card, setting: Setting, balance: bool) -> Place:
    """At a card that leads to other nodes only. Many drivers send what other cards' programs
    redirect only while they have a program of their own."""
    if balance and setting != "generic" and _native(card) and not _is_veth(card):
        return Place("native", "what comes by other cards leaves by it", faces_clients=False)
    return Place(None, "clients come by another card")


def _place(card: Card, setting: Setting, underlay: bool, balance: bool) -> Place:
    if setting == "generic":
        return Place("generic", "as the settings say")
    if setting == "auto" and not _native(card):
        return Place("generic", "the driver has no XDP")
    if setting == "auto" and _is_veth(card) and underlay:
        return Place("generic", "native, the other end would have to cut what it sends")
    if setting == "auto" and _is_veth(card) and balance:
        # A sender at the other end leaves checksums to the card, which a veth never makes; what
        # native XDP redirects is no more known to lack them (veth_xdp_rcv_skb).
        return Place("generic", "native, what it sends on would lack checksums")
    return Place("native")


def _native(card: Card) -> bool:
    return bool(card.xdp.features & xdp.BASIC)


def _is_veth(card: Card) -> bool:
    return card.xdp.kind == "veth"


def _title(program: int) -> str:
    return f"{links.program_name(program)} (id {program})"


#: CARD_MACS of bpf/dsr.h.
_MACS = 8


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a program that is loaded does."""

    balance: bool
    firewall: bool
    generic: bool
    #: Elements of the firewall's maps; those that are pinned are taken if they have as many.
    sizes: tuple[tuple[str, int], ...] = ()
    #: Those of the cards.
    macs: tuple[bytes, ...] = ()

    def constants(self) -> dict[str, Any]:
        macs = [int.from_bytes(mac, "little") for mac in self.macs]
        return {
            "config_balance": int(self.balance),
            "config_firewall": int(self.firewall),
            "config_generic": int(self.generic),
            "config_macs": [*macs, *[0] * _MACS][:_MACS],
        }


class Edge:
    """For one agent; all blocks. In the node's network namespace, from the agent's worker."""

    def __init__(self, dp: Datapath, path: Path, setting: Setting) -> None:
        """`path` of the object."""
        self._dp, self._path, self._setting = dp, path, setting
        self._pins = dp.pins / "xdp"
        self._objects: dict[_Kind, Object] = {}
        #: By card: its index, the mode and the kind of program there.
        self._attached: dict[str, tuple[int, XdpMode, _Kind]] = {}
        #: Cards whose driver refused native XDP, by name → index and why.
        self._refused: dict[str, tuple[int, str]] = {}
        self._frontends: set[ServiceKey] = set()
        self._serial = 0
        self._alone = True
        self._macs: tuple[bytes, ...] = ()
        #: What was needed when it was settled last.
        self._settled_for: tuple[bool, tuple[tuple[str, int], ...] | None] | None = None
        #: There is a firewall; its tables are `sizes` large (lockgate/agent/firewall_maps.py).
        self.firewall = False
        self.sizes: dict[str, int] = {}
        #: By card.
        self.places: dict[str, Place] = {}
        self.errors: list[str] = []

    # ---- What needs it -----------------------------------------------------------------

    @property
    def balance(self) -> bool:
        """Are there frontends by DSR, and other nodes that share a link with this one?"""
        return bool(self._frontends) and not self._alone

    def follow(self, tables: Tables, alone: bool) -> None:
        """The services in force are those of `tables`; `alone`: no other node shares a
        link with this one."""
        self._alone = alone
        delta = tables.delta
        if delta is None or delta.base != self._serial:
            self._frontends = {key for key, view in tables.services.items() if _wants(view)}
        else:
            for key in delta.services:
                view = tables.services.get(key)
                if view is not None and _wants(view):
                    self._frontends.add(key)
                else:
                    self._frontends.discard(key)
        self._serial = tables.serial

    @property
    def due(self) -> bool:
        """Is anything else needed than when it was settled?"""
        return self._settled_for != self._needs

    @property
    def _needs(self) -> tuple[bool, tuple[tuple[str, int], ...] | None]:
        return self.balance, tuple(self.sizes.items()) if self.firewall else None

    def object(self) -> Object:
        """One that has the firewall's maps, as large as `sizes` says, loaded if need be. They are
        pinned, and no card uses them before `settle`. LoadError."""
        have = self._with_firewall(tuple(self.sizes.items()))
        return have or self._load(self._kind("native"))

    def pinned_size(self, name: str) -> int:
        """Elements of a map of XDP's own as it is pinned, of this layout; 0 if it is not."""
        with Object(self._path) as made:
            pin = self._pins / f"{name}-{map_version(made.schema, name)}"
        try:
            fd = syscall.obj_get(str(pin))
        except OSError:
            return 0
        try:
            return syscall.map_info(fd).max_entries
        finally:
            os.close(fd)

    # ---- Attaching -----------------------------------------------------------------------

    def settle(self, cards: Cards) -> None:
        """Have it where it is to be, and nowhere else."""
        needs = self.balance, self.firewall
        self._settled_for, self.errors = self._needs, []
        self._macs = tuple(sorted({card.mac for card in cards.all})[:_MACS])
        ours = self._ours(cards)
        wanted = places(cards, self._setting, *needs, ours)
        for name in self._pinned() - {name for name, place in wanted.items() if place.mode}:
            links.remove(str(self._pin(name)))
            self._attached.pop(name, None)
            log.info("XDP: taken away from %s", name)
        for card in cards.all:
            place = wanted[card.name]
            if place.mode is not None:
                place = self._attach(card, place, card.name in ours)
            if place != self.places.get(card.name) and any(needs):
                log.info("XDP at %s: %s%s", card.name, place.mode or "none", _because(place.why))
            self.places[card.name] = place
        for name in self.places.keys() - wanted.keys():
            del self.places[name]
        self._release()

    def close(self) -> None:
        """Close descriptors; nothing is detached."""
        for one in self._objects.values():
            one.close()
        self._objects = {}

    # ---- Inside --------------------------------------------------------------------------

    def _attach(self, card: Card, place: Place, ours: bool) -> Place:
        refused = self._refused.get(card.name)
        if place.mode == "native" and self._setting == "auto" and refused:
            if refused[0] == card.index:
                place = replace(place, mode="generic", why=refused[1])
            else:
                del self._refused[card.name]
        mode = place.mode
        assert mode is not None
        kind = self._kind(mode, place.faces_clients)
        if ours and self._attached.get(card.name) == (card.index, mode, kind):
            return place
        try:
            fd = (self._objects.get(kind) or self._load(kind)).prog_fd(_PROGRAMS[mode])
            anew = ours and card.xdp.mode != mode
            attach_xdp(fd, card.index, mode, str(self._pin(card.name)), anew=anew).close()
        except LoadError as error:
            self.errors.append(str(error))
            return Place(None, "the program does not load")
        except OSError as error:
            self._attached.pop(card.name, None)
            why = os.strerror(error.errno or 0)
            if error.errno in _TAKEN:
                return Place(None, "another program is there")
            if mode == "native" and self._setting == "auto" and error.errno in _REFUSALS:
                self._refused[card.name] = card.index, f"the driver refuses it: {why}"
                return self._attach(card, place, ours)
            self.errors.append(f"XDP can't be attached to {card.name}: {why}")
            return Place(None, why)
        self._attached[card.name] = card.index, mode, kind
        return place

    def _kind(self, mode: XdpMode, faces_clients: bool = True) -> _Kind:
        firewall = self.firewall and faces_clients
        sizes = tuple(self.sizes.items()) if firewall else ()
        return _Kind(self.balance, firewall, mode == "generic", sizes, self._macs)

    def _load(self, kind: _Kind) -> Object:
        made = Object(self._path)
        try:
            made.share_maps(self._dp.object)
            # Without a firewall its maps are one element each, and nobody's.
            pins = {
                name: self._pins / f"{name}-{map_version(made.schema, name)}"
                for name, _ in kind.sizes
            }
            for name, size in kind.sizes:
                made.set_max_entries(name, size)
            pinned = self._share_firewall(made, kind, pins)
            known = made.schema.variables(".rodata")
            made.set_rodata({k: v for k, v in self._dp.constants.items() if k in known})
            made.set_rodata(kind.constants())
            made.skip_program(_PROGRAMS["native" if kind.generic else "generic"])
            made.load()
            if pins and not pinned:
                self._pin_firewall(made, pins)
        except BaseException:
            made.close()
            raise
        self._objects[kind] = made
        return made

    def _with_firewall(self, sizes: tuple[tuple[str, int], ...]) -> Object | None:
        """One that is loaded and has the firewall's maps of these sizes."""
        have = (one for kind, one in self._objects.items() if kind.firewall and kind.sizes == sizes)
        return next(have, None)

    def _share_firewall(self, made: Object, kind: _Kind, pins: Mapping[str, Path]) -> bool:
        """Have it use the firewall's maps of another program, else those that are pinned: all of
        them or none, for what one says is of the others. Whether they are pinned."""
        if kind.firewall and (have := self._with_firewall(kind.sizes)):
            for name in pins:
                made.reuse_map(name, have.map_fd(name))
            return False
        fds: dict[str, int] = {}
        try:
            for name, size in kind.sizes:
                try:
                    fds[name] = syscall.obj_get(str(pins[name]))
                except FileNotFoundError:
                    return False
                if syscall.map_info(fds[name]).max_entries != size:
                    return False
            for name, fd in fds.items():
                made.reuse_map(name, fd)
            return True
        finally:
            for fd in fds.values():
                os.close(fd)

    def _pin_firewall(self, made: Object, pins: Mapping[str, Path]) -> None:
        """Instead of what is pinned there: of other sizes or layouts."""
        self._pins.mkdir(exist_ok=True)
        for path in self._pins.iterdir():
            path.unlink()
        for name, path in pins.items():
            syscall.obj_pin(made.map_fd(name), str(path))

    def _release(self) -> None:
        """Close what no card needs. While there is a firewall its maps stay, by their pins."""
        used = {kind for _, _, kind in self._attached.values()}
        for kind in self._objects.keys() - used:
            self._objects.pop(kind).close()
        if not self.firewall:
            shutil.rmtree(self._pins, ignore_errors=True)

    def _ours(self, cards: Cards) -> dict[str, int]:
        """Ids of our programs where they are attached."""
        found = {}
        for card in cards.all:
            link = links.open_link(str(self._pin(card.name)))
            if link is not None:
                with link:
                    info = link.info
                if info.ifindex == card.index:
                    found[card.name] = info.prog_id
        return found

    def _pinned(self) -> set[str]:
        prefix = f"{_PIN}-"
        return {
            name.removeprefix(prefix)
            for name in os.listdir(self._dp.links)
            if name.startswith(prefix)
        }

    def _pin(self, card: str) -> Path:
        return self._dp.links / f"{_PIN}-{card}"


def _wants(view: ServiceView) -> bool:
    """Has XDP anything to do for it? See dsr_frontend() in bpf/dsr.h; SVC_LOCAL stays here."""
    flags = view.flags & (SVC_FRONTEND | SVC_SNAT | SVC_LOCAL | SVC_HOST_ONLY)
    return flags == SVC_FRONTEND and view.owner_count > 0 and not view.affinity


def _because(why: str) -> str:
    return f" ({why})" if why else ""
