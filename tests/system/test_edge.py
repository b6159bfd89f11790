"""XDP at the cards of a node: there while it is needed, taken over, never in place of others."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import struct
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockgate.agent import edge as edge_module
from lockgate.agent.cards import Cards, read_cards
from lockgate.agent.datapath import Datapath
from lockgate.agent.edge import Edge, Setting
from lockgate.agent.flows import Flows
from lockgate.agent.publish import Publisher
from lockgate.agent.sizes import Sizes
from lockgate.bpf import links, syscall
from lockgate.compile.tables import (
    SVC_FRONTEND,
    SVC_LOCAL,
    SVC_PRESENT,
    SVC_SNAT,
    ServiceView,
    Tables,
)
from lockgate.net import namespaces, xdp
from lockgate.objects.address import parse_address
from lockgate.paths import bpf_object, xdp_object

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

SIZES = Sizes(1024, 1024, 1024, 1024, 1024)
FRONTEND, BACKEND = "203.0.113.80", "10.0.2.2"
#: r0 = XDP_PASS; exit
PASS = struct.pack("<BBhi", 0xB7, 0, 0, 2) + struct.pack("<BBhi", 0x95, 0, 0, 0)
XDP = 6  # enum bpf_prog_type
HOP, HOP_MAC, HOP_XDP = 8, 1, 16


class Node:
    """Two cards, `outside0` and `underlay0`, whose other ends are `world` and `others` in a
    namespace of their own; and a bridge `old0`, which has no driver."""

    def __init__(self) -> None:
        self.name, self.far = (f"lg-{what}-{os.getpid()}" for what in ("edge", "far"))
        self.pins = Path("/sys/fs/bpf/lockgate", self.name)
        for name in (self.name, self.far):
            namespaces.create(name)
        for card, end in (("outside0", "world"), ("underlay0", "others")):
            self._ip(f"link add {card} type veth peer name {end} netns {self.far}")
            self._ip(f"link set {card} up")
            self._ip(f"link set {end} up", self.far)
        self._ip("link add old0 type bridge")
        self._ip("link set old0 up")

    def close(self) -> None:
        for name in (self.name, self.far):
            namespaces.delete(name)
        shutil.rmtree(self.pins, ignore_errors=True)

    def _ip(self, command: str, where: str = "") -> None:
        subprocess.run(["ip", "-n", where or self.name, *command.split()], check=True)

    def remove(self, card: str) -> None:
        self._ip(f"link del {card}")

    def add(self, card: str) -> None:
        self._ip(f"link add {card} type veth peer name {card}-end")
        self._ip(f"link set {card} up")

    def cards(self, underlay: str = "underlay0", outside: str = "outside0") -> Cards:
        """The veth to the world stands for hardware: as one it would have generic XDP."""
        found = read_cards(underlay, outside)
        card = found.outside
        if card is None or card.xdp.kind != "veth":
            return found
        return replace(found, outside=replace(card, xdp=replace(card.xdp, kind="")))

    def there(self, card: str) -> tuple[str, int]:
        """Mode and id of the program at a card, as the kernel has it."""
        state = xdp.state(socket.if_nametoindex(card))
        return state.mode, state.program

    def pinned(self) -> list[str]:
        return sorted(os.listdir(self.pins / "links"))


@pytest.fixture
def node() -> Iterator[Node]:
    made = Node()
    try:
        with namespaces.inside(namespaces.path_of(made.name)):
            yield made
    finally:
        made.close()


class Agent:
    """What of an agent has to do with XDP."""

    def __init__(self, node: Node, setting: Setting = "auto") -> None:
        self.dp = Datapath(bpf_object(), node.pins, SIZES, flows=Flows())
        self.edge = Edge(self.dp, xdp_object(), setting)
        self.publisher = Publisher(self.dp)

    def __enter__(self) -> Agent:
        return self

    def __exit__(self, *_: object) -> None:
        self.edge.close()
        self.dp.close()

    def serve(self, cards: Cards, flags: int | None = SVC_FRONTEND) -> None:
        """A state in force with a frontend of those flags, or none."""
        self.edge.follow(_tables(flags), alone=False)
        self.edge.settle(cards)

    def forward(self, cards: Cards) -> None:
        """The same with a backend behind the underlay, if XDP can send there."""
        hops = np.zeros(len(self.dp.hops), self.dp.object.schema.dtype("hop_view"))
        hop, card = hops[HOP], cards.underlay
        assert card is not None
        sends = HOP_XDP if card.xdp.features & xdp.NDO_XMIT else 0
        hop["ifindex"], hop["flags"], hop["mtu"] = card.index, HOP_MAC | sends, card.mtu
        hop["dmac"], hop["smac"] = np.frombuffer(b"\2\0\0\0\0\1\2\0\0\0\0\2", "u1").reshape(2, 6)
        tables = _tables(SVC_FRONTEND)
        self.publisher.publish(tables, {}, hops)
        self.edge.follow(tables, alone=False)
        self.edge.settle(cards)


def _tables(flags: int | None) -> Tables:
    start = 49152
    tables = Tables(np.zeros(start + 8, np.uint64))
    if flags is not None:
        address = parse_address(BACKEND)
        owner = np.frombuffer(
            address + struct.pack("!H", 8080) + struct.pack("<HI", 0, 2 << 28 | HOP)
        )
        tables.image[start + 1 : start + 4] = owner.view("<u8")
        tables.image[start + 4] = 0b11111100
        view = ServiceView(5, 0, 0, SVC_PRESENT | flags, 0, start + 4, start + 1, 0, 2, 1)
        tables.services[parse_address(FRONTEND), 80, 6] = view
    return tables


NONE = ("", 0)


def test_it_is_there_while_a_frontend_needs_it(node: Node) -> None:
    with Agent(node) as agent:
        for flags, wanted in (
            (None, False),
            (SVC_FRONTEND, True),
            (SVC_FRONTEND | SVC_SNAT, False),
            (SVC_FRONTEND | SVC_LOCAL, False),
            (0, False),
            (SVC_FRONTEND, True),
            (None, False),
        ):
            agent.serve(node.cards(), flags)
            assert node.there("outside0")[0] == ("native" if wanted else ""), flags
            assert node.pinned() == (["xdp_net-outside0"] if wanted else [])
            assert node.there("underlay0") == NONE
            assert agent.edge.places["underlay0"].mode is None
            assert not agent.edge.due
        assert agent.edge.errors == []


def test_the_only_node_needs_none(node: Node) -> None:
    with Agent(node) as agent:
        agent.edge.follow(_tables(SVC_FRONTEND), alone=True)
        agent.edge.settle(node.cards())
        assert node.there("outside0") == NONE
        agent.edge.follow(_tables(SVC_FRONTEND), alone=False)
        assert agent.edge.due


def test_the_firewall_needs_it_too_and_is_switched_without_a_gap(node: Node) -> None:
    with Agent(node) as agent:
        agent.edge.firewall = True
        agent.serve(node.cards(), None)
        mode, first = node.there("outside0")
        assert mode == "native"
        link = link_of(node, "outside0")
        agent.serve(node.cards())
        agent.edge.firewall = False
        assert agent.edge.due
        agent.serve(node.cards())
        assert node.there("outside0")[1] != first
        assert link_of(node, "outside0") == link, "the same link with another program"


def link_of(node: Node, card: str) -> int:
    link = links.open_link(str(node.pins / "links" / f"xdp_net-{card}"))
    assert link is not None
    with link:
        return link.info.id


def test_the_next_agent_takes_it_over(node: Node) -> None:
    with Agent(node) as first:
        first.serve(node.cards())
        mode, program = node.there("outside0")
    assert node.there("outside0") == (mode, program), "it works on without an agent"
    link = link_of(node, "outside0")
    with Agent(node) as second:
        assert second.dp.tidy() == 0
        assert node.there("outside0") == (mode, program), "until it is known what is needed"
        second.serve(node.cards())
        assert node.there("outside0")[0] == mode and node.there("outside0")[1] != program
        assert link_of(node, "outside0") == link
    with Agent(node) as third:
        third.serve(node.cards(), None)
        assert node.there("outside0") == NONE and node.pinned() == []


def test_another_mode_is_another_link(node: Node) -> None:
    for setting, wanted in (("auto", "native"), ("generic", "generic"), ("native", "native")):
        with Agent(node, setting) as agent:  # type: ignore[arg-type]
            agent.serve(node.cards())
            assert node.there("outside0")[0] == wanted
    with Agent(node, "off") as agent:
        agent.serve(node.cards())
        assert node.there("outside0") == NONE and node.pinned() == []


def test_a_program_of_others_stays_and_is_named(node: Node) -> None:
    index = socket.if_nametoindex("outside0")
    program = syscall.prog_load(XDP, PASS, "guest")
    guest = syscall.link_create(program, index, syscall.AttachType.XDP, flags=1 << 1)
    number = syscall.prog_info(program).id
    with Agent(node) as agent:
        for _ in range(2):
            agent.serve(node.cards())
            assert node.there("outside0") == ("generic", number)
            place = agent.edge.places["outside0"]
            assert (place.mode, place.why) == (
                None,
                f"another program is there: guest (id {number})",
            )
            assert agent.edge.errors == []
        os.close(guest)
        os.close(program)
        agent.serve(node.cards())
        assert node.there("outside0")[0] == "native"


def test_one_that_comes_while_we_look_stays_as_well(node: Node) -> None:
    cards = node.cards()
    index = socket.if_nametoindex("outside0")
    program = syscall.prog_load(XDP, PASS, "guest")
    guest = syscall.link_create(program, index, syscall.AttachType.XDP, flags=1 << 2)
    with Agent(node) as agent:
        agent.serve(cards)
        assert agent.edge.places["outside0"].why == "another program is there"
        assert node.there("outside0")[1] == syscall.prog_info(program).id
    os.close(guest)
    os.close(program)


def test_a_card_without_a_driver_for_it_has_it_generic(node: Node) -> None:
    with Agent(node) as agent:
        agent.serve(node.cards(outside="old0"))
        assert node.there("old0")[0] == "generic"
        assert agent.edge.places["old0"].why == "the driver has no XDP"
    with Agent(node, "native") as agent:
        agent.serve(node.cards(outside="old0"))
        assert len(agent.edge.errors) == 1 and "old0" in agent.edge.errors[0]


def test_a_driver_that_refuses_is_not_asked_again(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def refusing(fd: int, index: int, mode: str, path: str, **more: Any) -> links.Link:
        asked.append(mode)
        if mode == "native":
            raise OSError(errno.EOPNOTSUPP, "no")
        return links.attach_xdp(fd, index, "generic", path, **more)

    with Agent(node) as agent:
        with monkeypatch.context() as patch:
            patch.setattr(edge_module, "attach_xdp", refusing)
            for _ in range(2):
                agent.serve(node.cards())
                agent.edge.firewall = not agent.edge.firewall
        assert asked == ["native", "generic", "generic"]
        assert node.there("outside0")[0] == "generic"
        assert "refuses" in agent.edge.places["outside0"].why


def test_cards_come_and_go(node: Node) -> None:
    with Agent(node) as agent:
        agent.serve(node.cards())
        node.remove("outside0")
        agent.serve(node.cards())
        assert node.pinned() == ["xdp_net-underlay0"], "now it faces clients"
        assert node.there("underlay0")[0] == "generic"
        node.add("outside0")
        agent.serve(node.cards())
        assert node.pinned() == ["xdp_net-outside0"]
        assert node.there("outside0")[0] == "native" and node.there("underlay0") == NONE
        node.remove("outside0")
        node.add("outside0")  # another of the same name
        agent.serve(node.cards())
        assert node.there("outside0")[0] == "native"


def test_a_severed_link_is_unpinned(node: Node) -> None:
    with Agent(node) as agent:
        agent.serve(node.cards())
    node.remove("outside0")
    with Agent(node) as agent:
        assert agent.dp.tidy() == 1 and node.pinned() == []


def frame(mac: bytes = bytes(6)) -> bytes:
    head = mac + b"\2\0\0\0\0\xaa" + b"\x08\x00"
    addresses = socket.inet_aton("198.51.100.7") + socket.inet_aton(FRONTEND)
    ip = struct.pack("!BBHHHBBH", 0x45, 0, 40, 0, 0, 64, 6, 0) + addresses
    return head + ip + struct.pack("!HHIIBBHHH", 40000, 80, 1, 0, 0x50, 2, 1000, 0, 0)


def arrives(node: Node, to: str) -> Sequence[bytes]:
    """What comes out at the other end of a card when the frame was sent into another's."""
    card = node.cards().outside
    assert card is not None
    with namespaces.inside(namespaces.path_of(node.far)):
        every = socket.htons(3)
        with (
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, every) as world,
            socket.socket(socket.AF_PACKET, socket.SOCK_RAW, every) as others,
        ):
            world.bind(("world", 3))
            others.bind((to, 3))
            others.settimeout(1)
            found = []
            world.send(frame(card.mac))
            try:
                while True:
                    data = others.recv(2048)
                    if data[12:14] == b"\x08\x00":
                        found.append(data)
            except TimeoutError:
                return found


def test_what_it_redirects_arrives(node: Node) -> None:
    """A veth takes it where its other end joins what it receives; elsewhere XDP leaves the packet
    to the stack, which knows no such address here."""
    with Agent(node) as agent:
        agent.forward(node.cards())
        assert arrives(node, "others") == []
        balanced = agent.dp.object.schema.enum("counter")["COUNT_BALANCED"]
        assert agent.dp.counters.values().sum(axis=1)[balanced] == 0
        with namespaces.inside(namespaces.path_of(node.far)):
            xdp.use_gro("others")
        agent.forward(node.cards())
        (found,) = arrives(node, "others")
        assert found[:12] == b"\2\0\0\0\0\1\2\0\0\0\0\2"
        assert found[23] == 4 and found[30:34] == socket.inet_aton(BACKEND)
        inner = found[34:]
        assert inner[8] == 63 and inner[12:20] == frame()[26:34]
        assert agent.dp.counters.values().sum(axis=1)[balanced] == 1


def test_generic_xdp_sends_by_any_card(node: Node) -> None:
    with Agent(node, "generic") as agent:
        agent.forward(node.cards())
        assert len(arrives(node, "others")) == 1
