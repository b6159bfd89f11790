"""A node whose families are on different cards: each leaves by its own, and both are guarded."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

_WORLD = """
ip link set lo up
ip link add four type veth peer name four-peer
ip link add six type veth peer name six-peer
for one in four six four-peer six-peer; do ip link set $one up; done
ip addr add 192.0.2.2/24 dev four
ip addr add 2001:db8:1::2/64 dev six nodad
"""
#: Both families' default routes are balanced over three cards.
_MANY = """
ip link add more type veth peer name more-peer
for one in more more-peer; do ip link set $one up; done
ip addr add 198.51.100.2/24 dev more
ip addr add 2001:db8:2::2/64 dev more nodad
ip route add default nexthop via 192.0.2.1 dev four nexthop via 198.51.100.1 dev more
ip -6 route add default nexthop via 2001:db8:1::1 dev six nexthop via 2001:db8:2::1 dev more
"""
_BOTH = """
ip route add default via 192.0.2.1
ip -6 route add default via 2001:db8:1::1 dev six
"""
#: What there is besides, node's addresses → (underlay, outside, underlay2, outside6).
CASES = {
    "each family has its card": (
        _BOTH,
        ["192.0.2.2", "2001:db8:1::2"],
        ("four", "", "six", "six"),
    ),
    "IPv6 is the first": (_BOTH, ["2001:db8:1::2", "192.0.2.2"], ("six", "four", "four", "six")),
    "a node of one family, a world of two": (_BOTH, ["192.0.2.2"], ("four", "", "", "six")),
    "no default routes": ("", ["192.0.2.2", "2001:db8:1::2"], ("four", "", "six", "")),
    "only IPv6 leads outside": (
        "ip -6 route add default via 2001:db8:1::1 dev six",
        ["192.0.2.2"],
        ("four", "six", "", ""),
    ),
    "both on one card": (
        "ip addr add 2001:db8:1::3/64 dev four nodad; ip route add default via 192.0.2.1;"
        "ip -6 route add default via 2001:db8:1::1 dev four",
        ["192.0.2.2", "2001:db8:1::3"],
        ("four", "", "", ""),
    ),
}


def inside(setup: str, program: str) -> None:
    script = f'set -e\n{_WORLD}{setup}\nexec {sys.executable} -c "$1"'
    command = ["unshare", "-n", "sh", "-c", script, "sh", program]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_cards_are_found_by_family(case: tuple[str, list[str], tuple[str, ...]]) -> None:
    setup, addresses, wanted = case
    program = f"""
from lockgate.agent.cards import AUTO, read_cards
found = read_cards(AUTO, AUTO, {addresses!r})
cards = (found.underlay, found.outside, found.underlay2, found.outside6)
names = tuple(card.name if card else "" for card in cards)
assert names == {wanted!r}, names
assert sorted(card.name for card in found.all) == sorted(set(names) - {{""}})
"""
    inside(setup, program)


@pytest.mark.parametrize(
    ("setting", "wanted"),
    [
        ("AUTO", ("four", "", "", "six", "more")),
        ("'six, more,none'", ("four", "six", "", "", "more")),
    ],
    ids=["found", "named"],
)
def test_clients_may_come_by_several_cards(setting: str, wanted: tuple[str, ...]) -> None:
    inside(
        _MANY,
        f"""
from lockgate.agent.cards import AUTO, read_cards
found = read_cards(AUTO, {setting}, ["192.0.2.2"])
cards = (found.underlay, found.outside, found.underlay2, found.outside6, *found.others)
names = tuple(card.name if card else "" for card in cards)
assert names == {wanted!r}, names
assert found.others[0].gateways == ("198.51.100.1", "2001:db8:2::1")
""",
    )


def test_a_route_with_several_ways_leaves_by_the_first() -> None:
    """What all of them bring is checked, and their addresses are the node's."""
    inside(
        _MANY,
        _HOPS.replace(
            "assert dict(dict.items(dp.link_roles)) == {four: 1, six: 1}",
            "more = socket.if_nametoindex('more')\n"
            "assert dict(dict.items(dp.link_roles)) == {four: 1, six: 1, more: 2}\n"
            "assert to('198.51.100.2/32') == to('2001:db8:2::2/128') == 0",
        ),
    )


