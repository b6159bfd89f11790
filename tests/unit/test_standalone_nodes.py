"""Node manifests to nodes with numbers, addresses and pod CIDRs; what of them is refused."""

from __future__ import annotations

import pytest

from lockgate.objects.model import Node, Object
from lockgate.objects.parse import parse
from lockgate.standalone.nodes import MOST, make_nodes, node_number, overlap, refused


def objects(*nodes: str) -> list[Object]:
    text = "---\n".join(f"apiVersion: v1\nkind: Node\nmetadata: {n}\n" for n in nodes)
    return parse(text, "test.yaml").objects


def internal(node: Node) -> list[str]:
    return [a.address for a in node.status.addresses if a.type == "InternalIP"]


def test_nodes_have_addresses_and_pod_cidrs_of_both_families() -> None:
    node = make_nodes([], 2)["node-2"]
    assert node.spec.pod_cidrs == ["10.244.2.0/24", "fd00:10:244:2::/64"]
    assert internal(node) == ["172.30.0.12", "fd00:172:30::12"]


@pytest.mark.parametrize(
    ("after", "numbers"),
    [
        (["{name: a}", "{name: b}"], {"a": 1, "b": 2}),
        (["{name: b}", "{name: a}"], {"b": 2, "a": 1}),
        (["{name: b}"], {"b": 2}),
        (["{name: c}", "{name: a}", "{name: b}"], {"c": 3, "a": 1, "b": 2}),
        (["{name: c}", "{name: d}"], {"c": 3, "d": 4}),
        ([], {"node-1": 3, "node-2": 4}),
    ],
)
def test_a_node_that_runs_keeps_its_number_and_new_ones_come_after(
    after: list[str], numbers: dict[str, int]
) -> None:
    before = make_nodes(objects("{name: a}", "{name: b}"), 2)
    nodes = make_nodes(objects(*after), 2, before, last=2)
    assert {name: node_number(node) for name, node in nodes.items()} == numbers


def test_numbers_begin_again_at_the_end_and_pass_over_those_in_use() -> None:
    before = make_nodes(objects("{name: a}"), 2)
    nodes = make_nodes(objects("{name: a}", "{name: b}"), 2, before, last=MOST)
    assert [node_number(node) for node in nodes.values()] == [1, 2]


def test_a_node_that_runs_takes_other_labels_and_nothing_else() -> None:
    before = make_nodes(objects("{name: a}\nspec: {podCIDR: 10.9.0.0/24}"), 2)
    after = make_nodes(objects("{name: a, labels: {d: x}}"), 2, before, last=1)["a"]
    assert after.metadata.labels["d"] == "x"
    assert (after.spec, after.status) == (before["a"].spec, before["a"].status)


@pytest.mark.parametrize(
    ("saved", "sentences"),
    [
        (["{name: a}", "{name: b}"], []),
        (["{name: a}\nspec: {podCIDR: 10.244.1.0/24}"], ["Node a, field spec.podCIDRs: a node"]),
        (["{name: a}\nspec: {podCIDRs: [10.9.0.0/24]}"], ["Node a, field spec.podCIDRs: a node"]),
        (
            ["{name: a}", "{name: b}\nspec: {podCIDR: 10.244.0.0/16}"],
            ["Node b, field spec.podCIDRs: 10.244.0.0/16 overlaps 10.244.1.0/24 of Node a"],
        ),
        (
            ["{name: b}\nspec: {podCIDR: 10.9.0.0/24}", "{name: c}\nspec: {podCIDR: 10.9.0.0/25}"],
            ["Node c, field spec.podCIDRs: 10.9.0.0/25 overlaps 10.9.0.0/24 of Node b"],
        ),
        (
            [f"{{name: n{n}}}" for n in range(MOST + 1)],
            [f"Node n{MOST}: a cluster has {MOST} nodes at most"],
        ),
    ],
)
def test_what_cannot_be_is_one_sentence_with_node_and_field(
    saved: list[str], sentences: list[str]
) -> None:
    before = make_nodes(objects("{name: a}"), 2)
    items = objects(*saved)
    running = before if any("name: a}" in one for one in saved) else {}
    found = refused(items, make_nodes(items, 2, running, last=1), running)
    assert len(found) == len(sentences), found
    assert all(f.startswith(s) for f, s in zip(found, sentences, strict=True)), found


def test_pod_cidrs_overlap_within_a_family_only() -> None:
    nodes = make_nodes(
        objects(
            "{name: a}\nspec: {podCIDR: 10.9.0.0/24}",
            "{name: b}\nspec: {podCIDRs: ['fd00::/64', 10.9.0.128/25]}",
            "{name: c}\nspec: {podCIDR: 'fd00::/48'}",
        ),
        1,
    )
    a, b, c = nodes.values()
    assert overlap(a, b) == "10.9.0.0/24 overlaps 10.9.0.128/25"
    assert overlap(a, c) == ""
    assert overlap(b, c) == "fd00::/64 overlaps fd00::/48"
