"""What `lockgate doctor` concludes from the facts of a node."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lockgate.access import Place, Result, Target
from lockgate.agent.doctor import Facts, check
from lockgate.cli.doctor import daemons, of_ours
from lockgate.cli.paths import Path
from lockgate.net.firewall import Chain, Drop, reached
from lockgate.objects.model import Cluster, ObjectMeta, Pod, PodSpec, PodStatus

WELL = Facts(
    features=[{"name": "tcx links", "ok": True, "advice": "they came with Linux 6.6"}],
    links={"lo": 65536, "eth0": 1500, "eth1": 1500, "lg3": 1500},
    cards=["eth0", "eth1"],
    pod_mtu=1500,
    rp_filter={"eth0": 2, "eth1": 0},
    forwarding={"IPv4": "0", "IPv6": "1"},
    drops=[Drop("ip filter FORWARD", "forward", 0, False)],
    cni_files=["05-lockgate.conflist"],
)


def test_a_node_without_a_fault() -> None:
    assert {one.severity for one in check(WELL)} == {"ok"}


FAULTS: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "a feature lacks": (
        {"features": [{"name": "tcx links", "ok": False, "advice": "they came with Linux 6.6"}]},
        "error",
        "the kernel lacks tcx links",
        "Linux 6.6",
    ),
    "the agent complains": ({"errors": ["no podCIDR"]}, "error", "no podCIDR", "lockgate status"),
    "pods' MTU above the card's": ({"pod_mtu": 9000}, "error", "large packets are lost", "set mtu"),
    "a pod from before the MTU changed": (
        {"links": {**WELL.links, "lg4": 9000}},
        "error",
        "the pod at lg4 has an MTU of 9000",
        "restart the pod",
    ),
    "no card": ({"cards": []}, "error", "no card leads to other nodes", "set underlay"),
    "a strict reverse path filter": (
        {"rp_filter": {"eth0": 1, "eth1": 2}},
        "warning",
        "eth0 refuses packets",
        "net.ipv4.conf.eth0.rp_filter=2",
    ),
    "a firewall's policy": (
        {"drops": [Drop("inet filter input", "input", 0, False)]},
        "warning",
        "the policy of chain inet filter input drops all packets",
        "nft -a list ruleset",
    ),
    "a firewall's rule": (
        {"drops": [Drop("netdev x y", "egress", 7, True)]},
        "warning",
        "rule 7 of chain netdev x y drops some packets; it may hit everything that leaves",
        "nft -a",
    ),
    "a program of somebody else": (
        {"programs": ["spy (id 7, tcx ingress), Pod shop/web, link lg3"]},
        "warning",
        "a program of somebody else: spy (id 7, tcx ingress), Pod shop/web",
        "bpftool net show",
    ),
    "somebody else's XDP": (
        {"xdp": {"eth0": ("", "another program is there: spy (id 7)"), "eth1": ("native", "")}},
        "warning",
        "eth0 has no XDP of ours: another program is there: spy (id 7)",
        "bpftool net show",
    ),
    "kube-proxy's nftables": (
        {"chains": [("ip", "kube-proxy", "services")]},
        "warning",
        "kube-proxy's rules are here: ip kube-proxy",
        "--cleanup",
    ),
    "kube-proxy's iptables": (
        {"chains": [("ip", "nat", "KUBE-SERVICES"), ("ip", "nat", "KUBE-SEP-X")]},
        "warning",
        "kube-proxy's rules are here: ip nat",
        "--cleanup",
    ),
    "no CNI configuration": (
        {"cni_files": []},
        "error",
        "there is no CNI configuration of ours",
        "lockgate status",
    ),
    "another CNI configuration before ours": (
        {"cni_files": ["00-multus.conf", "05-lockgate.conflist"]},
        "error",
        "container runtimes take 00-multus.conf before",
        "remove it",
    ),
    "another CNI configuration after ours": (
        {"cni_files": ["05-lockgate.conflist", "10-calico.conflist"]},
        "warning",
        "other CNI configurations are in /etc/cni/net.d: 10-calico.conflist",
        "remove them",
    ),
    "pods of another": (
        {"foreign": ["a/one", "a/two", "b/three", "b/four"]},
        "warning",
        "another CNI plugin wired a/one, a/two, b/three and 1 more",
        "restart them",
    ),
    "links of another": (
        {"links": {**WELL.links, "cilium_host": 1500, "cilium_net": 1500}},
        "warning",
        "links of Cilium are here: cilium_host, cilium_net",
        "docs/migrate.md",
    ),
}


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS.keys())
def test_each_fault_is_found_alone_and_has_an_advice(fault: tuple[Any, ...]) -> None:
    change, severity, text, advice = fault
    found = [one for one in check(msgspec.structs.replace(WELL, **change)) if one.severity != "ok"]
    assert [one.severity for one in found] == [severity]
    assert text in found[0].text
    assert advice in found[0].advice


def test_one_card_has_no_other_way_back() -> None:
    facts = msgspec.structs.replace(WELL, cards=["eth0"], rp_filter={"eth0": 1})
    assert {one.severity for one in check(facts)} == {"ok"}


def test_the_kubelets_own_chain_is_no_finding() -> None:
    drops = [Drop("ip filter KUBE-FIREWALL", "input", 4, True)]
    facts = msgspec.structs.replace(WELL, drops=drops)
    assert {one.severity for one in check(facts)} == {"ok"}


# ---- Firewalls: what packets get to --------------------------------------------------


def chain(name: str, **fields: Any) -> Chain:
    return Chain(("inet", "filter", name), **fields)


REACHED = {
    "a policy": ([chain("in", hook="input", policy_drop=True)], [("in", "input", 0, False)]),
    "a policy behind other rules": (
        [chain("in", hook="input", policy_drop=True, conditional=True)],
        [("in", "input", 0, True)],
    ),
    "a rule": ([chain("in", hook="input", drops=[(3, True)])], [("in", "input", 3, True)]),
    "a rule behind two jumps": (
        [
            chain("in", hook="input", jumps=["a"]),
            chain("a", jumps=["b"]),
            chain("b", jumps=["a"], drops=[(9, False)]),
        ],
        [("b", "input", 9, True)],
    ),
    "a rule that nothing leads to": ([chain("a", drops=[(1, False)])], []),
}


@pytest.mark.parametrize("case", REACHED.values(), ids=REACHED.keys())
def test_drops_that_packets_get_to(case: tuple[list[Chain], list[Any]]) -> None:
    chains, expected = case
    found = [(d.chain.split()[-1], d.hook, d.rule, d.conditional) for d in reached(chains)]
    assert found == expected


# ---- The cluster ---------------------------------------------------------------------


def test_other_data_planes_that_run_are_named() -> None:
    def pod(name: str, label: str, phase: str = "Running", host: bool = True) -> Pod:
        return Pod(
            metadata=ObjectMeta(name=name, namespace="kube-system", labels={"k8s-app": label}),
            spec=PodSpec(host_network=host),
            status=PodStatus(phase=phase),
        )

    pods = [
        pod("a", "cilium"),
        pod("b", "cilium"),
        pod("c", "kube-proxy"),
        pod("d", "calico-node", "Failed"),
        pod("e", "flannel", host=False),
        pod("f", "kube-dns"),
    ]
    found = daemons(Cluster(pods={one.key: one for one in pods}))
    assert [one.text for one in found] == [
        "Cilium runs on this cluster (2 pods)",
        "kube-proxy runs on this cluster (1 pod)",
    ]


def test_ways_are_not_tried_from_pods_that_another_plugin_wired() -> None:
    names = ("old", "new", "far")
    pods = [Pod(metadata=ObjectMeta(name=name, namespace="shop")) for name in names]
    cluster = Cluster(pods={pod.key: pod for pod in pods})
    nodes: list[dict[str, Any]] = [
        {"name": "moved", "facts": {"foreign": ["shop/old"]}},
        {"name": "silent"},
    ]
    assert [name for _, name in of_ours(cluster, nodes).pods] == ["new", "far"]


SILENCE = {
    "a service of a protocol that nobody knows": ("", "timeout", True),
    "a DNS server": ("AAAA", "timeout", False),
    "one that answers": ("", "ok", False),
    "one that the node says cannot be reached": ("", "unreachable", False),
}


@pytest.mark.parametrize(("payload", "result", "silent"), SILENCE.values(), ids=SILENCE.keys())
def test_whose_silence_over_udp_is_no_fault(payload: str, result: Any, silent: bool) -> None:
    target = Target("udp", "10.96.0.9", 514, 1.0, payload)
    path = Path("pod → service, UDP", "one", 4, Place("one"), [target], ["svc/a/b"])
    path.results = [Result(result)]
    assert path.silent is silent
