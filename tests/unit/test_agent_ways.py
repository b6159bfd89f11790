"""Which way leads to a node."""

from __future__ import annotations

import errno
from typing import cast

import msgspec
import pytest

from lockgate.agent.datapath import Datapath
from lockgate.agent.tunnel import TunnelDevice
from lockgate.agent.ways import Way, choose_way, pod_cidrs
from lockgate.net import vxlan
from lockgate.objects.model import Node

CARD = ("192.0.2.1/24", "2001:db8:1::1/64")
MINE = ["192.0.2.1", "2001:db8:1::1"]

WAYS = [
    ("auto, on the link", "auto", ["192.0.2.9"], MINE, Way(("192.0.2.9",))),
    (
        "auto, one of two addresses on the link",
        "auto",
        ["198.51.100.9", "2001:db8:1::9"],
        MINE,
        Way(("2001:db8:1::9",)),
    ),
    (
        "auto, on another link",
        "auto",
        ["198.51.100.9", "2001:db8:2::9"],
        MINE,
        Way(remote="198.51.100.9", local="192.0.2.1"),
    ),
    (
        "auto, on another link and IPv6 only",
        "auto",
        ["2001:db8:2::9"],
        MINE,
        Way(remote="2001:db8:2::9", local="2001:db8:1::1"),
    ),
    (
        "vxlan, on the link",
        "vxlan",
        ["192.0.2.9"],
        MINE,
        Way(remote="192.0.2.9", local="192.0.2.1"),
    ),
    ("vxlan, no family in common", "vxlan", ["2001:db8:2::9"], MINE[:1], "no InternalIP of the"),
    ("direct, on the link", "direct", ["192.0.2.9"], MINE, Way(("192.0.2.9",))),
    ("direct, on another link", "direct", ["198.51.100.9"], MINE, "on no link of this node's"),
]


CIDRS: dict[str, tuple[dict[str, object], list[str]]] = {
    "both families": (
        {"podCIDRs": ["10.1.2.0/24", "fd00:1::/64"]},
        ["10.1.2.0/24", "fd00:1::/64"],
    ),
    "the older field alone": ({"podCIDR": "10.1.2.0/24"}, ["10.1.2.0/24"]),
    "host bits": ({"podCIDRs": ["10.1.2.3/24"]}, ["10.1.2.0/24"]),
    "leading zeros": ({"podCIDRs": ["010.1.2.0/24", "fd00:1::/64"]}, ["fd00:1::/64"]),
    "no length": ({"podCIDRs": ["10.1.2.0"]}, []),
    "words": ({"podCIDRs": ["", "none", "10.1.2.0/33"]}, []),
}


@pytest.mark.parametrize(("spec", "expected"), CIDRS.values(), ids=CIDRS.keys())
def test_pod_cidrs_that_can_be_read(spec: dict[str, object], expected: list[str]) -> None:
    assert pod_cidrs(msgspec.convert({"metadata": {"name": "a"}, "spec": spec}, Node)) == expected


@pytest.mark.parametrize(
    ("routing", "ips", "mine", "way"), [w[1:] for w in WAYS], ids=[w[0] for w in WAYS]
)
def test_the_way(routing, ips, mine, way) -> None:
    found = choose_way(routing, ips, mine, CARD)
    if isinstance(way, str):
        assert isinstance(found, str) and way in found
    else:
        assert found == way


def test_a_kernel_without_vxlan_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise OSError(errno.EOPNOTSUPP, "cannot make interface lg-vxlan")

    monkeypatch.setattr(vxlan, "ensure", refuse)
    monkeypatch.setattr(vxlan, "supported", lambda: False)
    with pytest.raises(OSError, match="This machine has no VXLAN devices"):
        TunnelDevice(cast(Datapath, None), 8472).ensure(1450)
