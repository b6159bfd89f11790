"""The compiled image says what the specification says, for every packet and every rule."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from lockgate.compile import Tables, compile_node
from lockgate.compile import tables as table_constants
from lockgate.compile.evaluate import backends_of, lookup
from lockgate.compile.tables import (
    ISOLATED_EGRESS,
    ISOLATED_INGRESS,
    ON_HOST,
    PEER_HOST,
    PEER_LOCAL,
    PEER_NODE,
    PEER_REMOTE,
    POLICY,
    UNREADABLE,
)
from lockgate.objects.address import parse_address
from lockgate.objects.model import (
    Cluster,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    Namespace,
    NetworkPolicy,
    Node,
    ObjectMeta,
    Pod,
    Service,
)
from lockgate.spec.answer import Judgement
from lockgate.spec.policy import Packet, judge, pod_at
from tests import generate

NUMBERS = {"TCP": 6, "UDP": 17, "SCTP": 132, "ICMP": 1, "ICMPv6": 58}


@dataclass(eq=False)
class Ids:
    """Numbers in the order of asking; every pod of `node` has a slot."""

    cluster: Cluster
    node: str
    interned: dict[object, int] = field(default_factory=dict)
    reasons: dict[int, tuple] = field(default_factory=dict)

    def _number(self, key):
        return self.interned.setdefault(key, len(self.interned) + 1)

    def endpoint(self, pod):
        return self._number(("endpoint", pod.metadata.uid))

    def reason(self, verdict, direction, rules):
        number = self._number((verdict, direction, rules))
        self.reasons[number] = (verdict, direction, rules)
        return number

    def service(self, namespace, name, port_name, protocol, port):
        return self._number((namespace, name, port_name, protocol, port))

    def slot(self, uid):
        for number, pod in enumerate(self.cluster.pods.values()):
            if pod.metadata.uid == uid:
                return number if pod.spec.node_name == self.node else None
        return None

    def hop(self, node):
        return {"a": 1, "b": 2}.get(node)


def ask(tables: Tables, ids: Ids, pod: Pod, direction, peer: str, port, protocol) -> Judgement:
    """The image's answer in the specification's words."""
    view = tables.endpoints[ids.slot(pod.metadata.uid)]
    number = NUMBERS[protocol]
    cell = lookup(tables, view, direction, parse_address(peer), port or 0, number)
    assert cell == lookup(
        tables, view, direction, parse_address(peer), port or 0, number, pending=True
    )
    bit = ISOLATED_INGRESS if direction == "ingress" else ISOLATED_EGRESS
    if not view.isolated & bit:
        assert cell == (True, 0)
        return Judgement(False, True)
    verdict, of, rules = ids.reasons[cell.reason]
    assert (verdict == "allow", of) == (cell.allow, direction)
    if cell.allow:
        return Judgement(True, True, tuple((n, p, direction, i) for n, p, i in rules))
    assert all(index in (POLICY, UNREADABLE) for _, _, index in rules)
    unreadable = tuple((n, p) for n, p, index in rules if index == UNREADABLE)
    return Judgement(True, False, (), tuple((n, p) for n, p, _ in rules), unreadable)


def agree(found: Judgement, wanted: Judgement) -> None:
    assert (found.isolated, found.allowed) == (wanted.isolated, wanted.allowed)
    assert found.rules == wanted.rules
    if wanted.isolated and not wanted.allowed:
        assert found.policies == wanted.policies
        assert found.unreadable == wanted.unreadable


def compare(cluster: Cluster, tables: dict[str, Tables], ids: dict[str, Ids], packets) -> None:
    for packet in packets:
        answer = judge(cluster, Packet(*packet))
        for direction in ("egress", "ingress"):
            wanted = getattr(answer, direction)
            own, peer = packet.source, packet.destination
            if direction == "ingress":
                own, peer = peer, own
            pod = pod_at(cluster, own)
            if wanted is None or pod is None:
                continue
            node = pod.spec.node_name
            found = ask(tables[node], ids[node], pod, direction, peer, packet.port, packet.protocol)
            agree(found, wanted)


def check(seed: int, packets: int = 60) -> None:
    rng = Random(seed)
    cluster = generate.cluster(rng)
    ids = {node: Ids(cluster, node) for node in generate.NODES}
    tables = {node: compile_node(cluster, node, ids[node]) for node in generate.NODES}
    assert all(not t.errors for t in tables.values())
    compare(cluster, tables, ids, [generate.packet(rng, cluster) for _ in range(packets)])


@settings(max_examples=200, deadline=None)
@given(st.integers(min_value=0, max_value=2**32))
def test_the_image_agrees_with_the_specification(seed: int) -> None:
    check(seed)


@settings(max_examples=40, deadline=None)
@given(st.integers(min_value=0, max_value=2**32))
def test_a_compilation_after_another_gives_what_a_cold_one_gives(seed: int) -> None:
    rng = Random(seed)
    cluster = generate.cluster(rng)
    ids = Ids(cluster, "a")
    tables = compile_node(cluster, "a", ids)
    for _ in range(4):
        other = generate.cluster(rng)
        match rng.randrange(4):
            case 0:
                key = rng.choice(list(cluster.pods))
                # A hostNetwork pod's status has its node's addresses, which no other pod gets.
                others = [p for p in other.pods.values() if not p.spec.host_network]
                cluster.pods[key] = msgspec.structs.replace(
                    cluster.pods[key], status=rng.choice(others).status
                )
                # Addresses of another generation may collide: keep them apart.
                cluster.pods.pop(key) if rng.random() < 0.5 else None
            case 1:
                cluster.policies.pop(rng.choice(list(cluster.policies)), None)
            case 2:
                cluster.policies.update(other.policies)
            case 3:
                cluster.namespaces.update(other.namespaces)
        if not cluster.policies:
            cluster.policies.update(other.policies)
        tables = compile_node(cluster, "a", ids, tables)
        both = {"a": tables}
        for _ in range(30):
            packet = generate.packet(rng, cluster)
            answer = judge(cluster, Packet(*packet))
            source, destination = (pod_at(cluster, a) for a in packet[:2])
            if answer.egress and source and source.spec.node_name == "a":
                found = ask(
                    both["a"], ids, source, "egress", packet[1], packet.port, packet.protocol
                )
                agree(found, answer.egress)
            if answer.ingress and destination and destination.spec.node_name == "a":
                found = ask(
                    both["a"], ids, destination, "ingress", packet[0], packet.port, packet.protocol
                )
                agree(found, answer.ingress)


# ---- Tables --------------------------------------------------------------------------


def pod(name: str, ip: str, node: str = "a", labels=None, ports=(), **status) -> Pod:
    return msgspec.convert(
        {
            "metadata": {
                "namespace": "x",
                "name": name,
                "uid": f"uid-{name}",
                "labels": labels or {},
            },
            "spec": {
                "nodeName": node,
                "containers": [{"name": "c", "ports": list(ports)}],
            },
            "status": {"phase": "Running", "podIP": ip, **status},
        },
        Pod,
    )


def policy(name: str, **spec) -> NetworkPolicy:
    return msgspec.convert(
        {"metadata": {"namespace": "x", "name": name}, "spec": spec}, NetworkPolicy
    )


def cluster_of(*objects) -> Cluster:
    cluster = Cluster(namespaces={"x": Namespace(metadata=ObjectMeta(name="x"))})
    for node, ip in (("a", "192.0.2.1"), ("b", "192.0.2.2")):
        cluster.nodes[node] = msgspec.convert(
            {
                "metadata": {"name": node},
                "status": {"addresses": [{"type": "InternalIP", "address": ip}]},
            },
            Node,
        )
    rooms = {
        Pod: cluster.pods,
        NetworkPolicy: cluster.policies,
        Service: cluster.services,
        EndpointSlice: cluster.slices,
    }
    for item in objects:
        rooms[type(item)][item.metadata.namespace, item.metadata.name] = item
    return cluster


def compiled(*objects) -> tuple[Tables, Ids]:
    cluster = cluster_of(*objects)
    ids = Ids(cluster, "a")
    return compile_node(cluster, "a", ids), ids


WEB = pod("web", "10.0.1.2", labels={"app": "web"}, ports=[{"name": "http", "containerPort": 80}])
ALT = pod("alt", "10.0.1.3", labels={"app": "web"}, ports=[{"name": "http", "containerPort": 81}])
FAR = pod("far", "10.0.2.2", node="b", labels={"app": "far"})
HTTP = [{"port": "http"}]
TO_WEB = [{"podSelector": {"matchLabels": {"app": "web"}}}]
FROM_FAR = [{"podSelector": {"matchLabels": {"app": "far"}}}]

CASES = [
    ("no policy is open", [], WEB, "egress", "10.0.2.2", 1, "TCP", True, 0),
    ("an empty policy isolates", [{}], WEB, "ingress", "10.0.2.2", 1, "TCP", False, 1),
    ("… in its own direction only", [{}], WEB, "egress", "10.0.2.2", 1, "TCP", True, 0),
    ("an empty rule allows a protocol without ports", [{"ingress": [{}]}], WEB, "ingress",
     "198.51.100.1", None, "ICMP", True, 1),
    ("a rule with ports does not", [{"ingress": [{"ports": [{"port": 80}]}]}], WEB, "ingress",
     "198.51.100.1", None, "ICMP", False, 1),
    ("UDP is not TCP", [{"ingress": [{"ports": [{"port": 80, "protocol": "UDP"}]}]}], WEB,
     "ingress", "10.0.2.2", 80, "TCP", False, 1),
    ("all rules that match are named", [{"ingress": [{}, {"from": FROM_FAR}]}], WEB, "ingress",
     "10.0.2.2", 80, "TCP", True, 2),
    ("a name is looked up on the subject", [{"ingress": [{"ports": HTTP}]}], ALT, "ingress",
     "10.0.2.2", 81, "TCP", True, 1),
    ("… whose number may differ", [{"ingress": [{"ports": HTTP}]}], ALT, "ingress",
     "10.0.2.2", 80, "TCP", False, 1),
    ("a name is looked up on the peer", [{"egress": [{"to": TO_WEB, "ports": HTTP}]}], WEB,
     "egress", "10.0.1.3", 81, "TCP", True, 1),
    ("… not on the subject", [{"egress": [{"to": TO_WEB, "ports": HTTP}]}], WEB,
     "egress", "10.0.1.3", 80, "TCP", False, 1),
    ("an address outside has no names", [{"egress": [{"ports": HTTP}]}], WEB,
     "egress", "198.51.100.1", 80, "TCP", False, 1),
    ("a block contains pods", [{"egress": [{"to": [{"ipBlock": {"cidr": "10.0.2.99/24"}}]}]}], WEB,
     "egress", "10.0.2.2", 80, "TCP", True, 1),
    ("a block contains nodes", [{"egress": [{"to": [{"ipBlock": {"cidr": "192.0.2.0/30"}}]}]}],
     WEB, "egress", "192.0.2.1", 80, "TCP", True, 1),
    ("except takes out", [{"egress": [{"to": [{"ipBlock": {
        "cidr": "0.0.0.0/0", "except": ["198.51.100.0/25"]}}]}]}], WEB,
     "egress", "198.51.100.1", 80, "TCP", False, 1),
    ("… only what it says", [{"egress": [{"to": [{"ipBlock": {
        "cidr": "0.0.0.0/0", "except": ["198.51.100.0/25"]}}]}]}], WEB,
     "egress", "198.51.100.129", 80, "TCP", True, 1),
    ("an IPv6 block has no IPv4", [{"egress": [{"to": [{"ipBlock": {"cidr": "::/0"}}]}]}], WEB,
     "egress", "198.51.100.1", 80, "TCP", False, 1),
    ("endPort is inclusive", [{"ingress": [{"ports": [{"port": 80, "endPort": 90}]}]}], WEB,
     "ingress", "10.0.2.2", 90, "TCP", True, 1),
    ("65535 is a port", [{"ingress": [{"ports": [{"port": 1, "endPort": 65535}]}]}], WEB,
     "ingress", "10.0.2.2", 65535, "TCP", True, 1),
]  # fmt: skip


@pytest.mark.parametrize(
    ("specs", "own", "direction", "peer", "port", "protocol", "allow", "named"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_verdict(specs, own, direction, peer, port, protocol, allow, named) -> None:
    policies = [
        policy(f"p{n}", **{"podSelector": {}, "policyTypes": [], **spec})
        for n, spec in enumerate(specs)
    ]
    if any("egress" in spec for spec in specs):
        assert direction == "egress"
    tables, ids = compiled(WEB, ALT, FAR, *policies)
    found = ask(tables, ids, own, direction, peer, port, protocol)
    assert found.allowed is allow
    assert len(found.rules or found.policies) == named


def test_peers_know_pods_and_nodes() -> None:
    done = pod("done", "10.0.1.9", phase="Succeeded")
    tables, ids = compiled(WEB, FAR, done)
    kinds = {address: (peer.kind, peer.target) for address, peer in tables.peers.items()}
    assert kinds == {
        parse_address("10.0.1.2"): (PEER_LOCAL, ids.slot("uid-web")),
        parse_address("10.0.2.2"): (PEER_REMOTE, 2),
        parse_address("192.0.2.1"): (PEER_HOST, 0),
        parse_address("192.0.2.2"): (PEER_NODE, 2),
    }


def test_a_pod_of_another_plugin_is_a_peer_that_the_stack_reaches() -> None:
    cluster = cluster_of(WEB, ALT, policy("p", podSelector={}))
    ids = Ids(cluster, "a")
    slot = ids.slot
    ids.slot = lambda uid: ON_HOST if uid == ALT.metadata.uid else slot(uid)  # type: ignore[method-assign]
    tables = compile_node(cluster, "a", ids)
    peer = tables.peers[parse_address(ALT.ips[0])]
    assert (peer.kind, peer.target, peer.endpoint) == (PEER_HOST, 0, ids.endpoint(ALT))
    assert set(tables.endpoints) == {slot(WEB.metadata.uid)}, "nobody enforces policies for it"


def test_equal_policy_sets_share_rows_and_columns() -> None:
    tables, _ = compiled(WEB, ALT, policy("p", podSelector={}))
    one, other = tables.endpoints.values()
    assert (one.rows, one.cols) == (other.rows, other.cols)


def test_an_address_of_two_pods_goes_to_the_one_that_stays() -> None:
    going = pod("gone", "10.0.1.2")
    meta = msgspec.structs.replace(going.metadata, deletion_timestamp="2026-01-01T00:00:00Z")
    going = msgspec.structs.replace(going, metadata=meta)
    for order in ((WEB, going), (going, WEB)):
        tables, ids = compiled(*order)
        assert tables.peers[parse_address("10.0.1.2")].endpoint == ids.endpoint(WEB)
        assert len(tables.errors) == 1
        assert "x/gone" in tables.errors[0]


def test_a_bad_block_is_reported_and_matches_nothing() -> None:
    bad = policy("bad", podSelector={}, ingress=[{"from": [{"ipBlock": {"cidr": "10.0.0.0/99"}}]}])
    tables, ids = compiled(WEB, bad)
    assert not ask(tables, ids, WEB, "ingress", "10.0.2.2", 80, "TCP").allowed
    assert "NetworkPolicy x/bad: spec.ingress[0].from[0].ipBlock" in tables.errors[0]


def test_a_reused_image_is_equal() -> None:
    cluster = generate.cluster(Random(7))
    ids = Ids(cluster, "a")
    cold = compile_node(cluster, "a", ids)
    warm = compile_node(cluster, "a", ids, cold)
    assert np.array_equal(cold.image, warm.image)
    assert cold.peers == warm.peers
    assert cold.endpoints == warm.endpoints


def test_the_constants_are_those_of_the_kernel() -> None:
    header = (Path(__file__).parents[2] / "bpf" / "types.h").read_text()
    found = dict(
        re.findall(r"^(?:#define|\t)\s*(\w+)\s+=?\s*(0x[0-9a-f]+|[0-9]+)u?\b", header, re.M)
    )
    names = [n for n in vars(table_constants) if n.isupper() and n in found]
    assert len(names) >= 15
    assert {n: int(found[n], 0) for n in names} == {n: getattr(table_constants, n) for n in names}


# ---- Services -------------------------------------------------------------------------


def service(**spec) -> Service:
    return msgspec.convert({"metadata": {"namespace": "x", "name": "shop"}, "spec": spec}, Service)


def slice_of(
    *endpoints: tuple[str, bool | None], name="shop", family="IPv4", port=8080
) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(
            namespace="x", name=f"{name}-{family}", labels={"kubernetes.io/service-name": name}
        ),
        address_type=family,
        endpoints=[
            Endpoint(addresses=[ip], conditions=EndpointConditions(ready=ready))
            for ip, ready in endpoints
        ],
        ports=[EndpointPort(name="http", port=port)],
    )


SHOP = {"clusterIP": "10.96.0.1", "ports": [{"name": "http", "port": 80}]}
SHOP_KEY = (parse_address("10.96.0.1"), 80, 6)


def test_a_service_has_its_ready_backends() -> None:
    slices = slice_of(("10.0.1.2", True), ("10.0.2.2", None), ("10.0.1.3", False))
    tables, ids = compiled(WEB, FAR, service(**SHOP), slices)
    view = tables.services[SHOP_KEY]
    assert backends_of(tables, view) == [
        (parse_address("10.0.1.2"), 8080, ids.endpoint(WEB)),
        (parse_address("10.0.2.2"), 8080, ids.endpoint(FAR)),
    ]
    assert tables.backends.keys() == {
        (a, view.id, 8080, 6) for a, _, _ in backends_of(tables, view)
    }
    assert tables.services[SHOP_KEY[0], 0, 0].count == 0


def test_a_service_may_publish_addresses_that_are_not_ready() -> None:
    shop = service(**SHOP, publishNotReadyAddresses=True)
    tables, _ = compiled(shop, slice_of(("10.0.1.3", False)))
    assert tables.services[SHOP_KEY].count == 1


def test_each_family_has_its_own_backends() -> None:
    shop = service(**SHOP, clusterIPs=["10.96.0.1", "fd00:96::1"])
    four, six = slice_of(("10.0.1.2", True)), slice_of(("fd00::2", True), family="IPv6", port=9)
    tables, _ = compiled(shop, four, six)
    view = tables.services[parse_address("fd00:96::1"), 80, 6]
    assert backends_of(tables, view) == [(parse_address("fd00::2"), 9, 0)]
    assert tables.services[SHOP_KEY].count == 1


READY = {"ready": True, "serving": True, "terminating": False}
ENDING = {"ready": False, "serving": True, "terminating": True}
ENDED = {"ready": False, "serving": False, "terminating": True}
STARTING = {"ready": False, "serving": False, "terminating": False}
LOCAL = {"internalTrafficPolicy": "Local"}


@pytest.mark.parametrize(
    ("spec", "endpoints", "serve"),
    [
        pytest.param({}, [("a", READY), ("b", ENDING)], [0], id="ready-before-ending"),
        pytest.param({}, [("a", ENDING), ("b", ENDED)], [0], id="ending-where-none-is-ready"),
        pytest.param({}, [("a", {"terminating": True, "ready": False})], [0], id="serving-unsaid"),
        pytest.param({}, [("a", STARTING), ("a", ENDED)], [], id="neither-starting-nor-ended"),
        pytest.param(LOCAL, [("a", READY), ("b", READY), ("", READY)], [0], id="local-only"),
        pytest.param(LOCAL, [("b", READY)], [], id="none-on-this-node"),
        pytest.param(LOCAL, [("a", ENDING), ("b", READY)], [0], id="local-and-ending"),
        pytest.param(
            {"internalTrafficPolicy": "Cluster"}, [("b", READY)], [0], id="anywhere-in-the-cluster"
        ),
    ],
)
def test_which_endpoints_serve(
    spec: dict[str, str], endpoints: list[tuple[str, dict[str, bool]]], serve: list[int]
) -> None:
    slices = replace(
        slice_of(),
        endpoints=[
            Endpoint([f"10.0.3.{n}"], msgspec.convert(conditions, EndpointConditions), node)
            for n, (node, conditions) in enumerate(endpoints)
        ],
    )
    tables, _ = compiled(service(**SHOP, **spec), slices)
    found = [address for address, _, _ in backends_of(tables, tables.services[SHOP_KEY])]
    assert found == [parse_address(f"10.0.3.{n}") for n in serve]


@pytest.mark.parametrize(
    ("spec", "seconds"),
    [
        ({}, 0),
        ({"sessionAffinity": "None"}, 0),
        ({"sessionAffinity": "ClientIP"}, 10800),
        (
            {
                "sessionAffinity": "ClientIP",
                "sessionAffinityConfig": {"clientIP": {"timeoutSeconds": 60}},
            },
            60,
        ),
    ],
)
def test_how_long_clients_keep_their_backend(spec: dict[str, object], seconds: int) -> None:
    tables, _ = compiled(service(**SHOP, **spec), slice_of(("10.0.1.2", True)))
    assert tables.services[SHOP_KEY].affinity == seconds


@pytest.mark.parametrize(
    "label", ["service.kubernetes.io/service-proxy-name", "service.kubernetes.io/headless"]
)
def test_services_and_slices_for_others_are_left_alone(label: str) -> None:
    shop, slices = service(**SHOP), slice_of(("10.0.1.2", True))

    def labelled(item):
        labels = {**item.metadata.labels, label: ""}
        return replace(item, metadata=replace(item.metadata, labels=labels))

    tables, ids = compiled(shop, slices)
    assert tables.services[SHOP_KEY].count == 1
    cluster = cluster_of(shop, labelled(slices))
    tables = compile_node(cluster, "a", ids, tables)
    assert tables.services[SHOP_KEY].count == 0
    tables = compile_node(cluster_of(labelled(shop), slices), "a", ids, tables)
    assert tables.services == {} and tables.backends == {}
    tables = compile_node(cluster_of(shop, slices), "a", ids, tables)
    assert tables.services[SHOP_KEY].count == 1


@pytest.mark.parametrize(
    "spec", [{"clusterIP": "None"}, {"type": "ExternalName", "externalName": "example.org"}]
)
def test_headless_and_external_names_have_no_entries(spec) -> None:
    tables, _ = compiled(service(**{**SHOP, **spec}), slice_of(("10.0.1.2", True)))
    assert tables.services == {}


def test_a_service_without_backends_refuses() -> None:
    tables, _ = compiled(service(**SHOP))
    assert tables.services[SHOP_KEY].count == 0
    assert tables.services[SHOP_KEY].flags == 1


def test_what_did_not_change_is_the_same_object_as_before() -> None:
    cluster = generate.cluster(Random(1))
    ids = Ids(cluster, "a")
    first = compile_node(cluster, "a", ids)
    second = compile_node(cluster, "a", ids, first)
    assert second.peers is first.peers
    assert second.services is first.services
    assert second.backends is first.backends
    assert np.array_equal(second.image, first.image)
