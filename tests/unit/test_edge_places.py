"""Where XDP is to run, and how, by what the cards are and what needs it."""

from __future__ import annotations

from typing import Any

import pytest

from lockgate.agent.cards import Card, Cards
from lockgate.agent.edge import Place, places
from lockgate.net.xdp import BASIC, NDO_XMIT, State

CAN = BASIC | NDO_XMIT
OURS, OTHERS = 7, 8


def card(name: str, index: int = 2, **xdp: Any) -> Card:
    return Card(name, index, bytes(6), 1500, xdp=State(**{"features": CAN, **xdp}))


def two(outside: dict[str, Any], underlay: dict[str, Any]) -> Cards:
    return Cards(card("eth1", 3, **underlay), card("eth0", **outside))


def one(**xdp: Any) -> Cards:
    return Cards(card("eth0", **xdp), None)


VETH: dict[str, Any] = {"kind": "veth"}
NATIVE = Place("native")
ELSEWHERE = Place(None, "clients come by another card")
SENDS = Place("native", "what comes by other cards leaves by it", faces_clients=False)
CASES: dict[str, tuple[Cards, dict[str, Any], dict[str, Place]]] = {
    "hardware": (one(), {}, {"eth0": NATIVE}),
    "the firewall needs it as well": (one(), {"needs": (False, True)}, {"eth0": NATIVE}),
    "nothing needs it": (
        one(),
        {"needs": (False, False)},
        {"eth0": Place(None, "nothing needs it")},
    ),
    "switched off": (one(), {"setting": "off"}, {"eth0": Place(None, "switched off")}),
    "no driver for it": (one(features=0), {}, {"eth0": Place("generic", "the driver has no XDP")}),
    "no driver for it, and nothing else will do": (
        one(features=0),
        {"setting": "native"},
        {"eth0": NATIVE},
    ),
    "generic, whatever the driver can": (
        one(),
        {"setting": "generic"},
        {"eth0": Place("generic", "as the settings say")},
    ),
    "the only card is a veth": (
        one(**VETH),
        {},
        {"eth0": Place("generic", "native, the other end would have to cut what it sends")},
    ),
    "that it costs is accepted": (one(**VETH), {"setting": "native"}, {"eth0": NATIVE}),
    "a veth to the world": (
        two(VETH, VETH),
        {},
        {
            "eth0": Place("generic", "native, what it sends on would lack checksums"),
            "eth1": ELSEWHERE,
        },
    ),
    "a veth to the world, for the firewall": (
        two(VETH, VETH),
        {"needs": (False, True)},
        {"eth0": NATIVE, "eth1": ELSEWHERE},
    ),
    "hardware to the other nodes may need a program to send": (
        two({}, {}),
        {},
        {"eth0": NATIVE, "eth1": SENDS},
    ),
    "the firewall sends nothing": (
        two({}, {}),
        {"needs": (False, True)},
        {"eth0": NATIVE, "eth1": ELSEWHERE},
    ),
    "generic XDP sends by any card": (
        two({}, {}),
        {"setting": "generic"},
        {"eth0": Place("generic", "as the settings say"), "eth1": ELSEWHERE},
    ),
    "ours is there": (
        one(program=OURS, mode="native"),
        {"ours": {"eth0": OURS}},
        {"eth0": NATIVE},
    ),
    "another is there": (
        one(program=OTHERS, mode="native"),
        {},
        {"eth0": Place(None, f"another program is there: spy (id {OTHERS})")},
    ),
    "another is where ours was": (
        one(program=OTHERS, mode="generic"),
        {"ours": {"eth0": OURS}},
        {"eth0": Place(None, f"another program is there: spy (id {OTHERS})")},
    ),
    "families by cards of their own": (
        Cards(card("a", 2), card("b", 3), 0, card("c", 4), card("d", 5)),
        {},
        {"a": SENDS, "b": NATIVE, "c": SENDS, "d": NATIVE},
    ),
    "several to the world, one of them to the nodes": (
        Cards(card("a", 2), card("b", 3), others=(card("c", 4), card("a", 2))),
        {},
        {"a": NATIVE, "b": NATIVE, "c": NATIVE},
    ),
    "the nodes' is the first of several to the world": (
        Cards(card("a", 2), None, others=(card("c", 4),)),
        {},
        {"a": NATIVE, "c": NATIVE},
    ),
    "no cards": (Cards(None, None), {}, {}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_places(case, monkeypatch):
    cards, how, wanted = case
    monkeypatch.setattr("lockgate.bpf.links.program_name", lambda program: "spy")
    balance, firewall = how.get("needs", (True, False))
    found = places(cards, how.get("setting", "auto"), balance, firewall, how.get("ours", {}))
    assert found == wanted
