"""What services of a standalone cluster get: NodePorts, load balancers' addresses, hints."""

from __future__ import annotations

import msgspec
import pytest

from lockgate.objects.model import Service
from lockgate.objects.parse import parse
from lockgate.standalone.controllers import Memory, Plan, endpoint_slices
from lockgate.standalone.controllers import plan as make_plan
from lockgate.standalone.nodes import make_nodes
from tests.unit.test_standalone_controllers import planned, running, service, workload

NODES = "".join(
    f"apiVersion: v1\nkind: Node\nmetadata: {{name: n{n}, labels:"
    f" {{topology.kubernetes.io/zone: {zone}}}}}\n---\n"
    for n, zone in ((1, "east"), (2, "west"))
)


def of(plan: Plan, name: str = "web") -> Service:
    return plan.services["default", name]


def ports(plan: Plan, name: str = "web") -> list[int]:
    return [port.node_port for port in of(plan, name).spec.ports]


def ingress(plan: Plan, name: str = "web") -> list[str]:
    return [one.ip for one in of(plan, name).status.load_balancer.ingress]


def test_a_node_port_stays_whatever_comes_beside_it() -> None:
    memory = Memory()
    text = service("web", type="NodePort")
    (before,) = ports(planned(text, memory))
    assert 30000 <= before < 32768
    crowd = "".join(service(f"a{n}", type="NodePort") for n in range(300))
    plan = planned(crowd + text, memory)
    assert ports(plan) == [before]
    given = [number for name in plan.services for number in ports(plan, name[1])]
    assert len(set(given)) == 301 and not plan.warnings
    # A cluster that is started again gives the same.
    assert ports(planned(text)) == [before]


def test_node_ports_written_by_hand_are_respected_and_taken_by_nobody() -> None:
    memory = Memory()
    (given,) = ports(planned(service("web", type="NodePort"), memory))
    by_hand = service("api", type="NodePort", ports=[{"port": 80, "nodePort": given}])
    plan = planned(by_hand + service("web", type="NodePort"), memory)
    assert ports(plan, "api") == [given] and ports(plan) != [given]


def test_two_that_ask_for_one_node_port_are_named() -> None:
    one = [{"port": 80, "nodePort": 30080}]
    plan = planned(
        service("web", type="NodePort", ports=one) + service("api", type="NodePort", ports=one)
    )
    assert plan.warnings == [
        "Service default/web: spec.ports[0].nodePort 30080/TCP is also Service default/api's, which"
        " keeps it"
    ]
    other = [{"port": 80, "nodePort": 30080, "protocol": "UDP"}]
    text = service("web", type="NodePort", ports=other) + service("api", type="NodePort", ports=one)
    assert planned(text).warnings == []


@pytest.mark.parametrize(
    ("spec", "has_port", "health"),
    [
        ({"type": "ClusterIP"}, False, False),
        ({"type": "NodePort"}, True, False),
        ({"type": "LoadBalancer"}, True, False),
        ({"type": "LoadBalancer", "allocateLoadBalancerNodePorts": False}, False, False),
        ({"type": "LoadBalancer", "externalTrafficPolicy": "Local"}, True, True),
        ({"type": "NodePort", "externalTrafficPolicy": "Local"}, True, False),
    ],
)
def test_who_gets_node_ports(spec: dict[str, object], has_port: bool, health: bool) -> None:
    plan = planned(service("web", **spec))
    assert bool(ports(plan)[0]) == has_port
    assert bool(of(plan).spec.health_check_node_port) == health


def test_type_switches_give_ports_back() -> None:
    memory = Memory()
    planned(service("web", type="LoadBalancer", externalTrafficPolicy="Local"), memory)
    plan = planned(service("web"), memory)
    assert ports(plan) == [0] and memory.node_ports == {} and memory.balancers == {}
    assert ingress(plan) == []


def test_load_balancers_get_an_address_of_each_family_and_keep_it() -> None:
    memory = Memory()
    text = service("web", type="LoadBalancer", ipFamilyPolicy="PreferDualStack")
    four, six = ingress(planned(text, memory))
    assert four.startswith("172.31.255.") and six.startswith("fd00:172:31:255::")
    crowd = "".join(service(f"a{n}", type="LoadBalancer") for n in range(100))
    plan = planned(crowd + text, memory)
    assert ingress(plan) == [four, six]
    assert len({ip for name in plan.services for ip in ingress(plan, name[1])}) == 102


def test_a_load_balancer_ip_is_respected() -> None:
    memory = Memory()
    (given,) = ingress(planned(service("web", type="LoadBalancer"), memory))
    asks = service("api", type="LoadBalancer", loadBalancerIP=given)
    plan = planned(asks + service("web", type="LoadBalancer"), memory)
    assert ingress(plan, "api") == [given] and ingress(plan) != [given]
    assert not plan.warnings
    twice = planned(asks + service("web", type="LoadBalancer", loadBalancerIP=given))
    assert twice.warnings == [
        f"Service default/web: spec.loadBalancerIP {given} is also Service default/api's"
    ]
    far = planned(service("web", type="LoadBalancer", loadBalancerIP="192.0.2.1"))
    assert far.warnings == [
        "Service default/web: spec.loadBalancerIP 192.0.2.1 is not of 172.31.255.0/24, so nobody"
        " outside has a route to it"
    ]


def test_another_class_is_another_load_balancers() -> None:
    mine = service("web", type="LoadBalancer", loadBalancerClass="lockgate.dev/standalone")
    assert len(ingress(planned(mine))) == 1
    other = service("web", type="LoadBalancer", loadBalancerClass="example.com/lb")
    assert ingress(planned(other)) == []
    told = other.rstrip("-\n") + "\nstatus: {loadBalancer: {ingress: [{ip: 192.0.2.9}]}}\n"
    assert ingress(planned(told)) == ["192.0.2.9"]


@pytest.mark.parametrize(
    ("distribution", "hints_zone", "hints_node"),
    [
        (None, False, False),
        ("PreferClose", True, False),
        ("PreferSameZone", True, False),
        ("PreferSameNode", True, True),
    ],
)
def test_hints_follow_the_traffic_distribution(
    distribution: str | None, hints_zone: bool, hints_node: bool
) -> None:
    more = {"trafficDistribution": distribution} if distribution else {}
    text = NODES + workload("Deployment", "web", 2) + service("web", **more)
    objects = parse(text, "t.yaml").objects
    nodes = make_nodes(objects, 2)
    plan = make_plan(objects, nodes, Memory())
    (one,) = endpoint_slices(plan.services, running(plan), nodes).values()
    assert {e.zone for e in one.endpoints} == {"east", "west"}
    for endpoint in one.endpoints:
        zones = [hint.name for hint in endpoint.hints.for_zones]
        assert zones == ([endpoint.zone] if hints_zone else [])
        names = [hint.name for hint in endpoint.hints.for_nodes]
        assert names == ([endpoint.node_name] if hints_node else [])


def test_a_pod_that_ends_is_told_as_terminating_and_without_hints() -> None:
    text = workload("Deployment", "web", 1) + service("web", trafficDistribution="PreferSameNode")
    plan = planned(text)
    (key, pod), *_ = running(plan).items()
    meta = msgspec.structs.replace(pod.metadata, deletion_timestamp="2026-01-01T00:00:00Z")
    ending = msgspec.structs.replace(pod, metadata=meta)
    (one,) = endpoint_slices(plan.services, {key: ending}, plan.nodes).values()
    conditions = one.endpoints[0].conditions
    assert (conditions.ready, conditions.serving, conditions.terminating) == (False, True, True)
    assert one.endpoints[0].hints.for_nodes == []
