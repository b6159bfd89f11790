"""Lists of the kernel: what concerns one interface, and nothing else."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

_WORLD = """
ip link set lo up
ip link add d0 type veth peer name d1
ip link set d0 up; ip link set d1 up
ip addr add 10.1.0.2/24 dev d0; ip addr add 10.2.0.2/24 dev d1
ip addr add fd00:5::2/64 dev d0 nodad
ip route add default via 10.1.0.1; ip route add 10.9.0.0/16 via 10.2.0.1
ip route add 10.8.0.3 dev d1; ip route add unreachable 10.7.0.0/16
ip -6 route add default via fd00:5::1
ip neigh add 10.1.0.1 lladdr 02:00:00:00:00:01 dev d0
ip neigh add fd00:5::1 lladdr 02:00:00:00:00:02 dev d0
ip neigh add 10.2.0.1 lladdr 02:00:00:00:00:03 dev d1
"""
_ASK = """
import socket
from lockgate.agent.cards import read_cards
from lockgate.net import dumps
cards = read_cards("d0", "none")
assert cards.outside is None and read_cards("", "").underlay is None
d0 = cards.underlay
assert d0.index == socket.if_nametoindex("d0") and d0.mtu == 1500 and len(d0.mac) == 6
assert sorted(d0.addresses) == ["10.1.0.2/24", "fd00:5::2/64"]
assert d0.gateways == ("10.1.0.1", "fd00:5::1")
assert dumps.default_gateways(socket.if_nametoindex("d1")) == []
assert d0.macs["10.1.0.1"] == bytes.fromhex("020000000001")
assert d0.macs["fd00:5::1"] == bytes.fromhex("020000000002")
assert "10.2.0.1" not in d0.macs
assert read_cards("d0", "none") == cards
d1 = socket.if_nametoindex("d1")
for address, link in (
    ("10.2.0.77", d1), ("10.1.0.1", d0.index), ("fd00:5::77", d0.index), ("10.8.0.3", d1),
    ("10.2.0.2", 0),
    ("10.9.0.1", 0), ("192.0.2.1", 0), ("2001:db8::1", 0),
):
    assert dumps.on_link(address) == link, address
try:
    dumps.on_link("10.7.0.1")
except OSError as error:
    assert error.errno == 113
else:
    raise AssertionError("there is no way to 10.7.0.1")
try:
    dumps.link(77)
except OSError as error:
    assert error.errno == 19
else:
    raise AssertionError("there is no such interface")
"""


_STACK = """
from lockgate.agent.stack_routes import StackRoutes
from lockgate.net import dumps
from lockgate.net.dumps import Route
from lockgate.net.links import Net
import socket
d1 = socket.if_nametoindex("d1")
with Net() as net:
    first = StackRoutes()
    assert first.write(net, ["10.96.0.0/16", "fd96::/112"], {"10.66.0.0/24": Route(d1)}) == []
    assert dumps.own_unreachable() == {"10.96.0.0/16", "fd96::/112"}
    assert first.write(net, ["10.96.0.0/16"], {}) == []
    assert dumps.own_unreachable() == {"10.96.0.0/16"}
    # A range that was taken away while no agent ran.
    assert StackRoutes().write(net, ["fd97::/112"], {}) == []
    assert dumps.own_unreachable() == {"fd97::/112"}
    assert dumps.own_unicast(1 << 16) == {}
"""


@pytest.mark.parametrize("ask", [_ASK, _STACK], ids=["lists", "routes of the stack"])
def test_what_the_kernel_has_is_read_of_what_was_asked_for(ask: str) -> None:
    script = f"set -e\n{_WORLD}\nexec {sys.executable} -c '{ask}'"
    done = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
