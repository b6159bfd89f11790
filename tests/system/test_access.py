"""What a user elsewhere is told is what one on the machine is told: the agents' calls."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from typing import Any

import pytest

from lockgate.access import Place, Refused, Target
from lockgate.access.sockets import call
from lockgate.access.standalone import StandaloneAccess, agent_probe
from lockgate.bpf.btf import Schema
from lockgate.explain.asked import AskedNode
from lockgate.explain.engine import explain
from lockgate.explain.kernel import KernelEngine
from lockgate.explain.pinned import NodePlace, PinnedNode
from lockgate.explain.question import Question
from lockgate.paths import bpf_object
from tests.system.harness import ROOT, Cluster, unique_name

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("shop")
    for path in (ROOT / "examples" / "shop").glob("*.yaml"):
        shutil.copy(path, folder)
    with Cluster(folder, unique_name("ta")) as cluster:
        yield cluster


def test_agents_explain_as_pins_do(shop: Cluster) -> None:
    access = StandaloneAccess(shop.state)
    cluster = access.objects()
    schema = Schema.from_object(bpf_object())

    def pinned(name: str) -> PinnedNode:
        state = shop.state
        journal = state.node(name) / "journal.jsonl"
        return PinnedNode(
            name, NodePlace(state.pins() / name, state.netns_path(name), journal), schema
        )

    pods = ["/".join(key) for key in sorted(cluster.pods)]
    ends = [*pods, *(f"svc/{'/'.join(key)}" for key in sorted(cluster.services)), "203.0.113.7"]
    ends += [shop.node_ip("node-1"), shop.node_ip("node-2", 6)]
    questions = [
        Question(source, target, 8080, "TCP")
        for source in [*pods, *ends[-3:]]
        for target in ends
        if source != target
    ]
    with (
        KernelEngine(cluster, pinned, schema) as near,
        KernelEngine(cluster, lambda name: AskedNode(access, name), schema) as far,
    ):
        expected = [answer.json() for answer in explain(near, questions)]
        assert [answer.json() for answer in explain(far, questions)] == expected
    assert {answer.get("verdict") for answer in expected} >= {"allow", "deny"}


def test_an_agent_makes_connections_from_a_pods_network(shop: Cluster) -> None:
    access = StandaloneAccess(shop.state)
    gateway = shop.pod("payments/gateway-0")
    vault = shop.pod("payments/vault-0")
    web = shop.pod("shop/web-0")
    ends: list[tuple[str, str, int]] = [
        ("tcp", vault.ip(4), 8200),
        ("tcp", vault.ip(6), 8200),
        ("tcp", shop.service_ip("payments/vault"), 8200),
    ]

    def results(source: Any) -> list[str]:
        place = {"netns": str(source.netns)}
        targets = [Target(*end, timeout=0.5) for end in ends]
        found = agent_probe(access, source.node, place, targets)
        return [result.result for _, result in found]

    assert results(gateway) == ["ok", "ok", "ok"]
    assert results(web) == ["timeout", "timeout", "timeout"]


def test_a_node_tries_its_own_pods(shop: Cluster) -> None:
    access = StandaloneAccess(shop.state)
    pod = shop.pod("shop/web-0")
    targets = [Target("tcp", ip, port, 2.0) for ip in pod.ips for port in (8080, 9)]
    found = [result.result for _, result in access.probe(Place(pod.node), targets)]
    assert found == ["ok", "refused"] * 2


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ({"from": {"uid": "nobody"}, "targets": []}, "pod nobody has no endpoint on node node-1"),
        ({"targets": [{"protocol": "sctp", "address": "10.0.0.1", "port": 1}]}, "protocol"),
        ({"targets": [{}] * 3}, "protocol"),
    ],
    ids=["no such pod", "a protocol it does not speak", "half a target"],
)
def test_what_an_agent_cannot_try(shop: Cluster, body: dict[str, Any], complaint: str) -> None:
    with pytest.raises(Refused, match=complaint):
        call(shop.state.agent("node-1"), "POST", "/v1/probe", body)
