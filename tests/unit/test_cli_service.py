"""What `lockgate service` makes of objects and of what nodes answer."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from lockgate.cli.service_rows import overview, places
from lockgate.cli.service_text import list_text, show_text, trace_text
from lockgate.explain.names import End, Names
from lockgate.explain.packet import ends_of, first_packet
from lockgate.explain.trace import Asked, Step, Trace
from lockgate.objects.address import parse_address
from tests.unit.test_explain_served import cluster

OWNERS = [
    {"address": "10.0.1.1", "port": 8080, "ends": False, "node": "n1", "slots": 300, "second": 212},
    {"address": "10.0.2.1", "port": 8080, "ends": True, "node": "n2", "slots": 0, "second": 300},
]


def view(**more: Any) -> dict[str, Any]:
    return {
        "service": 1,
        "of": {"kind": "Service", "namespace": "shop", "name": "web"},
        "frontend": True,
        "forwarding": "dsr",
        "localOutside": False,
        "localInside": False,
        "ranges": False,
        "affinity": 0,
        "backends": [{"address": "10.0.1.1", "port": 8080}],
        "owners": OWNERS,
        "slots": 512,
        "slot": None,
    } | more


def test_a_row_of_each_service_that_has_frontends() -> None:
    row = next(overview(cluster("snat", ending="a", load_balancer_source_ranges=["10.0.0.0/8"])))
    assert (row["type"], row["forwarding"], row["sourceRanges"]) == (
        "LoadBalancer",
        "snat",
        ["10.0.0.0/8"],
    )
    assert row["endpoints"] == {"IPv4": {"ready": 1, "ending": 1}}
    assert not list(overview(cluster(type="ClusterIP", cluster_ips=["None"])))
    inside = next(overview(cluster(type="ClusterIP", external_ips=[])))
    assert inside["externalTrafficPolicy"] is None and inside["forwarding"] is None


def test_a_list_has_node_ports_once() -> None:
    lines = list_text(list(overview(cluster("dsr", ending="a")))).splitlines()
    assert lines[1].split() == [
        *("shop", "web", "LoadBalancer", "dsr", "Cluster", "Cluster"),
        *("1", "ready,", "1", "ending", "10.96.0.1:80/TCP,"),
    ]
    assert [line.strip() for line in lines[2:]] == [
        "192.0.2.1:80/TCP,",
        "192.0.2.9:80/TCP,",
        "node:30080/TCP",
    ]
    assert max(map(len, lines)) <= 100


def test_a_node_is_asked_at_an_address_of_its_own() -> None:
    known = cluster(external_ips=[])
    service = known.services["shop", "web"]
    found = places(known, service)
    assert [(one.clients, one.family, len(one.frontends)) for one in found] == [
        ("inside", "IPv4", 1),
        ("outside", "IPv4", 4),
    ]
    assert found[1].question("n2") == {"address": "192.0.2.1", "port": 80, "protocol": "TCP"}
    known = cluster(external_ips=[], type="NodePort")
    outside = places(known, known.services["shop", "web"])[1]
    assert outside.question("n2") == {"address": "172.16.0.2", "port": 30080, "protocol": "TCP"}


def shown(nodes: dict[str, Any], **more: Any) -> str:
    known = cluster(ending="b")
    row = next(overview(known)) | {"unanswered": {}} | more
    row["inForce"] = [
        {**one.json(), "nodes": nodes} for one in places(known, known.services["shop", "web"])
    ]
    return show_text(row, Names(known))


def test_what_nodes_have_alike_is_shown_once() -> None:
    text = shown({"n1": view(), "n2": view(service=9), "n3": view()})
    assert text.count("512 slots") == 1
    assert "10.0.1.1:8080  shop/a  n1    300   58.6 %  " + "█" * 24 in text
    assert "10.0.2.1:8080  shop/b  n2      0    0.0 %  ends: no new connections" in text
    assert "one of 1 at random" in text and "on n1" not in text


def test_what_differs_is_shown_by_node() -> None:
    local = view(localOutside=True, owners=OWNERS[:1], slots=1)
    text = shown({"n1": local, "n2": local | {"owners": []}, "n3": None})
    assert "on n1: dsr, 1 slot, only backends of the node" in text
    assert "on n2: no backend: dropped" in text
    assert "on n3: nothing is in force" in text


def test_what_another_has_is_not_shown_as_its_own() -> None:
    other = {"kind": "Service", "namespace": "a", "name": "first"}
    text = shown({"n1": view(of=other), "n2": view(), "n3": view(of=None)})
    assert "on n1: Service a/first has it" in text
    assert text.count("512 slots") == 2
    text = shown({"n1": view(of=other | {"kind": "Pod"})})
    assert "Pod a/first has it" in text and "10.0.1.1" not in text


def test_frontends_that_another_has_are_named() -> None:
    known = cluster()
    (web,) = known.services.values()
    metadata = msgspec.structs.replace(web.metadata, name="zzz")
    last = msgspec.structs.replace(web, metadata=metadata)
    known = msgspec.structs.replace(known, services={**known.services, ("shop", "zzz"): last})
    rows = {row["name"]: row for row in overview(known)}
    assert {one["takenBy"] for one in rows["web"]["frontends"]} == {None}
    assert {one["takenBy"] for one in rows["zzz"]["frontends"]} == {"shop/web"}
    assert "node:30080/TCP (shop/web has it)" in list_text(list(rows.values()))


def test_why_a_service_is_not_served_is_told() -> None:
    known = cluster()
    (web,) = known.services.values()
    label = "service.kubernetes.io/service-proxy-name"
    metadata = msgspec.structs.replace(web.metadata, labels={label: "other"})
    other = msgspec.structs.replace(web, metadata=metadata)
    known = msgspec.structs.replace(known, services={("shop", "web"): other})
    row = next(overview(known, other)) | {"unanswered": {}, "inForce": []}
    assert f"not served: its label {label} says that it is for others" in show_text(
        row, Names(known)
    )


def test_where_all_end_new_connections_are_refused() -> None:
    text = shown({"n1": view(owners=[one | {"ends": True} for one in OWNERS])})
    assert "new connections refused, dsr, 512 slots" in text
    assert "10.0.1.1:8080  shop/a  n1    300   58.6 %  ends: no new connections" in text


def test_a_node_that_does_not_answer_is_named() -> None:
    assert "node n2: no answer" in shown({}, unanswered={"n2": "no answer"})


CLIENT, LB = parse_address("198.51.100.7"), parse_address("192.0.2.1")


def trace(*steps: Step) -> str:
    known = cluster()
    service = known.services["shop", "web"]
    one = Asked(End(CLIENT), 40000, LB, 80, "TCP", service)
    return trace_text(Trace(one, 0xABCDEF01, list(steps)), Names(known))


def came() -> Any:
    return ends_of(first_packet(CLIENT, LB, "TCP", 80))


def test_a_packet_by_way_of_another_node() -> None:
    outer = parse_address("198.18.239.1"), parse_address("10.0.2.1")
    sent = came()
    encapsulated = type(sent)(sent.source, sent.destination, 40000, 80, outer)
    here = type(sent)(sent.source, parse_address("10.0.2.1"), 40000, 8080, outer)
    slot = view(slot={"number": 257, "owners": [1, 0]})
    policy = {"kind": "NetworkPolicy", "namespace": "shop", "name": "open", "rules": ["ingress[0]"]}
    text = trace(
        Step(
            "n1", "from_net", sent, "allow", None, None, [], slot, "node", "n2", "dsr", encapsulated
        ),
        Step(
            "n2",
            "from_net",
            encapsulated,
            "allow",
            None,
            "ingress",
            [policy],
            slot,
            "pod",
            "shop/b",
            None,
            here,
        ),
    )
    assert text.splitlines() == [
        "198.51.100.7:40000 → 192.0.2.1:80/TCP  (service shop/web)",
        "",
        "n1  hash abcdef01, slot 257 of 512, owned by",
        "      1. shop/b 10.0.2.1:8080 on n2, ends",
        "      2. shop/a 10.0.1.1:8080 on n1",
        "    dsr: encapsulated 198.18.239.1 → 10.0.2.1, to node n2",
        "n2  into pod shop/b, 10.0.2.1:8080",
        "",
        "allow  pod shop/b answers: by ingress, shop/open ingress[0]",
    ]


def said(cause: str | None = None, action: str = "allow") -> dict[str, Any]:
    rule = {
        "action": action,
        "ports": [],
        "rate": 50,
        "source": "object",
        "name": "edge",
        "rule": 2,
    }
    return {"cause": cause, "prefix": "198.51.100.0/24", "rule": rule}


@pytest.mark.parametrize(
    ("step", "last"),
    [
        (
            Step("n1", "from_net", came(), cause="no-local-backend"),
            "deny  at n1: no backend of the service is on that node, and its policy is Local",
        ),
        (
            Step(
                "n1",
                "from_net",
                came(),
                direction="ingress",
                policies=[{"namespace": "shop", "name": "closed", "rules": []}],
            ),
            "deny  at n1: ingress: isolated by shop/closed",
        ),
        (
            Step("n1", "from_net", came(), "none", to="stack", went=came()),
            "none  left to the stack of n1: no frontend of a service",
        ),
        (
            Step("n1", "from_net", came(), cause="firewall", firewall=said("firewall", "deny")),
            "deny  at n1: firewall: 198.51.100.0/24 is denied by edge rules[2]",
        ),
        (
            Step(
                "n1",
                "from_net",
                came(),
                cause="firewall",
                firewall={"cause": "firewall", "prefix": None, "rule": None},
            ),
            "deny  at n1: firewall: no entry allows it, and the default is Drop",
        ),
        (
            Step("n1", "from_net", came(), "allow", to="pod", went=came(), firewall=said()),
            "allow  pod  answers",
        ),
    ],
    ids=["no backend", "a policy", "no frontend", "denied", "by default", "let in"],
)
def test_how_it_ends(step: Step, last: str) -> None:
    lines = trace(step).splitlines()
    assert lines[-1] == last
    allowed = "firewall: 198.51.100.0/24 is allowed by edge rules[2], up to 50 packets a second"
    assert any(allowed in line for line in lines) == (step.firewall == said())
