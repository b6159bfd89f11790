"""What load balancers are told: which services are asked about, and their endpoints here."""

from __future__ import annotations

from typing import Any

import pytest

from lockgate.agent import health_counts
from lockgate.agent.health_counts import Asked, HealthCounts, health_port, ready_here
from lockgate.agent.service_health import LATE, KeepingUp, eligible
from lockgate.objects.changes import Changed
from lockgate.objects.model import (
    Cluster,
    Endpoint,
    EndpointConditions,
    EndpointPort,
    EndpointSlice,
    Node,
    NodeSpec,
    ObjectMeta,
    Service,
    ServicePort,
    ServiceSpec,
    Taint,
)

ASKED = {
    "type": "LoadBalancer",
    "external_traffic_policy": "Local",
    "health_check_node_port": 30777,
}


def service(name: str = "web", labels: dict[str, str] | None = None, **spec: Any) -> Service:
    given = {"cluster_ips": ["10.96.0.1", "fd96::1"], "ports": [ServicePort(port=80)]}
    meta = ObjectMeta(name=name, namespace="shop", labels=labels or {})
    return Service(metadata=meta, spec=ServiceSpec(**(given | ASKED | spec)))


def endpoint(address: str, node: str = "one", **conditions: bool) -> Endpoint:
    return Endpoint(
        addresses=[address], node_name=node, conditions=EndpointConditions(**conditions)
    )


def of(
    service: str, *endpoints: Endpoint, ports: tuple[int | None, ...] = (8080,), v6: bool = False
) -> EndpointSlice:
    return EndpointSlice(
        metadata=ObjectMeta(
            name="slice", namespace="shop", labels={"kubernetes.io/service-name": service}
        ),
        address_type="IPv6" if v6 else "IPv4",
        endpoints=list(endpoints),
        ports=[EndpointPort(port=port, name=f"p{port}") for port in ports],
    )


@pytest.mark.parametrize(
    ("spec", "labels", "port"),
    [
        ({}, {}, 30777),
        ({"type": "NodePort"}, {}, 0),
        ({"external_traffic_policy": "Cluster"}, {}, 0),
        ({"external_traffic_policy": ""}, {}, 0),
        ({"health_check_node_port": 0}, {}, 0),
        ({}, {"service.kubernetes.io/service-proxy-name": "other"}, 0),
        ({}, {"service.kubernetes.io/headless": ""}, 0),
    ],
    ids=["asked about", "NodePort", "Cluster", "no policy", "no port", "another's", "headless"],
)
def test_who_is_asked_about(spec: dict[str, Any], labels: dict[str, str], port: int) -> None:
    assert health_port(service(labels=labels, **spec)) == port


@pytest.mark.parametrize(
    ("slices", "count"),
    [
        ([], 0),
        ([of("web", endpoint("10.0.0.1", ready=True))], 1),
        ([of("web", endpoint("10.0.0.1"))], 1),
        ([of("web", endpoint("10.0.0.1", "two", ready=True))], 0),
        ([of("web", endpoint("10.0.0.1", ready=False))], 0),
        ([of("web", endpoint("10.0.0.1", ready=False, serving=True, terminating=True))], 0),
        ([of("web", endpoint("10.0.0.1"), endpoint("10.0.0.2"))], 2),
        ([of("web", endpoint("10.0.0.1"), ports=(80, 443))], 1),
        ([of("web", endpoint("10.0.0.1"), ports=(80,)), of("web", endpoint("10.0.0.1"))], 1),
        ([of("web", endpoint("10.0.0.1"), ports=(None,))], 0),
        ([of("web", endpoint("fd00::1"), v6=True)], 0),
    ],
    ids=[
        "none",
        "ready",
        "not said, which means ready",
        "on another node",
        "not ready",
        "serves while it ends",
        "two",
        "two ports of one",
        "one in two slices",
        "any port",
        "of the other family",
    ],
)
def test_what_counts_as_an_endpoint_here(slices: list[EndpointSlice], count: int) -> None:
    assert ready_here(slices, "one", "IPv4") == count


def cluster(*services: Service, **slices: EndpointSlice) -> Cluster:
    return Cluster(
        services={("shop", one.metadata.name): one for one in services},
        slices={("shop", name): one for name, one in slices.items()},
    )


WEB = ("shop", "web")


