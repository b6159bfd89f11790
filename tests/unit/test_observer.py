"""Events as columns, names by the journal, filters, flow records."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockgate.boot import this_boot
from lockgate.compile.tables import POLICY, UNREADABLE
from lockgate.objects.address import parse_address
from lockgate.observer.flows import Filter, FilterError, FlowLog, Names, parse_filter
from lockgate.observer.journal import Journal
from lockgate.observer.records import events_of

EVENT = np.dtype(
    [
        ("time", "<u8"),
        ("saddr", "u1", (16,)),
        ("daddr", "u1", (16,)),
        ("sport", ">u2"),
        ("dport", ">u2"),
        *[
            (name, "u1")
            for name in (
                "proto",
                "type",
                "verdict",
                "direction",
                "tcp_flags",
                "cause",
                "place",
                "captured",
            )
        ],
        *[
            (name, "<u4")
            for name in (
                "src_endpoint",
                "dst_endpoint",
                "class",
                "reason",
                "service",
                "ifindex",
                "length",
                "epoch",
                "pending",
                "line",
                "egress_class",
                "egress_cell",
                "egress_pending",
            )
        ],
    ]
)
NAMES = Names(
    {"CAUSE_NONE": 0, "CAUSE_POLICY": 1, "CAUSE_SPOOFED_SOURCE": 4, "CAUSE_MAX": 5},
    {"EVENT_VERDICT": 1, "EVENT_DROP": 2},
    {"PLACE_FROM_POD": 1, "PLACE_TO_POD": 2, "PLACE_FROM_NET": 3},
)
LINES: list[dict[str, Any]] = [
    {"k": "endpoint", "id": 1, "uid": "a", "namespace": "shop", "name": "web",
     "labels": {"a": "b"}},
    {"k": "endpoint", "id": 300, "uid": "b", "namespace": "pay", "name": "db"},
    {"k": "reason", "id": 1, "verdict": "allow", "direction": "ingress",
     "rules": [["pay", "db", 0], ["pay", "db", 2], ["pay", "more", 1]]},
    {"k": "reason", "id": 2, "verdict": "deny", "direction": "ingress",
     "rules": [["pay", "db", -1]]},
    {"k": "reason", "id": 3, "verdict": "deny", "direction": "egress",
     "rules": [["pay", "db", POLICY], ["pay", "odd", UNREADABLE]]},
    {"k": "service", "id": 5, "namespace": "pay", "name": "db", "port": 5432, "ip": "10.9.0.1"},
]  # fmt: skip


def test_a_denial_names_policies_that_cant_be_read(tmp_path: Path) -> None:
    write(tmp_path / "journal", LINES)
    journal = Journal(tmp_path / "journal")
    journal.refresh()
    found = [(one["name"], one["rules"]) for one in journal.reasons[3].policies]
    assert found == [("db", []), ("odd", ["unreadable"])]


def write(path: Path, lines: list[dict[str, Any]]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)


def event(**fields: Any) -> np.ndarray[Any, Any]:
    record = np.zeros(1, EVENT)
    defaults: dict[str, Any] = {
        "time": time.clock_gettime_ns(time.CLOCK_BOOTTIME),
        "sport": 40000, "dport": 5432, "proto": 6, "type": 1, "verdict": 1, "direction": 1,
        "tcp_flags": 2, "place": 2, "src_endpoint": 1, "dst_endpoint": 300, "reason": 1,
        "ifindex": 65539, "length": 60,
    }  # fmt: skip
    for key, value in (defaults | fields).items():
        record[key] = value
    for key, ip in (("saddr", "10.0.0.1"), ("daddr", "fd00::2")):
        record[key] = np.frombuffer(parse_address(ip), np.uint8)
    return record


@pytest.fixture
def log(tmp_path: Path) -> FlowLog:
    write(tmp_path / "journal", LINES)
    journal = Journal(tmp_path / "journal")
    journal.refresh()
    return FlowLog(EVENT, 128, NAMES, journal, "n1", capacity=8)


def test_allowed_names_every_rule_and_both_ends(log: FlowLog) -> None:
    log.add(event(service=5))
    (record,) = log.select(Filter())
    first = {"kind": "NetworkPolicy", "namespace": "pay", "name": "db"}
    assert record | {"time": ""} == {
        "time": "",
        "node": "n1",
        "type": "verdict",
        "verdict": "allow",
        "direction": "ingress",
        "cause": None,
        "place": "to_pod",
        "policy": first,
        "rule": "ingress[0]",
        "policies": [
            {**first, "rules": ["ingress[0]", "ingress[2]"]},
            {**first, "name": "more", "rules": ["ingress[1]"]},
        ],
        "source": {
            "namespace": "shop", "pod": "web", "labels": {"a": "b"}, "ip": "10.0.0.1",
            "port": 40000,
        },
        "destination": {
            "namespace": "pay", "pod": "db", "labels": {}, "ip": "fd00::2", "port": 5432,
        },
        "protocol": "TCP",
        "tcpFlags": ["SYN"],
        "service": {"namespace": "pay", "name": "db", "port": 5432},
        "interface": "lg3",
        "length": 60,
    }  # fmt: skip


ONE_EACH = [
    # what the record tells: its own verdict, and that of egress if it has one
    ({"direction": 2, "reason": 7, "class": 3}, [(1, 2, 7, 3, 0)]),
    ({"reason": 6, "class": 4, "pending": 9}, [(1, 1, 6, 4, 9)]),
    (
        {
            "reason": 6,
            "class": 4,
            "egress_cell": 1 << 31 | 5,
            "egress_class": 8,
            "egress_pending": 2,
        },
        [(1, 2, 5, 8, 2), (1, 1, 6, 4, 0)],
    ),
    (
        {"verdict": 0, "cause": 1, "reason": 6, "class": 4, "egress_cell": 1 << 31},
        [(1, 2, 0, 0, 0), (0, 1, 6, 4, 0)],
    ),
    ({"type": 2, "verdict": 0, "cause": 3, "direction": 0, "reason": 0}, [(0, 0, 0, 0, 0)]),
]


def test_a_record_of_two_verdicts_becomes_two_events_egress_first() -> None:
    records = np.concatenate([event(service=n, **fields) for n, (fields, _) in enumerate(ONE_EACH)])
    heads = np.arange(len(records), dtype=np.uint8).reshape(-1, 1)
    events, rows = events_of(records, heads)
    wanted = [(n, one) for n, (_, ones) in enumerate(ONE_EACH) for one in ones]
    fields = ("verdict", "direction", "reason", "class", "pending")
    assert [(int(e["service"]), tuple(int(e[name]) for name in fields)) for e in events] == wanted
    assert rows is not None and rows[:, 0].tolist() == [n for n, _ in wanted]
    assert [int(e["cause"]) for e in events if e["verdict"]] == [0] * 5
    assert (events["saddr"] == records["saddr"][0]).all()


def test_denied_names_the_isolating_policies_and_no_rule(log: FlowLog) -> None:
    log.add(event(verdict=0, reason=2, cause=1))
    (record,) = log.select(Filter())
    assert (record["verdict"], record["cause"], record["rule"]) == ("deny", "policy", None)
    assert record["policies"] == [
        {"kind": "NetworkPolicy", "namespace": "pay", "name": "db", "rules": []}
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"reason": 0},
        {"reason": 99},  # not in the journal
        {"reason": 1, "direction": 2},  # speaks of ingress
        {"reason": 1, "verdict": 0, "cause": 4, "type": 2, "direction": 0},
    ],
)
def test_never_names_a_rule_that_did_not_decide(log: FlowLog, fields: dict[str, int]) -> None:
    log.add(event(**fields))
    (record,) = log.select(Filter())
    assert (record["policy"], record["rule"], record["policies"]) == (None, None, [])


def test_icmp_has_type_and_code_instead_of_ports(log: FlowLog) -> None:
    log.add(event(proto=58, sport=128, dport=3, tcp_flags=0))
    (record,) = log.select(Filter())
    assert (record["protocol"], record["icmpType"], record["icmpCode"]) == ("ICMPv6", 128, 3)
    assert "port" not in record["source"] and record["tcpFlags"] is None
    assert log.select(Filter(port=3)) == []


def test_a_record_has_the_labels_of_its_time(log: FlowLog) -> None:
    log.add(event())
    log.add(event(time=event()["time"][0] + 10**12))
    then = int(event()["time"][0])
    changed = {**LINES[0], "labels": {"a": "c"}, "since": [this_boot(), then]}
    write(log.journal.path, [changed])
    log.journal.refresh()
    labels = [record["source"]["labels"] for record in log.select(Filter())]
    assert labels == [{"a": "b"}, {"a": "c"}]


def test_unknown_ends_have_addresses_and_nodes_their_names(log: FlowLog) -> None:
    log.nodes = {"10.0.0.1": "n2"}
    log.add(event(src_endpoint=0, dst_endpoint=7_000_000))
    (record,) = log.select(Filter())
    assert record["source"] == {"node": "n2", "ip": "10.0.0.1", "port": 40000}
    assert record["destination"] == {"ip": "fd00::2", "port": 5432}


def test_keeps_the_newest_and_counts_on(log: FlowLog) -> None:
    for start in (0, 5, 10):
        log.add(np.concatenate([event(length=start + i) for i in range(5)]))
    assert (log.first, log.next) == (7, 15)
    assert [record["length"] for record in log.select(Filter())] == list(range(7, 15))
    assert [record["length"] for record in log.select(Filter(limit=2))] == [13, 14]
    assert [record["length"] for record in log.select(Filter(), 12)] == [12, 13, 14]
    numbers = log.numbers(Filter())
    log.add(event(length=15))
    assert [record["length"] for record in log.records(numbers)] == list(range(8, 15))
    log.add(np.concatenate([event(length=i) for i in range(20)]))
    assert [record["length"] for record in log.select(Filter())] == list(range(12, 20))


def test_first_bytes_stay_with_their_event(log: FlowLog) -> None:
    log.add(np.concatenate([event()] * 7))
    heads = np.zeros((3, 128), np.uint8)
    heads[:, 0] = (10, 11, 12)
    log.add(np.concatenate([event(captured=1)] * 3), heads)
    assert [r.get("packet") for r in log.select(Filter(limit=4))] == [None, "0a", "0b", "0c"]


@pytest.mark.parametrize(
    ("wanted", "count"),
    [
        ({}, 3),
        ({"verdict": "deny"}, 2),
        ({"direction": "ingress"}, 2),
        ({"cause": "spoofed-source"}, 1),
        ({"namespace": "shop"}, 2),
        ({"namespace": "none"}, 0),
        ({"pod": "shop/web"}, 2),
        ({"pod": "pay/web"}, 0),
        ({"pod": "db"}, 3),
        ({"policy": "pay/db"}, 2),
        ({"policy": "more"}, 1),
        ({"policy": "shop/db"}, 0),
        ({"port": "53", "protocol": "udp"}, 1),
        ({"since": "1h"}, 3),
        ({"since": "2999-01-01T00:00:00Z"}, 0),
        ({"limit": "0"}, 0),
        ({"verdict": "", "limit": "1"}, 1),
    ],
)
def test_filter(log: FlowLog, wanted: dict[str, str], count: int) -> None:
    log.add(event())
    log.add(event(verdict=0, reason=2, cause=1, src_endpoint=0))
    log.add(event(verdict=0, reason=0, cause=4, type=2, direction=0, proto=17, dport=53))
    assert len(log.select(parse_filter(wanted, NAMES))) == count


@pytest.mark.parametrize(
    "wanted",
    [{"verdict": "maybe"}, {"port": "http"}, {"port": "65536"}, {"cause": "max"},
     {"since": "soon"}, {"limit": "-1"}, {"protocol": "quic"}],
)  # fmt: skip
def test_filter_that_means_nothing(wanted: dict[str, str]) -> None:
    with pytest.raises(FilterError, match=next(iter(wanted))):
        parse_filter(wanted, NAMES)


def test_journal_follows_what_is_appended_and_survives_damage(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    journal = Journal(path)
    journal.refresh()
    path.write_text('{"k":"endpoint","id":1,"namespace":"a","na')
    journal.refresh()
    assert journal.endpoints == {}
    with path.open("a") as file:
        file.write('me":"b"}\nnot json\n{"k":"endpoint","id":-1}\n{"k":"later","id":1}\n')
    journal.refresh()
    assert journal.endpoints[1].name == "b"
    assert journal.damaged == 2
    ids = np.array([1, 2, 10**6], np.uint32)
    assert journal.is_pod(ids, "a/b").tolist() == [True, False, False]


def pod_line(number: int) -> dict[str, Any]:
    return {"k": "endpoint", "id": number, "namespace": "a", "name": f"pod-{number}"}


def put(path: Path, lines: list[dict[str, Any]]) -> None:
    """In the place of the file, as the agent shortens its journal."""
    write(path.with_suffix(".new"), lines)
    path.with_suffix(".new").rename(path)


def test_what_a_shorter_journal_leaves_out_is_forgotten_with_its_last_event(tmp_path: Path) -> None:
    path = tmp_path / "journal"
    write(path, [*LINES, *map(pod_line, range(400, 500))])
    journal = Journal(path)
    journal.refresh()
    log = FlowLog(EVENT, 128, NAMES, journal, "n1", capacity=2)
    log.add(event(src_endpoint=400, dst_endpoint=401, service=5))
    put(path, [pod_line(410)])
    journal.refresh()
    assert len(journal.endpoints) == 102  # events about the others may be on their way
    put(path, [pod_line(410), pod_line(500)])
    journal.refresh()
    assert set(journal.endpoints) == {400, 401, 410, 500}
    assert set(journal.reasons) == {1} and set(journal.services) == {5}
    ids = np.array([400, 402, 410, 500], np.uint32)
    assert journal.is_pod(ids, "a/pod-400").tolist() == [True, False, False, False]
    assert journal.is_pod(ids, "pod-402").tolist() == [False] * 4
    assert journal.in_namespace(ids, "a").tolist() == [True, False, True, True]
    log.add(np.concatenate([event(src_endpoint=500, dst_endpoint=410, reason=0)] * 2))
    put(path, [pod_line(500)])
    journal.refresh()
    assert set(journal.endpoints) == {410, 500}
    assert journal.reasons == {} and journal.services == {}
    write(path, [pod_line(402)])  # ids are not reused, but names are
    journal.refresh()
    assert journal.is_pod(ids, "pod-402").tolist() == [False, True, False, False]
    assert journal.is_pod(ids, "pod-500").tolist() == [False, False, False, True]
