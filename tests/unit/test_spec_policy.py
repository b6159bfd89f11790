"""What NetworkPolicy means, one behaviour a row, the answers written by hand.

The cluster: namespaces a (labels team: x), b (team: y) and d (no labels).

    a/web   10.0.0.1 fd00::1   app: web    ports http 80/TCP, http 81/UDP, dns 53/UDP
    a/db    10.0.0.2 fd00::2   app: db     ports http 8080/TCP
    a/bare  10.0.0.3           (no labels)
    b/web   10.0.1.1 fd00::11  app: web
    d/old   10.0.2.1           app: web    finished
    d/host  192.168.0.1        app: web    hostNetwork
    nodes   192.168.0.1, 192.168.0.2
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lockgate.objects.model import Cluster, Namespace, NetworkPolicy, Pod
from lockgate.spec.answer import Answer, Judgement, Packet
from lockgate.spec.policy import judge, pod_at

WEB, DB, BARE, B_WEB = "10.0.0.1", "10.0.0.2", "10.0.0.3", "10.0.1.1"
WEB6, DB6, B_WEB6 = "fd00::1", "fd00::2", "fd00::11"
NODE, OTHER_NODE, OUTSIDE = "192.168.0.1", "192.168.0.2", "203.0.113.9"

ALL: dict[str, Any] = {}
APP_WEB = {"matchLabels": {"app": "web"}}


def pod(key: str, ips: list[str], labels: dict[str, str], **more: Any) -> Pod:
    namespace, name = key.split("/")
    ports = [
        {"name": port, "containerPort": number, "protocol": protocol}
        for port, number, protocol in more.get("ports", [])
    ]
    return msgspec.convert(
        {
            "metadata": {
                "name": name,
                "namespace": namespace,
                "uid": key,
                "labels": labels,
                "deletionTimestamp": more.get("deleted"),
            },
            "spec": {
                "containers": [{"name": "c", "ports": ports}],
                "hostNetwork": more.get("host", False),
            },
            "status": {
                "phase": more.get("phase", "Running"),
                "podIPs": [{"ip": ip} for ip in ips],
            },
        },
        Pod,
    )


PODS = [
    pod(
        "a/web",
        [WEB, WEB6],
        {"app": "web"},
        ports=[("http", 80, "TCP"), ("http", 81, "UDP"), ("dns", 53, "UDP")],
    ),
    pod("a/db", [DB, DB6], {"app": "db"}, ports=[("http", 8080, "TCP")]),
    pod("a/bare", [BARE], {}),
    pod("b/web", [B_WEB, B_WEB6], {"app": "web"}),
    pod("d/old", ["10.0.2.1"], {"app": "web"}, phase="Succeeded"),
    pod("d/host", [NODE], {"app": "web"}, host=True),
]
NAMESPACES = {"a": {"team": "x"}, "b": {"team": "y"}, "d": {}}


def policy(spec: dict[str, Any], name: str = "p", namespace: str = "a") -> NetworkPolicy:
    value = {"metadata": {"name": name, "namespace": namespace}, "spec": {"podSelector": {}} | spec}
    return msgspec.convert(value, NetworkPolicy)


def cluster(*policies: NetworkPolicy, pods: list[Pod] | None = None) -> Cluster:
    return Cluster(
        namespaces={
            name: msgspec.convert({"metadata": {"name": name, "labels": labels}}, Namespace)
            for name, labels in NAMESPACES.items()
        },
        pods={p.key: p for p in (PODS if pods is None else pods)},
        policies={p.key: p for p in policies},
    )


def ingress(*rules: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"policyTypes": ["Ingress"], "ingress": list(rules), **spec}


def egress(*rules: dict[str, Any], **spec: Any) -> dict[str, Any]:
    return {"policyTypes": ["Egress"], "egress": list(rules), **spec}


def pods_in(**labels: str) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": labels}}


def spaces(**labels: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": labels}}


def expression(key: str, operator: str, *values: str) -> dict[str, Any]:
    return {"matchExpressions": [{"key": key, "operator": operator, "values": list(values)}]}


def block(cidr: str, *excepted: str) -> dict[str, Any]:
    return {"ipBlock": {"cidr": cidr, "except": list(excepted)}}


def port(number: int | str | None = None, protocol: str = "TCP", end: int | None = None) -> Any:
    return {"protocol": protocol, "port": number, "endPort": end}


HTTP = ("TCP", 80)
DENY_IN, DENY_OUT = ("deny", "ingress", None), ("deny", "egress", None)
OPEN = ("allow", None, None)


def IN(index: int = 0) -> tuple[str, str, str]:
    return ("allow", "ingress", f"ingress[{index}]")


def OUT(index: int = 0) -> tuple[str, str, str]:
    return ("allow", "egress", f"egress[{index}]")


# point and behaviour, spec of one policy a/p (or several), source, destination, (protocol, port),
# (verdict, direction, rule)
CASES: list[tuple[str, Any, str, str, tuple[str, int | None], tuple[str, str | None, str | None]]]
CASES = [
    ("01 no policy: open", [], WEB, DB, HTTP, OPEN),
    ("01 not selected: open", ingress(podSelector=APP_WEB), WEB, DB, HTTP, OPEN),
    ("01 isolated for ingress only: egress open", ingress(), WEB, B_WEB, HTTP, OPEN),
    ("01 isolated for egress only: ingress open", egress(), B_WEB, WEB, HTTP, OPEN),
    ("01 isolated for ingress: ingress denied", ingress(), B_WEB, WEB, HTTP, DENY_IN),
    ("01 isolated for egress: egress denied", egress(), WEB, B_WEB, HTTP, DENY_OUT),
    ("02 no types, no egress rules: ingress isolated", {}, B_WEB, WEB, HTTP, DENY_IN),
    ("02 no types, no egress rules: egress open", {}, WEB, B_WEB, HTTP, OPEN),
    ("02 no types, egress rule: egress isolated",
     {"egress": [{"ports": [port(1)]}]}, WEB, B_WEB, HTTP, DENY_OUT),
    ("02 no types, egress rule: ingress isolated too",
     {"egress": [{"ports": [port(1)]}]}, B_WEB, WEB, HTTP, DENY_IN),
    ("02 types Egress: ingress rules mean nothing",
     egress({}, ingress=[{"ports": [port(1)]}]), B_WEB, WEB, HTTP, OPEN),
    ("02 types Ingress: egress rules mean nothing",
     ingress({}, egress=[{"ports": [port(1)]}]), WEB, B_WEB, HTTP, OPEN),
    ("03 policies add up", [policy(ingress(), "a"), policy(ingress({}), "b")],
     B_WEB, WEB, HTTP, IN()),
    ("03 egress allowed but ingress denied",
     [policy(egress({}), "a"), policy(ingress(podSelector={"matchLabels": {"app": "db"}}), "b")],
     WEB, DB, HTTP, DENY_IN),
    ("03 ingress allowed but egress denied",
     [policy(egress(), "a"), policy(ingress({}), "b")], WEB, DB, HTTP, DENY_OUT),
    ("03 both denied: egress is named",
     [policy(egress(), "a"), policy(ingress(), "b")], WEB, DB, HTTP, DENY_OUT),
    ("03 both allowed: ingress is named",
     [policy(egress({}), "a"), policy(ingress({}), "b")], WEB, DB, HTTP, IN()),
    ("04 empty selector: pods without labels too", ingress(podSelector={}), WEB, BARE, HTTP,
     DENY_IN),
    ("04 empty selector: not other namespaces", ingress(podSelector={}), WEB, B_WEB, HTTP, OPEN),
    ("05 empty rule: external peers", ingress({}), OUTSIDE, WEB, HTTP, IN()),
    ("05 empty rule: any protocol", ingress({}), OUTSIDE, WEB, ("ICMP", None), IN()),
    ("05 empty from, a port", ingress({"from": [], "ports": [port(80)]}), OUTSIDE, WEB, HTTP,
     IN()),
    ("05 empty ports, a peer", ingress({"from": [spaces(team="y")], "ports": []}), B_WEB, WEB,
     ("SCTP", 7), IN()),
    ("05 no egress rules: outside denied", egress(), WEB, OUTSIDE, HTTP, DENY_OUT),
    ("05 empty egress rule: outside allowed", egress({}), WEB, OUTSIDE, HTTP, OUT()),
    ("06 podSelector: own namespace", ingress({"from": [pods_in(app="web")]}), WEB, DB, HTTP,
     IN()),
    ("06 podSelector: not other namespaces", ingress({"from": [pods_in(app="web")]}), B_WEB, DB,
     HTTP, DENY_IN),
    ("06 namespaceSelector: all pods there", ingress({"from": [spaces(team="y")]}), B_WEB, DB,
     HTTP, IN()),
    ("06 namespaceSelector: not the own namespace", ingress({"from": [spaces(team="y")]}), WEB,
     DB, HTTP, DENY_IN),
    ("06 both in one item: and", ingress({"from": [spaces(team="y") | pods_in(app="db")]}), B_WEB,
     WEB, HTTP, DENY_IN),
    ("06 both in one item, both match", ingress({"from": [spaces(team="y") | pods_in(app="web")]}),
     B_WEB, WEB, HTTP, IN()),
    ("06 two items: or", ingress({"from": [spaces(team="y"), pods_in(app="db")]}), B_WEB, WEB,
     HTTP, IN()),
    ("07 empty namespaceSelector: every namespace", ingress({"from": [spaces()]}), B_WEB, WEB,
     HTTP, IN()),
    ("07 empty namespaceSelector: nobody outside", ingress({"from": [spaces()]}), OUTSIDE, WEB,
     HTTP, DENY_IN),
    ("07 empty podSelector: own namespace", ingress({"from": [pods_in()]}), BARE, WEB, HTTP, IN()),
    ("07 empty podSelector: no other namespace", ingress({"from": [pods_in()]}), B_WEB, WEB, HTTP,
     DENY_IN),
    ("08 NotIn matches a missing key",
     ingress({"from": [{"podSelector": expression("app", "NotIn", "web")}]}), BARE, DB, HTTP,
     IN()),
    ("08 NotIn refuses a listed value",
     ingress({"from": [{"podSelector": expression("app", "NotIn", "web")}]}), WEB, DB, HTTP,
     DENY_IN),
    ("08 DoesNotExist matches a missing key",
     ingress({"from": [{"podSelector": expression("app", "DoesNotExist")}]}), BARE, DB, HTTP,
     IN()),
    ("08 DoesNotExist refuses a present key",
     ingress({"from": [{"podSelector": expression("app", "DoesNotExist")}]}), WEB, DB, HTTP,
     DENY_IN),
    ("08 In refuses a missing key",
     ingress({"from": [{"podSelector": expression("app", "In", "web")}]}), BARE, DB, HTTP,
     DENY_IN),
    ("08 Exists matches a present key",
     ingress({"from": [{"podSelector": expression("app", "Exists")}]}), WEB, DB, HTTP, IN()),
    ("08 In of a namespace, several values",
     ingress({"from": [{"namespaceSelector": expression("team", "In", "q", "y")}]}), B_WEB, DB,
     HTTP, IN()),
    ("09 selectors match no outside address",
     ingress({"from": [{"podSelector": {}, "namespaceSelector": {}}]}), OUTSIDE, WEB, HTTP,
     DENY_IN),
    ("09 selectors match no node",
     ingress({"from": [{"podSelector": {}, "namespaceSelector": {}}]}), OTHER_NODE, WEB, HTTP,
     DENY_IN),
    ("09 selectors match no hostNetwork pod",
     ingress({"from": [{"podSelector": APP_WEB, "namespaceSelector": {}}]}), NODE, WEB, HTTP,
     DENY_IN),
    ("10 ipBlock matches pods too", ingress({"from": [block("10.0.1.0/24")]}), B_WEB, WEB, HTTP,
     IN()),
    ("10 except narrows", ingress({"from": [block("10.0.0.0/8", "10.0.1.0/24")]}), B_WEB, WEB,
     HTTP, DENY_IN),
    ("10 except narrows only its item",
     ingress({"from": [block("10.0.0.0/8", "10.0.1.0/24"), block("10.0.1.1/32")]}), B_WEB, WEB,
     HTTP, IN()),
    ("10 another rule allows what except took",
     ingress({"from": [block("10.0.0.0/8", "10.0.1.0/24")]}, {"from": [spaces(team="y")]}), B_WEB,
     WEB, HTTP, IN(1)),
    ("10 ::/0 is not IPv4", ingress({"from": [block("::/0")]}), OUTSIDE, WEB, HTTP, DENY_IN),
    ("10 0.0.0.0/0 is not IPv6", ingress({"from": [block("0.0.0.0/0")]}), "2001:db8::9", WEB6,
     HTTP, DENY_IN),
    ("10 0.0.0.0/0 is all of IPv4", ingress({"from": [block("0.0.0.0/0")]}), OUTSIDE, WEB, HTTP,
     IN()),
    ("10 ::/0 is all of IPv6", ingress({"from": [block("::/0")]}), "2001:db8::9", WEB6, HTTP,
     IN()),
    ("10 host bits are masked", ingress({"from": [block("10.0.1.77/24")]}), B_WEB, WEB, HTTP,
     IN()),
    ("10 IPv6 block", egress({"to": [block("2001:db8::/32", "2001:db8:1::/48")]}), WEB6,
     "2001:db8::1", HTTP, OUT()),
    ("10 IPv6 except", egress({"to": [block("2001:db8::/32", "2001:db8:1::/48")]}), WEB6,
     "2001:db8:1::1", HTTP, DENY_OUT),
    ("11 protocol defaults to TCP", ingress({"ports": [{"port": 80}]}), B_WEB, WEB, HTTP, IN()),
    ("11 protocol default is not UDP", ingress({"ports": [{"port": 80}]}), B_WEB, WEB,
     ("UDP", 80), DENY_IN),
    ("11 an empty port item: all of TCP", ingress({"ports": [{}]}), B_WEB, WEB, ("TCP", 9), IN()),
    ("11 an empty port item: no UDP", ingress({"ports": [{}]}), B_WEB, WEB, ("UDP", 9), DENY_IN),
    ("11 protocol without port: all its ports", ingress({"ports": [port(None, "UDP")]}), B_WEB,
     WEB, ("UDP", 9), IN()),
    ("11 range: first", ingress({"ports": [port(80, end=90)]}), B_WEB, WEB, HTTP, IN()),
    ("11 range: last", ingress({"ports": [port(80, end=90)]}), B_WEB, WEB, ("TCP", 90), IN()),
    ("11 range: below", ingress({"ports": [port(80, end=90)]}), B_WEB, WEB, ("TCP", 79), DENY_IN),
    ("11 range: above", ingress({"ports": [port(80, end=90)]}), B_WEB, WEB, ("TCP", 91), DENY_IN),
    ("11 range of one", ingress({"ports": [port(80, end=80)]}), B_WEB, WEB, HTTP, IN()),
    ("12 named port by name and protocol", ingress({"ports": [port("http")]}), B_WEB, WEB, HTTP,
     IN()),
    ("12 named port: other protocol, other number", ingress({"ports": [port("http", "UDP")]}),
     B_WEB, WEB, ("UDP", 81), IN()),
    ("12 named port: number of the other protocol", ingress({"ports": [port("http", "UDP")]}),
     B_WEB, WEB, ("UDP", 80), DENY_IN),
    ("12 named port: name of the other protocol", ingress({"ports": [port("dns")]}), B_WEB, WEB,
     ("TCP", 53), DENY_IN),
    ("12 egress: on the destination, not the source", egress({"ports": [port("http")]}), WEB, DB,
     ("TCP", 8080), OUT()),
    ("12 egress: the source's number is nothing", egress({"ports": [port("http")]}), WEB, DB, HTTP,
     DENY_OUT),
    ("12 unknown name matches nothing", ingress({"ports": [port("nope")]}), B_WEB, WEB, HTTP,
     DENY_IN),
    ("12 outside has no names", egress({"to": [block("0.0.0.0/0")], "ports": [port("http")]}), WEB,
     OUTSIDE, HTTP, DENY_OUT),
    ("12 a pod in an ipBlock has names",
     egress({"to": [block("10.0.0.0/8")], "ports": [port("http")]}), WEB, DB, ("TCP", 8080),
     OUT()),
    ("12 a hostNetwork pod has no names", egress({"ports": [port("http")]}), WEB, NODE, HTTP,
     DENY_OUT),
    ("13 SCTP is not TCP", ingress({"ports": [port(80)]}), B_WEB, WEB, ("SCTP", 80), DENY_IN),
    ("13 only UDP ports: TCP denied", ingress({"ports": [port(53, "UDP")]}), B_WEB, WEB,
     ("TCP", 53), DENY_IN),
    ("13 only SCTP ports: TCP denied", ingress({"ports": [port(80, "SCTP")]}), B_WEB, WEB, HTTP,
     DENY_IN),
    ("13 SCTP port", ingress({"ports": [port(80, "SCTP")]}), B_WEB, WEB, ("SCTP", 80), IN()),
    ("14 a ClusterIP is an address", egress({"to": [block("10.96.0.0/16")]}), WEB, "10.96.0.1",
     HTTP, OUT()),
    ("14 the port is the backend's", ingress({"ports": [port(80)]}, podSelector={}), WEB, DB,
     ("TCP", 8080), DENY_IN),
    ("16 another node is no exception", ingress(), OTHER_NODE, WEB, HTTP, DENY_IN),
    ("16 another node by ipBlock", ingress({"from": [block("192.168.0.0/24")]}), OTHER_NODE, WEB,
     HTTP, IN()),
    ("17 a pod's own node is no exception", egress(), WEB, NODE, HTTP, DENY_OUT),
    ("18 own address", [policy(egress(), "a"), policy(ingress(), "b")], WEB, WEB, HTTP, OPEN),
    ("18 own address, IPv6", [policy(egress(), "a"), policy(ingress(), "b")], WEB6, WEB6, HTTP,
     OPEN),
    ("21 ICMP: a rule without ports", ingress({"from": [spaces(team="y")]}), B_WEB, WEB,
     ("ICMP", None), IN()),
    ("21 ICMP: not by a rule with ports", ingress({"ports": [port(), port(None, "UDP")]}), B_WEB,
     WEB, ("ICMP", None), DENY_IN),
    ("21 ICMP: denied when isolated", egress(), WEB, OUTSIDE, ("ICMP", None), DENY_OUT),
    ("21 ICMPv6: a rule without ports", egress({}), WEB6, "2001:db8::9", ("ICMPv6", None), OUT()),
    ("21 ICMP: open when not isolated", [], WEB, OUTSIDE, ("ICMP", None), OPEN),
    ("21 unknown protocol: as ICMP", ingress({"ports": [port()]}), B_WEB, WEB, ("GRE", None),
     DENY_IN),
    ("26 kubernetes.io/metadata.name on every namespace",
     ingress({"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "b"}}}
                       ]}), B_WEB, WEB, HTTP, IN()),
    ("27 a finished pod is no subject", policy(ingress(), namespace="d"), B_WEB, "10.0.2.1", HTTP,
     OPEN),
    ("27 a finished pod is no peer", ingress({"from": [spaces()]}), "10.0.2.1", WEB, HTTP,
     DENY_IN),
    ("28 a hostNetwork pod is no subject of ingress", policy(ingress(), namespace="d"), B_WEB,
     NODE, HTTP, OPEN),
    ("28 a hostNetwork pod is no subject of egress", policy(egress(), namespace="d"), NODE, B_WEB,
     HTTP, OPEN),
    ("29 second address of a subject", ingress(), B_WEB6, WEB6, HTTP, DENY_IN),
    ("29 second address of a peer", ingress({"from": [spaces(team="y")]}), B_WEB6, WEB6, HTTP,
     IN()),
    ("29 second address in another notation", ingress({"from": [spaces(team="y")]}),
     "fd00:0:0::0011", WEB6, HTTP, IN()),
]  # fmt: skip


@pytest.mark.parametrize(
    ("policies", "source", "destination", "service", "expected"),
    [case[1:] for case in CASES],
    ids=[case[0] for case in CASES],
)
def test_point(
    policies: Any,
    source: str,
    destination: str,
    service: tuple[str, int | None],
    expected: tuple[str, str | None, str | None],
) -> None:
    if isinstance(policies, dict):
        policies = policy(policies)
    if isinstance(policies, NetworkPolicy):
        policies = [policies]
    answer = judge(cluster(*policies), Packet(source, destination, *service))
    assert (answer.verdict, answer.direction, answer.rule) == expected


def test_point_16_own_node_reaches_its_pods_even_when_isolated() -> None:
    answer = judge(cluster(policy(ingress())), Packet(NODE, WEB, "TCP", 80, from_own_node=True))
    assert answer == Answer("allow")


def test_point_16_the_exemption_is_of_the_socket_not_of_the_address() -> None:
    answer = judge(cluster(policy(ingress())), Packet(NODE, WEB, "TCP", 80))
    assert answer.verdict == "deny"


def test_point_12_the_first_container_that_has_the_name_gives_the_number() -> None:
    web = pod("a/web", [WEB], {}, ports=[("http", 80, "TCP"), ("http", 81, "TCP")])
    state = cluster(policy(ingress({"ports": [port("http")]})), pods=[web])
    assert judge(state, Packet(OUTSIDE, WEB, "TCP", 80)).verdict == "allow"
    assert judge(state, Packet(OUTSIDE, WEB, "TCP", 81)).verdict == "deny"


def test_point_26_a_namespace_not_seen_yet_has_its_name_and_no_other_label() -> None:
    name = {"matchLabels": {"kubernetes.io/metadata.name": "b"}}
    state = cluster(policy(ingress({"from": [{"namespaceSelector": name}]})))
    del state.namespaces["b"]
    assert judge(state, Packet(B_WEB, WEB, "TCP", 80)).verdict == "allow"
    state = cluster(policy(ingress({"from": [spaces(team="y")]})))
    del state.namespaces["b"]
    assert judge(state, Packet(B_WEB, WEB, "TCP", 80)).verdict == "deny"


def test_point_26_labels_are_those_of_now() -> None:
    state = cluster(policy(ingress({"from": [pods_in(app="web")]})))
    assert judge(state, Packet(BARE, DB, "TCP", 80)).verdict == "deny"
    state.pods["a", "bare"] = pod("a/bare", [BARE], {"app": "web"})
    assert judge(state, Packet(BARE, DB, "TCP", 80)).verdict == "allow"


def test_point_27_a_terminating_pod_stays_enforced() -> None:
    web = pod("a/web", [WEB], {"app": "web"}, deleted="2026-01-01T00:00:00Z")
    state = cluster(policy(ingress()), pods=[web])
    assert judge(state, Packet(OUTSIDE, WEB, "TCP", 80)).verdict == "deny"


def test_point_27_a_reused_address_is_the_new_pod() -> None:
    old = pod("a/aold", [WEB], {"app": "old"}, phase="Failed")
    going = pod("a/bold", [WEB], {"app": "old"}, deleted="2026-01-01T00:00:00Z")
    new = pod("a/new", [WEB], {"app": "new"})
    assert pod_at(cluster(pods=[old, going, new]), WEB) is new
    assert pod_at(cluster(pods=[old, going]), WEB) is going
    assert pod_at(cluster(pods=[old]), WEB) is None


IN_A, IN_B = policy(ingress({"ports": [port(80)]}), "a"), policy(ingress({}), "b")
SHUT = policy(ingress(), "shut")

# point and behaviour, policies before, policies after, (verdict, direction, rule) before and after,
# all for one packet, b/web → a/web 80/TCP
CHANGES: list[tuple[str, list[NetworkPolicy], list[NetworkPolicy], Any, Any]]
CHANGES = [
    ("30 the only policy is deleted: open", [SHUT], [], DENY_IN, OPEN),
    ("30 the first policy is made: isolated", [], [SHUT], OPEN, DENY_IN),
    ("30 one of two is deleted: the other isolates on", [SHUT, IN_A], [SHUT], IN(), DENY_IN),
    ("30 the one that denies is deleted: the other allows on", [SHUT, IN_A], [IN_A], IN(), IN()),
    ("30 replaced by another that allows: allowed", [IN_A], [IN_B], IN(), IN()),
    ("30 egress takes the place of ingress", [IN_A], [policy(egress(), "a")], IN(), OPEN),
]


@pytest.mark.parametrize(
    ("before", "after", "then", "now"), [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES]
)
def test_point_30_what_was_before_counts_no_more(
    before: list[NetworkPolicy], after: list[NetworkPolicy], then: Any, now: Any
) -> None:
    state = cluster(*before)
    answer = judge(state, Packet(B_WEB, WEB, "TCP", 80))
    assert (answer.verdict, answer.direction, answer.rule) == then
    for gone in before:
        if gone not in after:
            del state.policies[gone.key]
    state.policies.update({one.key: one for one in after})
    answer = judge(state, Packet(B_WEB, WEB, "TCP", 80))
    assert (answer.verdict, answer.direction, answer.rule) == now


def test_a_policy_whose_rules_cant_be_read_isolates_and_says_so() -> None:
    odd = msgspec.structs.replace(policy(ingress({}), "odd"), unreadable=True)
    answer = judge(cluster(policy(ingress(), "b"), odd), Packet(B_WEB, WEB, "TCP", 80))
    assert (answer.verdict, answer.direction) == ("deny", "ingress")
    assert [(p["name"], p["rules"]) for p in answer.policies] == [
        ("b", []),
        ("odd", ["unreadable"]),
    ]
    # What another policy allows is allowed, as with every policy.
    answer = judge(cluster(policy(ingress({}), "b"), odd), Packet(B_WEB, WEB, "TCP", 80))
    assert answer.verdict == "allow" and answer.rule == "ingress[0]"
    assert judge(cluster(odd), Packet(WEB, B_WEB, "TCP", 80)).verdict == "allow", "not egress"


def test_an_allow_names_every_rule_that_matched_and_no_other() -> None:
    state = cluster(
        policy(ingress(), "z"),
        policy(ingress({"ports": [port(81)]}, {}, *[{"ports": [port(81)]}] * 8, {}), "b"),
        policy(ingress({"from": [spaces(team="y")]}), "a"),
    )
    answer = judge(state, Packet(B_WEB, WEB, "TCP", 80))
    assert answer.ingress == Judgement(
        isolated=True,
        allowed=True,
        rules=(
            ("a", "a", "ingress", 0),
            ("a", "b", "ingress", 1),
            ("a", "b", "ingress", 10),
        ),
        policies=(("a", "a"), ("a", "b"), ("a", "z")),
    )
    assert answer.policy == {"kind": "NetworkPolicy", "namespace": "a", "name": "a"}
    assert answer.rule == "ingress[0]"
    assert answer.policies == [
        {"kind": "NetworkPolicy", "namespace": "a", "name": "a", "rules": ["ingress[0]"]},
        {
            "kind": "NetworkPolicy",
            "namespace": "a",
            "name": "b",
            "rules": ["ingress[1]", "ingress[10]"],
        },
    ]


def test_a_deny_names_the_policies_that_isolate_and_no_rule() -> None:
    state = cluster(policy(egress(), "z"), policy(egress({"ports": [port(1)]}), "b"))
    answer = judge(state, Packet(WEB, OUTSIDE, "TCP", 80))
    assert (answer.verdict, answer.direction, answer.rule) == ("deny", "egress", None)
    assert answer.policy == {"kind": "NetworkPolicy", "namespace": "a", "name": "b"}
    assert answer.policies == [
        {"kind": "NetworkPolicy", "namespace": "a", "name": "b", "rules": []},
        {"kind": "NetworkPolicy", "namespace": "a", "name": "z", "rules": []},
    ]


def test_no_policy_names_nothing() -> None:
    answer = judge(cluster(), Packet(WEB, OUTSIDE, "TCP", 80))
    assert (answer.policy, answer.rule, answer.policies) == (None, None, [])
    assert (answer.egress, answer.ingress) == (Judgement(False, True), None)
