"""Who gets which address, and where it leads (cluster/load_balancers.py)."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from cluster.load_balancers import FINALIZER, LoadBalancers, Service, addresses_of, next_hops


def service(*addresses: str, deleted: bool = False, finalizer: bool = True, **spec: Any) -> Service:
    metadata: dict[str, Any] = {"name": "web", "namespace": "shop", "resourceVersion": "7"}
    metadata["finalizers"] = ["other/one", *([FINALIZER] if finalizer else [])]
    if deleted:
        metadata["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    ingress = [{"ip": address} for address in addresses]
    raw = {
        "metadata": metadata,
        "spec": {"type": "LoadBalancer", "ipFamilies": ["IPv4"], **spec},
        "status": {"loadBalancer": {"ingress": ingress}},
    }
    return msgspec.convert(raw, Service)


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (service(), True),
        (service(type="NodePort"), False),
        (service(loadBalancerClass="another/one"), False),
        (service(deleted=True), False),
    ],
)
def test_who_is_to_have_a_load_balancer(one: Service, expected: bool) -> None:
    assert one.wants is expected


def test_an_address_of_each_family_and_none_given_up() -> None:
    free = {"IPv4": iter(["4.1", "4.2"]), "IPv6": iter(["6::1"])}
    assert addresses_of(service("9.9"), free) == ["9.9"]
    assert addresses_of(service("9.9", ipFamilies=["IPv6", "IPv4"]), free) == ["6::1", "9.9"]
    assert addresses_of(service(), free) == ["4.1"]


@pytest.mark.parametrize(
    ("one", "healthy", "expected"),
    [
        pytest.param(service(), [], [1, 2, 3], id="all that are ready"),
        pytest.param(service(healthCheckNodePort=30000), [2, 9], [2], id="who has endpoints"),
        pytest.param(service(healthCheckNodePort=30000), [], [1, 2, 3], id="all where nobody has"),
    ],
)
def test_where_an_address_leads(one: Service, healthy: list[int], expected: list[int]) -> None:
    assert next_hops(one, [1, 2, 3], healthy) == expected


def test_with_affinity_it_is_one_node_while_that_is_there() -> None:
    one = service(sessionAffinity="ClientIP", healthCheckNodePort=30000)
    (first,) = next_hops(one, [1, 2, 3], [1, 2, 3])
    assert next_hops(one, [3, 2, 1], [3, 1, 2]) == [first]
    others = [number for number in (1, 2, 3) if number != first]
    assert set(next_hops(one, [1, 2, 3], others)) <= set(others)


@pytest.mark.parametrize(
    ("one", "wrote"),
    [
        pytest.param(
            service(finalizer=False),
            ("", {"metadata": {"finalizers": ["other/one", FINALIZER]}}),
            id="first the finalizer",
        ),
        pytest.param(
            service(),
            (
                "/status",
                {"status": {"loadBalancer": {"ingress": [{"ip": "4.1", "ipMode": "VIP"}]}}},
            ),
            id="then the address",
        ),
        pytest.param(service("4.1"), None, id="then nothing"),
        pytest.param(
            service("4.1", type="ClusterIP"),
            ("/status", {"status": {"loadBalancer": None}}),
            id="it gives the address back",
        ),
        pytest.param(
            service(type="ClusterIP"),
            ("", {"metadata": {"finalizers": ["other/one"]}}),
            id="and is let go",
        ),
    ],
)
def test_what_is_written(
    one: Service, wrote: tuple[str, dict[str, Any]] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple[str, dict[str, Any]]] = []

    async def patch(_self: Any, _service: Service, part: str, body: dict[str, Any]) -> None:
        done.append((part, body))

    monkeypatch.setattr(LoadBalancers, "_patch", patch)
    balancers = LoadBalancers.__new__(LoadBalancers)
    asyncio.run(balancers._give(one, ["4.1"]) if one.wants else balancers._take(one))
    assert done == ([wrote] if wrote else [])