def test_counts_follow_what_changes() -> None:
    counts = HealthCounts("one")
    now = cluster(service(), a=of("web", endpoint("10.0.0.1")))
    assert counts.follow(now, None)
    assert counts.asked == {WEB: Asked(30777, {"IPv4": 1, "IPv6": 0})}

    now.slices["shop", "b"] = of("web", endpoint("fd00::1"), endpoint("fd00::2"), v6=True)
    assert not counts.follow(now, Changed(slices={("shop", "b")})), "no port is another"
    assert counts.asked == {WEB: Asked(30777, {"IPv4": 1, "IPv6": 2})}

    now.slices["shop", "a"] = of("other", endpoint("10.0.0.1"))
    counts.follow(now, Changed(slices={("shop", "a")}))
    assert counts.asked[WEB].counts == {"IPv4": 0, "IPv6": 2}, "it is another service's now"

    del now.slices["shop", "b"]
    counts.follow(now, Changed(slices={("shop", "b")}))
    assert counts.asked[WEB].counts == {"IPv4": 0, "IPv6": 0}

    now.slices["shop", "a"] = of("web", endpoint("10.0.0.1"))
    now.services[WEB] = service(health_check_node_port=30778)
    assert counts.follow(now, Changed(services={WEB}, slices={("shop", "a")}))
    assert counts.asked == {WEB: Asked(30778, {"IPv4": 1, "IPv6": 0})}

    now.services[WEB] = service(type="ClusterIP")
    assert counts.follow(now, Changed(services={WEB}))
    assert counts.asked == {}

    now.services[WEB] = service(cluster_ips=["10.96.0.1"])
    assert counts.follow(now, Changed(services={WEB}))
    assert counts.asked == {WEB: Asked(30777, {"IPv4": 1})}, "its slices were there before"

    del now.services[WEB]
    assert counts.follow(now, Changed(services={WEB}))
    assert counts.asked == {}


def test_all_count_of_a_service_that_asks_for_all() -> None:
    counts = HealthCounts("one")
    slices = {"a": of("web", endpoint("10.0.0.1", ready=False), endpoint("10.0.0.2", "two"))}
    now = cluster(service(publish_not_ready_addresses=True), **slices)
    counts.follow(now, None)
    assert counts.asked[WEB].counts["IPv4"] == 1


def test_another_services_pods_cost_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    services = [service(f"s{n}", health_check_node_port=30000 + n) for n in range(50)]
    slices = {f"s{n}": of(f"s{n}", endpoint(f"10.0.0.{n}")) for n in range(50)}
    now, counts = cluster(*services, **slices), HealthCounts("one")
    counts.follow(now, None)
    asked = []
    real = health_counts.ready_here

    def noting(slices: Any, node: str, family: str, everyone: bool) -> int:
        asked.append(next(iter(slices)).service)
        return real(slices, node, family, everyone)

    monkeypatch.setattr(health_counts, "ready_here", noting)
    now.slices["shop", "s7"] = of("s7", endpoint("10.0.0.7"), endpoint("10.0.0.77"))
    counts.follow(now, Changed(slices={("shop", "s7")}))
    assert set(asked) == {"s7"}
    assert counts.asked["shop", "s7"].counts["IPv4"] == 2


def test_a_change_that_waits_too_long_makes_it_unhealthy() -> None:
    now = [100.0]
    keeping = KeepingUp(lambda: now[0])
    assert keeping.healthy
    keeping.noted()
    now[0] += LATE - 1
    keeping.noted()
    assert keeping.healthy
    now[0] += 1
    assert not keeping.healthy, "the first has waited too long"
    keeping.done(all_of_it=False)
    assert keeping.healthy
    now[0] += LATE
    assert not keeping.healthy, "the one that came meanwhile waits still"
    keeping.done(all_of_it=True)
    now[0] += 10 * LATE
    assert keeping.healthy


@pytest.mark.parametrize(
    ("node", "stays"),
    [
        (Node(metadata=ObjectMeta(name="one")), True),
        (None, False),
        (Node(metadata=ObjectMeta(name="one", deletion_timestamp="2026-01-01T00:00:00Z")), False),
        (
            Node(
                metadata=ObjectMeta(name="one"),
                spec=NodeSpec(taints=[Taint(key="ToBeDeletedByClusterAutoscaler")]),
            ),
            False,
        ),
        (
            Node(
                metadata=ObjectMeta(name="one"),
                spec=NodeSpec(taints=[Taint(key="node.kubernetes.io/unschedulable")]),
            ),
            True,
        ),
    ],
    ids=["is there", "is not", "is being deleted", "marked by the autoscaler", "another taint"],
)
def test_which_nodes_balancers_should_go_on_with(node: Node | None, stays: bool) -> None:
    assert eligible(node) is stays
