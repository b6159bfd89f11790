"""Firewall objects, what a node makes of them, the file of commands, and what the CLI shows."""

from __future__ import annotations

import random
import time
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lockgate.agent.firewall_keys import monotonic_of, wall_of
from lockgate.agent.firewall_log import FirewallLog
from lockgate.cli.firewall import merge, read_list
from lockgate.cli.status import firewall_lines
from lockgate.compile.firewall import Facts, Memory, Rule, wanted
from lockgate.compile.firewall_layout import NUMBER, lay_out
from lockgate.compile.prefixes import NONE, parents, parse
from lockgate.objects.blocks import pack_cidrs
from lockgate.objects.errors import FieldError
from lockgate.objects.firewall import moment, ranges_text, read_ranges
from lockgate.objects.model import (
    Cluster,
    Endpoint,
    EndpointSlice,
    Firewall,
    FirewallRule,
    FirewallSpec,
    LabelSelector,
    Node,
    NodeAddress,
    NodeSpec,
    NodeStatus,
    ObjectMeta,
)
from lockgate.objects.parse import ManifestError
from lockgate.objects.parse import parse as parse_manifest


def manifest(rule: str, spec: str = "") -> str:
    return (
        "apiVersion: lockgate.dev/v1alpha1\nkind: Firewall\nmetadata: {name: edge}\n"
        f"spec:\n  default: Drop{spec}\n  rules:\n  - {rule}\n"
    )


def test_an_object_is_read() -> None:
    text = manifest(
        "{action: Allow, from: [192.0.2.0/24, '2001:db8::/32'], packetsPerSecond: 5,"
        " ports: [{port: 80}, {protocol: UDP, port: 1, endPort: 9}, {protocol: ICMP}],"
        " expires: '2030-01-31T12:00:00Z'}"
    )
    (found,) = parse_manifest(text, "f.yaml").objects
    assert isinstance(found, Firewall)
    assert found.spec.default == "Drop"
    assert found.spec.rules[0].packets_per_second == 5


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("{action: Deny}", "spec.rules[0].from: expected at least one CIDR block"),
        ("{action: Deny, from: [192.0.2.1]}", "spec.rules[0].from[0]: expected a CIDR block"),
        ("{action: Deny, from: [192.0.2.0/33]}", 'got "192.0.2.0/33"'),
        ("{action: Drop, from: [192.0.2.0/24]}", "spec.rules[0].action: expected Allow or Deny"),
        (
            "{action: Deny, from: [192.0.2.0/24], packetsPerSecond: 5}",
            "spec.rules[0].packetsPerSecond: expected none, as the action is Deny",
        ),
        (
            "{action: Allow, from: [192.0.2.0/24], ports: [{protocol: ICMP, port: 1}]}",
            "spec.rules[0].ports[0].port: expected none, as ICMP has no ports",
        ),
        (
            "{action: Allow, from: [192.0.2.0/24], ports: [{port: 80, endPort: 79}]}",
            "spec.rules[0].ports[0].endPort: expected a number from port (80) to 65535",
        ),
        (
            "{action: Allow, from: [192.0.2.0/24], expires: tomorrow}",
            "spec.rules[0].expires: expected a time such as",
        ),
        ("{action: Allow, form: [192.0.2.0/24]}", "spec.rules[0]: expected only the fields"),
    ],
)
def test_what_is_wrong_is_named(rule: str, said: str) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(manifest(rule), "f.yaml")
    text = str(caught.value)
    assert text.startswith("f.yaml, document 1 (Firewall edge), field ")
    assert said in text


@pytest.mark.parametrize(
    "text",
    [
        *("192.0.2.0/024", "192.0.2.0/", "192.0.2/24", "192.0.02.1/32", "256.0.0.0/8"),
        *("::ffff:1.2.3.4/128", "", "/8", "2001:db8::/129", "2001:db8::g/32", "fe80::1%eth0/64"),
        *("1.2.3.4/32 ", "١.2.3.4/32"),
    ],
)
def test_what_is_no_block(text: str) -> None:
    assert pack_cidrs([text])[2] == [0]


