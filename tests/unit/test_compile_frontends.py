"""What entries of services say that no choice of backends tells: flags, targets, conflicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import msgspec
import pytest

from lockgate.compile import Host, Tables, compile_node
from lockgate.compile.evaluate import owners_of, slots_of
from lockgate.compile.tables import (
    LIVE_KEEPS,
    LIVE_LOCAL,
    ON_HOST,
    SVC_FRONTEND,
    SVC_HOST_ONLY,
    SVC_INTERNAL_LOCAL,
    SVC_LOCAL,
    SVC_OPEN,
    SVC_PRESENT,
    SVC_RANGES,
    SVC_SNAT,
    TARGET_SHIFT,
    TO_HOP,
    TO_HOST,
    TO_LOCAL,
    TO_NOWHERE,
    ServiceKey,
)
from lockgate.objects.address import parse_address
from lockgate.objects.changes import Changed
from lockgate.objects.model import (
    Cluster,
    ContainerPort,
    Endpoint,
    Node,
    ObjectMeta,
    ServicePort,
)
from tests.changes import Ids
from tests.unit.test_spec_services import (
    BALANCER,
    CARD,
    CLUSTER_IP,
    EXTERNAL,
    NODE_A,
    NODE_B,
    READY,
    UNREADY,
    cluster,
    pod,
    service,
    slice_,
    zones,
)

HOST = Host(frozenset([parse_address(CARD), parse_address("fe80::1")]))
PODS = (
    pod("here", "10.0.1.1", []),
    pod("there", "10.0.2.1", [], "b"),
    pod("far", "10.0.3.1", [], "c"),
)


def ids() -> Ids:
    found = Ids()
    found.hops = {"b": 9}
    found.slots = {"": 4}  # of all pods: they have no uid
    return found


def compiled(of: Cluster, host: Host = HOST, numbers: Ids | None = None) -> Tables:
    return compile_node(of, "a", numbers or ids(), host=host)


def flags(tables: Tables, address: str, port: int = 0, protocol: int = 6) -> int | None:
    view = tables.services.get((parse_address(address), port, protocol if port else 0))
    return None if view is None else view.flags


P, F = SVC_PRESENT, SVC_PRESENT | SVC_FRONTEND

FLAGS: dict[str, tuple[dict[str, Any], str, int, int | None]] = {
    "a cluster IP": ({}, CLUSTER_IP, 80, P),
    "its address": ({}, CLUSTER_IP, 0, P),
    "an external IP": ({}, EXTERNAL, 80, F),
    "the address of an external IP": ({}, EXTERNAL, 0, F),
    "a balancer's address": ({}, BALANCER, 80, F),
    "a balancer's address with ranges": (
        {"load_balancer_source_ranges": ["10.0.0.0/8"]},
        BALANCER,
        80,
        F | SVC_RANGES,
    ),
    "a NodePort at the Node's address": ({}, NODE_A, 30080, F),
    "that address is open": ({}, NODE_A, 0, F | SVC_OPEN),
    "a NodePort at a card's": ({}, CARD, 30080, F),
    "another node's is none": ({}, NODE_B, 30080, None),
    "link-local addresses are none": ({}, "fe80::1", 30080, None),
    "at loopback": ({}, "127.0.0.1", 30080, P | SVC_HOST_ONLY),
    "loopback is open": ({}, "127.0.0.1", 0, P | SVC_HOST_ONLY | SVC_OPEN),
    "an external IP that is another node's is open": (
        {"external_ips": [NODE_B]},
        NODE_B,
        0,
        F | SVC_OPEN,
    ),
    "external Local": ({"external_traffic_policy": "Local"}, NODE_A, 30080, F | SVC_LOCAL),
    "external Local is not for cluster IPs": (
        {"external_traffic_policy": "Local"},
        CLUSTER_IP,
        80,
        P,
    ),
    "internal Local": (
        {"internal_traffic_policy": "Local"},
        CLUSTER_IP,
        80,
        P | SVC_INTERNAL_LOCAL,
    ),
    "internal Local is for cluster IPs only": (
        {"internal_traffic_policy": "Local"},
        EXTERNAL,
        80,
        F,
    ),
}


@pytest.mark.parametrize(("spec", "address", "port", "wanted"), FLAGS.values(), ids=FLAGS)
def test_flags(spec: dict[str, Any], address: str, port: int, wanted: int | None) -> None:
    assert flags(compiled(cluster(service(**spec))), address, port) == wanted


@pytest.mark.parametrize(
    ("mode", "default", "wanted"),
    [(None, False, 0), (None, True, SVC_SNAT), ("dsr", True, 0), ("snat", False, SVC_SNAT)],
)
def test_the_way_to_other_nodes(mode: str | None, default: bool, wanted: int) -> None:
    one = service()
    if mode:
        meta = msgspec.structs.replace(one.metadata, annotations={"lockgate.dev/forwarding": mode})
        one = msgspec.structs.replace(one, metadata=meta)
    tables = compiled(cluster(one), replace(HOST, snat=default))
    assert flags(tables, EXTERNAL, 80) == F | wanted
    assert flags(tables, CLUSTER_IP, 80) == P


def test_where_packets_for_owners_go() -> None:
    numbers = ids()
    host_network = Endpoint([NODE_A])
    others = [Endpoint([ip]) for ip in (NODE_B, CARD, "198.51.100.99")]
    of = cluster(more=(*PODS, slice_([host_network, *others], "web-2")))
    found = compiled(of, numbers=numbers)
    view = found.services[parse_address(EXTERNAL), 80, 6]
    targets = {one.address: one.target for one in owners_of(found, view)}
    assert targets == {
        parse_address("10.0.1.1"): TO_LOCAL << TARGET_SHIFT | 4,
        parse_address("10.0.2.1"): TO_HOP << TARGET_SHIFT | 9,
        parse_address("10.0.3.1"): TO_HOP << TARGET_SHIFT,  # no way there
        parse_address(NODE_A): TO_HOST << TARGET_SHIFT,
        parse_address(CARD): TO_HOST << TARGET_SHIFT,
        parse_address(NODE_B): TO_HOP << TARGET_SHIFT | 9,
        parse_address("198.51.100.99"): TO_NOWHERE << TARGET_SHIFT,
    }
    assert found.host_backends
    assert not compiled(cluster(more=PODS)).host_backends


def test_slots_and_hops_that_change_reach_the_owners() -> None:
    of, numbers = cluster(more=PODS), ids()
    numbers.slots = {}
    tables = compiled(of, numbers=numbers)
    view = tables.services[parse_address(EXTERNAL), 80, 6]
    assert owners_of(tables, view)[0].target == TO_LOCAL << TARGET_SHIFT | 0x0FFF_FFFF
    numbers.slots, numbers.hops = {"": 7}, {"b": 9, "c": 11}
    changed = Changed(pods={("shop", "here")}, nodes={"c"})
    tables = compile_node(of, "a", numbers, tables, changed, HOST)
    view = tables.services[parse_address(EXTERNAL), 80, 6]
    assert [one.target for one in owners_of(tables, view)] == [
        TO_LOCAL << TARGET_SHIFT | 7,
        TO_HOP << TARGET_SHIFT | 9,
        TO_HOP << TARGET_SHIFT | 11,
    ]


def test_weights_of_pods_are_shares_of_slots() -> None:
    light = pod("here", "10.0.1.1", [])
    meta = ObjectMeta(name="here", namespace="shop", annotations={"lockgate.dev/weight": "10"})
    of = cluster(more=PODS)
    tables = compiled(of)
    key = parse_address(EXTERNAL), 80, 6
    assert 0.32 < share_of_first(tables, key) < 0.35
    of.pods["shop", "here"] = msgspec.structs.replace(light, metadata=meta)
    tables = compile_node(of, "a", ids(), tables, Changed(pods={("shop", "here")}), HOST)
    assert 0.04 < share_of_first(tables, key) < 0.055


def share_of_first(tables: Tables, key: ServiceKey) -> float:
    """Of the slots, those whose first owner is number 0."""
    slots = slots_of(tables, tables.services[key])
    return sum(slot[0] == 0 for slot in slots) / len(slots)


@pytest.mark.parametrize(
    ("text", "slots"), [("1024", 1024), ("65536", 65536), ("5000", 16384), ("", 16384)]
)
def test_a_service_says_how_many_slots_it_wants(text: str, slots: int) -> None:
    of = cluster(more=PODS)
    for name, one in of.services.items():
        notes = one.metadata.annotations | {"lockgate.dev/slots": text}
        meta = msgspec.structs.replace(one.metadata, annotations=notes)
        of.services[name] = msgspec.structs.replace(one, metadata=meta)
    tables = compiled(of)
    view = tables.services[parse_address(EXTERNAL), 80, 6]
    assert len(slots_of(tables, view)) == slots
    wrong = [error for error in tables.errors if "lockgate.dev/slots" in error]
    assert wrong == (
        []
        if text == str(slots)
        else [
            f"Service shop/web: metadata.annotations[lockgate.dev/slots]: expected a power of two"
            f" from 1024 to 65536, got {text!r}"
        ]
    )


def test_an_address_that_a_pod_has_is_no_services() -> None:
    """Whoever was first: as pods come and go."""
    of, numbers = cluster(more=PODS), ids()
    tables = compile_node(of, "a", numbers, host=HOST)
    key = parse_address(EXTERNAL), 80, 6
    assert key in tables.services
    of.pods["shop", "taken"] = pod("taken", EXTERNAL, [], on="b")
    changed = Changed(pods={("shop", "taken")})
    tables = compile_node(of, "a", numbers, tables, changed, HOST)
    assert key not in tables.services and (key[0], 0, 0) not in tables.services
    told = f"Service shop/web: spec.externalIPs: {EXTERNAL}, port 80/TCP, is taken by a pod that"
    assert [error for error in tables.errors if error.startswith(told)]
    del of.pods["shop", "taken"]
    tables = compile_node(of, "a", numbers, tables, changed, HOST)
    assert key in tables.services and not tables.errors


HTTP = [ContainerPort(8080, host_port=30080)]
SECOND = {"cluster_ips": ["10.96.0.2"], "ingress": []}

CONFLICTS: dict[str, tuple[Any, list[str]]] = {
    "a cluster IP": (
        service("zoo", external_ips=[], ingress=[], ports=[ServicePort(port=81)]),
        [f"Service shop/zoo: spec.clusterIPs: {CLUSTER_IP} is taken by Service shop/web"],
    ),
    "an external port": (
        service("zoo", **SECOND, type="ClusterIP"),
        [
            f"Service shop/zoo: spec.externalIPs: {EXTERNAL}, port 80/TCP, is taken by"
            " Service shop/web",
            f"Service shop/zoo: spec.externalIPs: {EXTERNAL}, port 53/UDP, is taken by"
            " Service shop/web",
        ],
    ),
    "an external IP that is a cluster IP": (
        service("zoo", **{**SECOND, "external_ips": [CLUSTER_IP]}, type="ClusterIP"),
        [
            f"Service shop/zoo: spec.externalIPs: {CLUSTER_IP}, port 80/TCP, is taken by"
            " Service shop/web",
            f"Service shop/zoo: spec.externalIPs: {CLUSTER_IP}, port 53/UDP, is taken by"
            " Service shop/web",
        ],
    ),
    "NodePorts": (
        service("zoo", **SECOND, external_ips=[]),
        [
            "Service shop/zoo: spec.ports.nodePort: port 30080/TCP of this node is taken by"
            " Service shop/web",
            "Service shop/zoo: spec.ports.nodePort: port 30053/UDP of this node is taken by"
            " Service shop/web",
        ],
    ),
    "a hostPort that is a NodePort": (
        pod("aaa", "10.0.1.5", HTTP),
        [
            "Pod shop/aaa: spec.containers.ports.hostPort: port 30080/TCP of this node is taken by"
            " Service shop/web"
        ],
    ),
    "hostIP that is none of the node's": (
        pod("aaa", "10.0.1.5", [ContainerPort(80, host_port=80, host_ip="192.0.2.99")]),
        ["Pod shop/aaa: spec.containers.ports.hostIP: 192.0.2.99 is no address of this node"],
    ),
    "a range that is none": (
        service("zoo", **SECOND, external_ips=[], ports=[], load_balancer_source_ranges=["10/8"]),
        ["Service shop/zoo: spec.loadBalancerSourceRanges: not a CIDR block: '10/8'"],
    ),
    "an external IP that nobody reaches": (
        service("zoo", **{**SECOND, "external_ips": ["127.0.0.1"]}, ports=[]),
        ["Service shop/zoo: spec.externalIPs: 127.0.0.1 is an address that nobody outside reaches"],
    ),
}


@pytest.mark.parametrize(("more", "wanted"), CONFLICTS.values(), ids=CONFLICTS)
def test_conflicts_are_named(more: Any, wanted: list[str]) -> None:
    tables = compiled(cluster(more=(more,)))
    assert tables.errors == wanted
    # And the first keeps what it has.
    assert flags(tables, CLUSTER_IP, 80) == P and flags(tables, EXTERNAL, 80) == F


def test_host_ports_of_a_pod_that_another_plugin_wired_are_its() -> None:
    numbers = ids()
    of = cluster(more=(pod("p", "10.0.1.5", [ContainerPort(80, host_port=8000)]),))
    assert flags(compiled(of, numbers=numbers), NODE_A, 8000) == F
    numbers.slots = {"": ON_HOST}
    assert flags(compiled(of, numbers=numbers), NODE_A, 8000) is None


def test_a_node_that_moves_to_another_zone_chooses_anew() -> None:
    of = cluster(hints=(zones("z1"), zones("z1"), zones("z2")))
    tables = compiled(of)
    assert tables.services[parse_address(CLUSTER_IP), 80, 6].count == 2
    of.nodes["a"] = Node(
        metadata=ObjectMeta(name="a", labels={"topology.kubernetes.io/zone": "z2"}),
        status=of.nodes["a"].status,
    )
    tables = compile_node(of, "a", ids(), tables, Changed(nodes={"a"}), HOST)
    assert tables.services[parse_address(CLUSTER_IP), 80, 6].count == 1


def test_who_serves_elsewhere_keeps_its_flows_of_udp() -> None:
    """Of TCP no packet asks for that."""
    local = {"type": "ClusterIP", "internal_traffic_policy": "Local", "external_ips": []}
    tables = compiled(cluster(service(**local), (READY, READY, UNREADY)))
    here, there = parse_address("10.0.1.1"), parse_address("10.0.2.1")
    assert {(key[0], key[3]): bits for key, bits in tables.backends.items()} == {
        (here, 6): LIVE_LOCAL,
        (here, 17): LIVE_LOCAL | LIVE_KEEPS,
        (there, 17): LIVE_KEEPS,
    }


def test_addresses_that_come_and_go_on_cards() -> None:
    of = cluster()
    tables = compiled(of, Host())
    assert flags(tables, CARD, 30080) is None
    tables = compile_node(of, "a", ids(), tables, Changed(), HOST)
    assert flags(tables, CARD, 30080) == F and flags(tables, CARD) == F | SVC_OPEN
    tables = compile_node(of, "a", ids(), tables, Changed(), Host())
    assert flags(tables, CARD, 30080) is None and flags(tables, CARD) is None
