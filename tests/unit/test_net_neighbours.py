"""Which netlink messages say that the way to other nodes may have changed."""

from __future__ import annotations

import struct

import pytest

from lockgate.net.neighbours import concerns

NEW_LINK, NEW_ADDRESS, NEW_ROUTE, DEL_ROUTE, NEW_NEIGHBOUR = 16, 20, 24, 25, 28
POD, CARD, PODS_FROM = 65539, 3, 65536


def message(type_: int, body: bytes) -> bytes:
    return struct.pack("=IHHII", 16 + len(body), type_, 0, 0, 0) + body


def of_link(type_: int, index: int) -> bytes:
    return message(type_, struct.pack("=BBHi", 2, 0, 0, index) + bytes(8))


def route(type_: int, length: int) -> bytes:
    return message(type_, struct.pack("=BBBBBBBBI", 2, length, 0, 0, 254, 0, 0, 1, 0))


@pytest.mark.parametrize(
    "data, wanted",
    [
        pytest.param(of_link(NEW_LINK, CARD), True, id="a card's link"),
        pytest.param(of_link(NEW_ADDRESS, CARD), True, id="a card's address"),
        pytest.param(of_link(NEW_NEIGHBOUR, CARD), True, id="a neighbour on a card"),
        pytest.param(route(NEW_ROUTE, 0), True, id="a default route"),
        pytest.param(route(DEL_ROUTE, 0), True, id="a default route that goes"),
        pytest.param(of_link(NEW_LINK, POD), False, id="a pod's link"),
        pytest.param(of_link(NEW_NEIGHBOUR, POD), False, id="a pod as neighbour"),
        pytest.param(route(NEW_ROUTE, 32), False, id="a route to a pod"),
        pytest.param(
            of_link(NEW_LINK, POD) + of_link(NEW_NEIGHBOUR, CARD), True, id="one of several"
        ),
        pytest.param(message(NEW_LINK, b"")[:8], False, id="nothing whole"),
        pytest.param(bytes(16), True, id="a length that cannot be"),
    ],
)
def test_only_what_concerns_the_cards_is_heard(data: bytes, wanted: bool) -> None:
    assert concerns(data, PODS_FROM) is wanted