def test_blocks_are_as_the_standard_library_has_them() -> None:
    draw = random.Random(1)
    texts = [f"{ip_address(draw.getrandbits(32))}/{draw.randrange(33)}" for _ in range(300)]
    texts += [f"{ip_address(draw.getrandbits(128))}/{draw.randrange(129)}" for _ in range(300)]
    found, bad = parse(texts)
    assert not bad
    networks = [ip_network(text, strict=False) for text in texts]
    assert [found.text(n) for n in range(len(found))] == [str(one) for one in networks]
    assert parse(["192.0.2.1", "::1"], bare=True)[0].length.tolist() == [128, 128]


def test_parents_and_slots_are_those_of_a_simple_search() -> None:
    draw = random.Random(2)
    texts = [
        f"10.{draw.randrange(3)}.{draw.randrange(3)}.{draw.randrange(256)}/{draw.randrange(8, 33)}"
        for _ in range(400)
    ] + [f"{draw.randrange(4):x}::{draw.randrange(3):x}/{draw.randrange(129)}" for _ in range(200)]
    of = parse([*texts, "0.0.0.0/0", "::/0"])[0].unique()
    networks = [ip_network(of.text(n)) for n in range(len(of))]
    for place, network in enumerate(networks):
        around = [
            (other.prefixlen, at)
            for at, other in enumerate(networks)
            if at != place and other.version == network.version and network.subnet_of(other)  # type: ignore[arg-type]
        ]
        assert parents(of)[place] == (max(around)[1] if around else NONE)
    numbers = np.arange(1, len(of) + 1, dtype=np.uint32)
    zero, no = np.zeros(len(of), np.int64), np.zeros(len(of), np.bool_)
    layout = lay_out(of, zero, no, numbers)
    slots = layout.slots()
    for _ in range(500):
        address = ip_address(f"10.{draw.randrange(4)}.{draw.randrange(4)}.{draw.randrange(256)}")
        word = int(slots[int(address) >> 8])
        within = [
            (one.prefixlen, at)
            for at, one in enumerate(networks)
            if one.version == 4 and address in one
        ]
        if not word >> 24:  # what does not lie around it comes first, and is passed over
            number = word & NUMBER
            while number and address not in networks[number - 1]:
                number = int(layout.next[number - 1])
            assert number == (max(within)[1] + 1 if within else 0)
        else:
            short = [one for one in within if one[0] <= 24]
            assert word & NUMBER == (max(short)[1] + 1 if short else 0)


@pytest.mark.parametrize(
    ("texts", "ranges"),
    [
        (["tcp/80"], (("TCP", 80, 80),)),
        (["udp/53", "TCP/80-90", "tcp/80-90"], (("TCP", 80, 90), ("UDP", 53, 53))),
        (["sctp", "icmp"], (("ICMP", 0, 0), ("SCTP", 0, 65535))),
    ],
)
def test_ports_are_read_and_written(texts: list[str], ranges: Any) -> None:
    assert read_ranges(texts) == ranges
    assert read_ranges(ranges_text(ranges)) == ranges


@pytest.mark.parametrize(
    "text", ["80", "tcp/", "tcp/0", "tcp/80-", "tcp/90-80", "gre", "tcp/65536", "icmp/8"]
)
def test_ports_that_are_none(text: str) -> None:
    with pytest.raises(FieldError):
        read_ranges([text])


def test_times() -> None:
    assert moment("1970-01-01T00:00:10Z", "x") == 10
    assert moment("1970-01-01T01:00:10+01:00", "x") == 10
    with pytest.raises(FieldError):
        moment("1970-01-01", "x")


# ---- What a node makes of them ---------------------------------------------------------


def firewall(name: str, *rules: FirewallRule, **spec: Any) -> Firewall:
    return Firewall(metadata=ObjectMeta(name=name), spec=FirewallSpec(rules=list(rules), **spec))


DENY = FirewallRule(action="Deny", from_=["192.0.2.0/24"])


def objects(found: Any) -> list[tuple[str, str, int]]:
    return [(r.action, r.name, r.index) for r in found.rules if r.source == "object"]


