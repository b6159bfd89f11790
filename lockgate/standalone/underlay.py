"""The machines and wires of a cluster, as network namespaces, veth pairs and two bridges.

Each node has `underlay0` (where the nodes reach one another) and `outside0` (with the default
route: the world beyond the cluster, where a frontend's XDP program may sit). The underlay's
bridge is in a namespace of its own, and so is the outside's, which also answers as 172.31.0.1.

    node N   underlay0 172.30.0.(10+N)/24, fd00:172:30::(10+N)/64
             outside0  172.31.0.(10+N)/24, fd00:172:31::(10+N)/64

The world has routes to load balancers' addresses over all nodes that serve, as routers with ECMP
in front of a cluster have.

Everything is done with a few `ip -batch` runs: a namespace costs milliseconds.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path

from lockgate.net import namespaces, xdp
from lockgate.standalone.service_addresses import BALANCER_NET4, BALANCER_NET6
from lockgate.standalone.state import State

__all__ = ["OUTSIDE4", "OUTSIDE6", "UnderlayError", "build", "remove", "spread", "teardown"]

OUTSIDE4 = "172.31.0.1"
OUTSIDE6 = "fd00:172:31::1"

# (interface in the node, /24, /64)
_UNDERLAY = ("underlay0", "172.30.0.", "fd00:172:30::")
_OUTSIDE = ("outside0", "172.31.0.", "fd00:172:31::")


class UnderlayError(Exception):
    """A command of iproute2 failed; the message is what it said."""


def build(state: State, nodes: Sequence[tuple[str, int]]) -> None:
    """Makes what is missing for nodes given as (name, number). Raises UnderlayError, OSError."""
    hubs = (
        (state.underlay_netns, _UNDERLAY, ()),
        (state.outside_netns, _OUTSIDE, (f"{OUTSIDE4}/24", f"{OUTSIDE6}/64")),
    )
    for name in (state.underlay_netns, state.outside_netns, *(state.netns(n) for n, _ in nodes)):
        namespaces.create(name)
    pairs: list[str] = []
    for hub, (interface, _, _), addresses in hubs:
        present = _links(hub)
        ports = {f"n{number}" for _, number in nodes} - present
        setup = ["link set lo up"]
        if "br0" not in present:
            setup.append("link add br0 type bridge stp_state 0 forward_delay 0")
            setup += [
                f"addr add {address} dev br0 nodad" for address in addresses if ":" in address
            ]
            setup += [f"addr add {address} dev br0" for address in addresses if ":" not in address]
            setup.append("link set br0 up")
        with namespaces.inside(namespaces.path_of(hub)):
            _bridge_sysctls()
            _batch(setup)
        for name, number in nodes:
            if f"n{number}" in ports:
                pairs.append(
                    f"link add name {interface} netns {state.netns(name)} type veth"
                    f" peer name n{number} netns {hub}"
                )
    _batch(pairs)
    for hub, _, _ in hubs:
        with namespaces.inside(namespaces.path_of(hub)):
            _no_bridge_filter()
            _batch([f"link set n{number} master br0 up" for _, number in nodes])
            for _, number in nodes:
                # What nodes' XDP needs of the other ends: to take what it sends between nodes, and
                # to send from the world what is as complete as on a wire.
                if hub == state.underlay_netns:
                    xdp.use_gro(f"n{number}")
                else:
                    xdp.fill_checksums(f"n{number}")
    for name, number in nodes:
        with namespaces.inside(state.netns_path(name)):
            _node_sysctls()
            _batch(_node_setup(number))


def spread(state: State, numbers: Iterable[int]) -> None:
    """Have the world reach load balancers' addresses over the nodes with these numbers. Raises
    UnderlayError, OSError."""
    commands = []
    for net, prefix in ((BALANCER_NET4, _OUTSIDE[1]), (BALANCER_NET6, _OUTSIDE[2])):
        hops = [f"nexthop via {prefix}{10 + number} dev br0" for number in sorted(numbers)]
        commands.append(f"route replace {net} {' '.join(hops)}" if hops else f"route del {net}")
    with namespaces.inside(namespaces.path_of(state.outside_netns)):
        for family in ("ipv4", "ipv6"):
            _sysctl(f"{family}/fib_multipath_hash_policy", 1)  # by connection, not by client
        _batch(commands)


def _node_setup(number: int) -> list[str]:
    setup = ["link set lo up"]
    for interface, net4, net6 in (_UNDERLAY, _OUTSIDE):
        setup += [
            f"addr replace {net4}{10 + number}/24 dev {interface}",
            f"addr replace {net6}{10 + number}/64 dev {interface} nodad",
            f"link set {interface} up",
        ]
    setup.append(f"route replace default via {OUTSIDE4} dev outside0")
    setup.append(f"route replace ::/0 via {OUTSIDE6} dev outside0")
    return setup


def remove(state: State, name: str, number: int) -> None:
    """One node less: its links at once, its namespace with its last process. Raises UnderlayError,
    OSError; nothing there is success."""
    for hub in (state.underlay_netns, state.outside_netns):
        if f"n{number}" in _links(hub):
            with namespaces.inside(namespaces.path_of(hub)):
                _batch([f"link del n{number}"])
    namespaces.delete(state.netns(name))


def teardown(state: State) -> list[str]:
    """Removes every namespace of the cluster, and with them all links; the names of those."""
    run = namespaces.path_of("")
    if not run.is_dir():
        return []
    # Another cluster's name may begin with ours: its nodes are told apart by its state folder.
    others = [f"lg-{name}-" for name in _others(state)]
    removed = []
    for path in sorted(run.glob(f"lg-{state.cluster}-*")):
        if not path.name.startswith(tuple(others)) and namespaces.delete(path.name):
            removed.append(path.name)
    return removed


def _others(state: State) -> Iterable[str]:
    for path in state.root.parent.glob(f"{state.cluster}-*"):
        yield path.name


def _links(name: str) -> set[str]:
    with namespaces.inside(namespaces.path_of(name)):
        lines = Path("/proc/thread-self/net/dev").read_text().splitlines()[2:]
    return {line.partition(":")[0].strip() for line in lines}


def _bridge_sysctls() -> None:
    _sysctl("ipv6/conf/default/accept_dad", 0)
    _sysctl("ipv6/conf/default/accept_ra", 0)


def _no_bridge_filter() -> None:
    # br_netfilter would send frames between nodes through the namespace's iptables.
    for table in ("iptables", "ip6tables", "arptables"):
        _sysctl(f"bridge/bridge-nf-call-{table}", 0)


def _node_sysctls() -> None:
    for interface in ("default", "underlay0", "outside0"):
        _sysctl(f"ipv6/conf/{interface}/accept_ra", 0)
        _sysctl(f"ipv6/conf/{interface}/accept_dad", 0)


def _sysctl(key: str, value: int) -> None:
    path = Path("/proc/sys/net", key)
    if path.exists():
        path.write_text(str(value))


def _batch(commands: Sequence[str]) -> None:
    if not commands:
        return
    done = subprocess.run(
        ["ip", "-batch", "-"],
        input="\n".join(commands) + "\n",
        text=True,
        capture_output=True,
        check=False,
    )
    if done.returncode:
        raise UnderlayError(f"ip: {done.stderr.strip().splitlines()[0]}")
