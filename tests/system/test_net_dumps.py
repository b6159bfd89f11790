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
ip -6 route add default via fd00:5::1
ip neigh add 10.1.0.1 lladdr 02:00:00:00:00:01 dev d0
ip neigh add fd00:5::1 lladdr 02:00:00:00:00:02 dev d0
ip neigh add 10.2.0.1 lladdr 02:00:00:00:00:03 dev d1
"""
_ASK = """
import socket
from lockgate.net.links import Net
with Net() as net:
    d0 = socket.if_nametoindex("d0")
    assert set(net.links()) == {"lo", "d0", "d1"}
    assert net.link("d0")["index"] == d0 and net.link("d0")["mtu"] == 1500
    assert net.link("none") is None
    assert sorted(net.addresses(d0)) == ["10.1.0.2/24", "fd00:5::2/64"]
    assert net.default_gateways(d0) == ["10.1.0.1", "fd00:5::1"]
    assert net.default_gateways(socket.if_nametoindex("d1")) == []
    macs = net.macs(d0)
    assert macs["10.1.0.1"] == bytes.fromhex("020000000001")
    assert macs["fd00:5::1"] == bytes.fromhex("020000000002")
    assert "10.2.0.1" not in macs
"""


def test_lists_are_of_the_interface_that_was_asked_for() -> None:
    script = f"set -e\n{_WORLD}\nexec {sys.executable} -c '{_ASK}'"
    done = subprocess.run(["unshare", "-n", "sh", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
