"""`lockgate doctor` finds what is broken: each fault is made, and found, on a cluster that runs."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from tests.system.harness import ROOT, Cluster, Place, unique_name, until

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("shop")
    for path in (ROOT / "examples" / "shop").glob("*.yaml"):
        shutil.copy(path, folder)
    with Cluster(folder, unique_name("td")) as cluster:
        yield cluster


def examine(cluster: Cluster) -> tuple[int, list[dict[str, Any]]]:
    done = cluster.lockgate("doctor", "--json", check=False)
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def faults(found: list[dict[str, Any]]) -> list[tuple[str, str, str]]:
    return [
        (one["severity"], one.get("node", ""), one["check"])
        for one in found
        if one["severity"] != "ok"
    ]


def test_every_way_of_a_sound_cluster_is_open(shop: Cluster) -> None:
    code, found = examine(shop)
    assert (code, faults(found)) == (0, []), [one for one in found if one["severity"] != "ok"]
    ways = [one["text"] for one in found if one["check"] == "path" and one["node"] == "node-1"]
    none = "not tried, the policies allow none that could be"
    assert sorted(ways) == sorted(
        f"{kind} (IPv{family}): {said}"
        for family in (4, 6)
        for kind, said in {
            "pod → pod, same node": "open",
            "pod → pod, other node": "open",
            "node → its pod": "open",
            "node → pod, other node": "open",
            "pod → service": "open",
            "node → service": "open",
            "pod → service, UDP": "open",
            "node → service, UDP": none,
            "pod → outside": "open",
        }.items()
    )


@contextmanager
def nft(place: Place, ruleset: str) -> Iterator[None]:
    place.run("nft", "-f", "-", input=ruleset)
    try:
        yield
    finally:
        place.run("nft", "flush", "ruleset")


@contextmanager
def iptables(place: Place, rule: str) -> Iterator[None]:
    place.run("iptables-legacy", "-A", *rule.split())
    try:
        yield
    finally:
        place.run("iptables-legacy", "-D", *rule.split())


@contextmanager
def setting(place: Place, key: str, value: int) -> Iterator[None]:
    before = place.run("cat", f"/proc/sys/{key}").stdout.strip()
    place.run("sh", "-c", f"echo {value} > /proc/sys/{key}")
    try:
        yield
    finally:
        place.run("sh", "-c", f"echo {before} > /proc/sys/{key}")


@contextmanager
def link(place: Place, change: str, back: str) -> Iterator[None]:
    place.run("ip", "link", *change.split())
    try:
        yield
    finally:
        place.run("ip", "link", *back.split())


INPUT = "table inet f { chain in { type filter hook input priority 0; %s; }; }"
OUTPUT = (
    "table ip f { chain no { %s; }; chain out { type filter hook output priority 0; jump no; }; }"
)

FAULTS: dict[str, tuple[Any, tuple[Any, ...], set[tuple[str, str]], str]] = {
    "a rule that drops what pods answer": (
        nft,
        (INPUT % "ip saddr 10.244.0.0/16 drop",),
        {("warning", "firewall"), ("error", "path")},
        "chain inet f in drops some packets",
    ),
    "a rule behind a jump that drops what goes to pods": (
        nft,
        (OUTPUT % "ip daddr 10.244.0.0/16 counter drop",),
        {("warning", "firewall"), ("error", "path")},
        "chain ip f no drops some packets",
    ),
    "an input policy that lets everything of ours through": (
        nft,
        (INPUT % "policy drop; ip saddr 0.0.0.0/0 accept; meta nfproto ipv6 accept",),
        {("warning", "firewall")},
        "the policy of chain inet f in drops some packets",
    ),
    "a rule of iptables' old tables": (
        iptables,
        ("INPUT -s 10.244.0.0/16 -j DROP",),
        {("warning", "firewall"), ("error", "path")},
        "chain ip filter INPUT drops some packets",
    ),
    "what kube-proxy left": (
        nft,
        ("table ip kube-proxy { chain services { }; }",),
        {("warning", "kube-proxy")},
        "kube-proxy's rules are here: ip kube-proxy",
    ),
    "a bridge that another plugin left": (
        link,
        ("add cni0 type bridge", "del cni0"),
        {("warning", "cni")},
        "links of the bridge plugin or flannel are here: cni0",
    ),
    "a strict reverse path filter": (
        setting,
        ("net/ipv4/conf/underlay0/rp_filter", 1),
        {("warning", "rp_filter")},
        "underlay0 refuses packets",
    ),
    "a card with a smaller MTU than pods have": (
        link,
        ("set underlay0 mtu 1400", "set underlay0 mtu 1500"),
        {("error", "mtu")},
        "has an MTU of 1500, underlay0 has 1400",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_a_fault_of_a_node_is_found_there(shop: Cluster, fault: tuple[Any, ...]) -> None:
    make, arguments, expected, text = fault
    with make(shop.node("node-1"), *arguments):
        code, found = examine(shop)
    mine = {(severity, check) for severity, node, check in faults(found) if node == "node-1"}
    assert mine == expected
    assert any(text in one["text"] and one["advice"] for one in found)
    assert code == (1 if any(severity == "error" for severity, _ in expected) else 0)
    until(lambda: not faults(examine(shop)[1]), "all is well again", 20)


def test_a_way_that_is_cut_is_named_at_both_ends(shop: Cluster) -> None:
    with link(shop.node("node-2"), "set underlay0 down", "set underlay0 up"):
        code, found = examine(shop)
    assert code == 1
    cut = {(one["node"], one["text"].partition(" (")[0]) for one in found if _is_cut(one)}
    assert {("node-1", "pod → pod, other node"), ("node-2", "pod → pod, other node")} <= cut
    # The other node's own ways are as they were; without a card node-2 has lost an address.
    assert {way for node, way in cut if node == "node-1"} <= {
        "pod → pod, other node",
        "node → pod, other node",
        "pod → service",
        "node → service",
        "pod → service, UDP",
    }


def _is_cut(finding: dict[str, Any]) -> bool:
    return finding["check"] == "path" and finding["severity"] == "error"