_HOPS = """
import socket
from types import SimpleNamespace
import numpy as np
from lockgate.agent.cards import AUTO, read_cards
from lockgate.agent.hops import Hops, NEAR_UNDERLAY, NEAR_UNDERLAY2, WORLD, WORLD6
from lockgate.bpf.btf import Schema
from lockgate.net import dumps
from lockgate.net.dumps import Route
from lockgate.net.links import Net
from lockgate.objects.address import parse_address, parse_cidr
from lockgate.objects.model import Cluster, Node, NodeAddress, NodeSpec, NodeStatus, ObjectMeta
from lockgate.paths import bpf_object


class Map(dict):
    key_dtype = np.dtype([("prefixlen", "<u4"), ("addr", "u1", (16,))])

    def items(self):
        return [], []

    def set(self, key, value):
        self[key] = value


def node(name, pods, *ips):
    status = NodeStatus(addresses=[NodeAddress(type="InternalIP", address=ip) for ip in ips])
    return Node(metadata=ObjectMeta(name=name), spec=NodeSpec(pod_cidrs=pods), status=status)


mine = ["192.0.2.2", "2001:db8:1::2"]
cluster = Cluster()
cluster.nodes["one"] = node("one", ["10.1.0.0/24", "fd01::/64"], *mine)
cluster.nodes["two"] = node("two", ["10.2.0.0/24", "fd02::/64"], "192.0.2.3", "2001:db8:1::3")
schema = Schema.from_object(bpf_object())
dtype = schema.dtype("hop_view")
state = SimpleNamespace(view=np.zeros(1, schema.dtype("node_state")))
dp = SimpleNamespace(routes=Map(), link_roles=Map(), state=state)
device = SimpleNamespace(remove=lambda: None)
hops = Hops(dp, np.zeros(16, dtype), "one", AUTO, AUTO, [], "auto", device)
hops.assign(cluster.nodes)
with Net() as net:
    hops.refresh(net, read_cards(AUTO, AUTO, mine), cluster)
hops.write_routes()
assert hops.errors == [], hops.errors
four, six = socket.if_nametoindex("four"), socket.if_nametoindex("six")
routes = {
    (int.from_bytes(raw[:4], "little"), raw[4:]): hop for raw, hop in dict.items(dp.routes)
}


def to(cidr):
    address, length = parse_cidr(cidr)
    return routes[length, address]


assert (to("0.0.0.0/0"), to("::/0")) == (WORLD, WORLD6)
assert (to("192.0.2.0/24"), to("2001:db8:1::/64")) == (NEAR_UNDERLAY, NEAR_UNDERLAY2)
table = hops.table
for number, index in ((WORLD, four), (WORLD6, six), (NEAR_UNDERLAY, four), (NEAR_UNDERLAY2, six)):
    assert table["ifindex"][number] == index, number
assert bytes(table["masq4"][WORLD]) == parse_address("192.0.2.2")
assert bytes(table["masq6"][WORLD6]) == parse_address("2001:db8:1::2")
assert bytes(table["via6"][WORLD6]) == parse_address("2001:db8:1::1")
# Pods' packets of both families go to the node by one link; the stack's by each family's.
assert table["ifindex"][hops.number("two")] == four
assert dumps.own_unicast(1 << 16) == {
    "10.2.0.0/24": Route(four, "192.0.2.3", "192.0.2.2"),
    "fd02::/64": Route(six, "2001:db8:1::3", "2001:db8:1::2"),
}
assert dict(dict.items(dp.link_roles)) == {four: 1, six: 1}
assert bytes(state.view["node4"][0]) == parse_address("192.0.2.2")
assert bytes(state.view["node6"][0]) == parse_address("2001:db8:1::2")
"""


def test_each_family_leaves_by_its_own_card() -> None:
    inside(_BOTH, _HOPS)