def test_objects_for_other_nodes_do_not_count() -> None:
    here = LabelSelector(match_labels={"role": "edge"})
    items = [firewall("a", DENY, node_selector=here, default="Drop"), firewall("b", DENY)]
    found = wanted(items, {"role": "edge"}, Facts(), Memory(), 0)
    assert objects(found) == [("deny", "a", 0), ("deny", "b", 0)] and found.drop
    found = wanted(items, {}, Facts(), Memory(), 0)
    assert objects(found) == [("deny", "b", 0)] and not found.drop
    everywhere = firewall("c", DENY, default="Drop")
    assert wanted([*items, everywhere], {}, Facts(), Memory(), 0).drop_by == "c"


def test_what_can_not_be_read_is_named_and_the_rest_holds() -> None:
    """As an API server without the definition would give it."""
    bad = FirewallRule(action="Deny", from_=["192.0.2.0/24", "nonsense", "1.2.3.4"])
    worse = FirewallRule(action="Allow", from_=["192.0.2.0/24"], expires="never")
    found = wanted([firewall("a", bad, worse)], {}, Facts(), Memory(), 0)
    assert found.errors == [
        "Firewall a: spec.rules[0].from[1]: not a CIDR block: 'nonsense'",
        "Firewall a: spec.rules[0].from: 1 more that are no CIDR blocks",
        "Firewall a: spec.rules[1].expires: expected a time such as 2030-01-31T12:00:00Z,"
        ' got "never"',
    ]
    assert objects(found) == [("deny", "a", 0)]


def test_rules_that_have_expired_are_left_out() -> None:
    rule = FirewallRule(action="Deny", from_=["192.0.2.0/24"], expires="1970-01-01T00:01:00Z")
    assert objects(wanted([firewall("a", rule)], {}, Facts(), Memory(), 59))
    assert not objects(wanted([firewall("a", rule)], {}, Facts(), Memory(), 60))
    assert not wanted([firewall("a", rule)], {}, Facts(), Memory(), 60).needed


def test_a_list_is_parsed_once() -> None:
    memory, item = Memory(), firewall("a", DENY)
    one, two = (wanted([item], {}, Facts(), memory, 0).rules for _ in range(2))
    rule = Rule("object", "deny", name="a", index=0)
    assert one[rule][0] is two[rule][0]


def test_what_is_built_in() -> None:
    def node(name: str, n: int) -> Node:
        addresses = [
            NodeAddress("InternalIP", f"10.1.0.{n}"),
            NodeAddress("ExternalIP", f"203.0.113.{n}"),
            NodeAddress("Hostname", name),
        ]
        return Node(
            metadata=ObjectMeta(name=name),
            spec=NodeSpec(pod_cidrs=[f"10.2.{n}.0/24"]),
            status=NodeStatus(addresses=addresses),
        )

    api = EndpointSlice(
        metadata=ObjectMeta(
            name="kubernetes",
            namespace="default",
            labels={"kubernetes.io/service-name": "kubernetes"},
        ),
        endpoints=[Endpoint(["10.9.0.1"]), Endpoint(["10.1.0.2"])],
    )
    cluster = Cluster(
        nodes={"a": node("a", 1), "b": node("b", 2)},
        slices={("default", "kubernetes"): api},
    )
    facts = Facts.of(cluster, "a", ["172.31.0.1/24", "fd00::1/64"])
    assert facts.own == {"10.1.0.1/32", "172.31.0.1/32", "fd00::1/128", "10.2.1.0/24"}
    assert facts.members == {"10.1.0.2/32", "10.2.2.0/24"}
    assert facts.servers == {"10.9.0.1/32"}


# ---- The file of commands ----------------------------------------------------------------

ADDED = Rule("command", "deny")
LIMITED = Rule("command", "allow", (("TCP", 80, 80),), 7)


def texts(entries: Any) -> dict[tuple[Rule, float], list[str]]:
    return {key: [of.text(n) for n in range(len(of))] for key, of in entries.items()}


def test_commands_are_there_again(tmp_path: Path) -> None:
    path = tmp_path / "firewall.jsonl"
    log = FirewallLog(path)
    assert log.load(0) == {}
    log.added(ADDED, ["192.0.2.0/24", "2001:db8::/32", "203.0.113.0/24"], 0.0)
    log.added(LIMITED, ["192.0.2.0/24"], 100.0)
    log.deleted([(ADDED, ["203.0.113.0/24"])])
    log.close()
    with path.open("ab") as file:
        file.write(b'{"action":"deny","add":["198.51.')  # a crash
    for now, limited in ((99, {(LIMITED, 100.0): ["192.0.2.0/24"]}), (100, {})):
        log = FirewallLog(path)
        want = {(ADDED, 0.0): ["192.0.2.0/24", "2001:db8::/32"]} | limited
        assert texts(log.load(now)) == want
        log.close()
    assert path.read_bytes().endswith(b"]}\n")


def test_a_file_that_is_mostly_history_is_written_anew(tmp_path: Path) -> None:
    path = tmp_path / "firewall.jsonl"
    log = FirewallLog(path)
    for _ in range(3000):
        log.added(ADDED, ["192.0.2.0/24"], 0.0)
        log.deleted([(ADDED, ["192.0.2.0/24"])])
    assert log.overgrown(1)
    log.rewrite({(LIMITED, 5.0): parse(["203.0.113.0/24"])[0]})
    assert not log.overgrown(1)
    log.added(ADDED, ["192.0.2.0/24"], 0.0)
    log.close()
    log = FirewallLog(path)
    want = {(LIMITED, 5.0): ["203.0.113.0/24"], (ADDED, 0.0): ["192.0.2.0/24"]}
    assert texts(log.load(0)) == want
    log.close()


# ---- The command line --------------------------------------------------------------------


def test_a_list_is_read_line_by_line() -> None:
    text = "# head\n192.0.2.1\n\n 2001:db8::/32 # why\n"
    assert read_list(text, "f") == ["192.0.2.1", "2001:db8::/32"]
    with pytest.raises(ValueError, match="f, line 3: expected an address or a CIDR block: 'x'"):
        read_list("192.0.2.1\n\nx\n", "f")


def test_nodes_are_added_up() -> None:
    def told(packets: int, expires: float | None) -> dict[str, Any]:
        rule = {
            "action": "deny",
            "ports": [],
            "rate": 0,
            "source": "command",
            "name": "",
            "rule": None,
        }
        counted = {"packets": packets, "bytes": packets * 60}
        return {
            "default": "Allow",
            "entries": 1,
            "rules": [{**rule, "entries": 1, **counted}],
            "top": [{**rule, "cidr": "192.0.2.0/24", "expires": expires, **counted}],
        }

    found = merge({"a": told(3, None), "b": told(4, time.time())}, 10)
    assert [one["packets"] for one in found["rules"]] == [7]
    (entry,) = found["top"]
    assert (entry["packets"], entry["bytes"], entry["expires"]) == (7, 420, None)
    assert entry["nodes"] == ["a", "b"]


def test_the_status_says_what_there_is() -> None:
    one = {"default": "Drop", "entries": 20, "rules": 2, "room": 100}
    nodes: list[dict[str, Any]] = [
        {"name": "a", "agentStatus": {"firewall": one}},
        {"name": "b", "agentStatus": {"firewall": None}},
    ]
    assert firewall_lines(nodes) == ["firewall on a: 20 entries by 2 rules, default Drop"]
    nodes[1]["agentStatus"]["firewall"] = one
    assert firewall_lines(nodes) == ["firewall on all nodes: 20 entries by 2 rules, default Drop"]


def test_moments_by_the_kernels_clock() -> None:
    now = time.time()
    whens = np.array([0, now - 1e9, now + 60, moment("9999-12-31T23:59:59Z", "expires")])
    seconds = monotonic_of(whens)
    assert seconds[0] == 0 and seconds[1] == 1
    assert abs(wall_of(seconds)[2] - now - 60) < 2
    assert seconds[3] == 0xFFFF_FFFF, "not what is left of it in 32 bits"
