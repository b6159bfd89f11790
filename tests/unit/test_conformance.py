"""Which of Kubernetes' specs run, and what is made of their reports (cluster/conformance)."""

from __future__ import annotations

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from cluster.commands import Failed
from cluster.conformance import batches, report, specs
from cluster.conformance.batches import Result

NAMES = ["DNS should a", "Netpol should b [Serial]", "Services should c", "Services should d"]


@pytest.mark.parametrize(
    ("focus", "together", "alone", "left_out"),
    [
        ("", ["DNS should a", "Services should c"], ["Netpol should b [Serial]"], 1),
        ("^Services", ["Services should c"], [], 1),
        ("Netpol", [], ["Netpol should b [Serial]"], 0),
        ("should d", [], [], 1),
    ],
)
def test_a_focus_chooses_and_serial_specs_run_alone(
    focus: str, together: list[str], alone: list[str], left_out: int
) -> None:
    plan = specs.choose(NAMES, {"Services should d": "not yet"}, focus)
    assert (plan.together, plan.alone, len(plan.left_out)) == (together, alone, left_out)


def test_what_needs_more_nodes_runs_where_they_are() -> None:
    wide = "Traffic Distribution should route"
    plan = specs.choose([*NAMES, wide, f"{wide} [Serial]"], {})
    assert plan.only(True) == specs.Plan([wide], [f"{wide} [Serial]"], {})
    narrow = plan.only(False)
    assert [*narrow.together, *narrow.alone] == [NAMES[0], NAMES[2], NAMES[3], NAMES[1]]
    assert len(plan) == 6


@pytest.mark.parametrize(
    ("reasons", "focus", "message"),
    [
        ({"Services should e": "gone"}, "", "names what is no spec .*'Services should e'"),
        ({}, "(", "--focus"),
        ({}, "LoadBalancers", "no spec of .* matches"),
    ],
)
def test_what_cannot_be_meant_is_refused(reasons: dict[str, str], focus: str, message: str) -> None:
    with pytest.raises(Failed, match=message):
        specs.choose(NAMES, reasons, focus)


_TEXT = """
- reason: not yet
  specs: [a, b]
- reason: no SCTP
  unless: SCTP sockets
  specs: [c]
"""


@pytest.mark.parametrize(
    ("abilities", "expected"),
    [
        ([], {"a": "not yet", "b": "not yet", "c": "no SCTP"}),
        (["SCTP sockets"], {"a": "not yet", "b": "not yet"}),
    ],
)
def test_what_the_machine_can_do_is_run(abilities: list[str], expected: dict[str, str]) -> None:
    assert specs.left_out(_TEXT, abilities) == expected


def test_a_spec_is_left_out_for_one_reason() -> None:
    with pytest.raises(Failed, match="'a' twice"):
        specs.left_out("- {reason: x, specs: [a]}\n- {reason: y, specs: [a]}", [])


def test_every_spec_that_is_left_out_has_a_reason() -> None:
    path = Path(specs.__file__).parent / "left_out.yaml"
    found = specs.left_out(path.read_text(), [])
    assert found and all(found.values())


def test_a_focus_for_ginkgo_is_one_spec_and_no_other() -> None:
    pattern = batches._exactly("[sig-network] Netpol should (a) 'b' [Feature:X]")
    # Go's escapes (re2, Syntax) are of punctuation only.
    assert not re.search(r"\\[\w\s]", pattern)
    assert re.search(pattern, "suite [sig-network] Netpol should (a) 'b' [Feature:X]")
    assert not re.search(pattern, "suite [sig-network] Netpol should (a) 'b' [Feature:X] more")


def test_the_longest_begin_first() -> None:
    long = "LoadBalancers should not have connectivity disruption during rolling update with x"
    names = [*"abcde", long, "f"]
    assert batches.in_batches(names) == [[long], ["a", "b", "c", "d"], ["e", "f"]]


def _spec(name: str, state: str, message: str = "", kind: str = "It") -> dict[str, object]:
    failure = {"Failure": {"Message": message}} if message else {}
    return {
        "ContainerHierarchyTexts": ["[sig-network] Services"],
        "LeafNodeText": name,
        "LeafNodeType": kind,
        "State": state,
        "RunTime": 1_500_000_000,
        **failure,
    }


def test_results_are_read_from_ginkgos_report() -> None:
    found = [
        _spec("should pass", "passed"),
        _spec("should fail", "timedout", "too late"),
        _spec("should skip", "skipped", "no zones"),
        _spec("of others", "passed"),
    ]
    suites = [{"SpecialSuiteFailureReasons": None, "SpecReports": found}]
    names = [f"Services should {what}" for what in ("pass", "fail", "skip", "be there")]
    assert batches._read(suites, names, Path("x.log")) == [
        Result("Services should pass", "passed", 1.5),
        Result("Services should fail", "failed", 1.5, "too late"),
        Result("Services should skip", "skipped", 1.5, "no zones"),
        Result("Services should be there", "failed", 0, "did not run: x.log"),
    ]


def test_a_suite_that_fails_before_its_specs_says_so() -> None:
    broken = _spec("", "failed", "no node is ready", kind="SynchronizedBeforeSuite")
    suites = [{"SpecialSuiteFailureReasons": None, "SpecReports": [broken]}]
    (result,) = batches._read(suites, ["Services should pass"], Path("x.log"))
    assert result == Result("Services should pass", "failed", 0, "did not run: no node is ready")


@pytest.mark.parametrize(
    ("state", "good"), [("passed", True), ("failed", False), ("skipped", False)]
)
def test_only_what_ran_and_passed_is_good(state: str, good: bool, tmp_path: Path) -> None:
    results = [Result("Services should a", state, 1, "why\x00")]
    assert report.good(results) is good
    report.write_junit(tmp_path / "junit.xml", results, {"Services should b": "not yet"})
    suite = ElementTree.parse(tmp_path / "junit.xml").getroot()
    assert suite.attrib == {
        "name": "sig-network",
        "tests": "2",
        "failures": str(int(not good)),
        "skipped": "1",
    }


@pytest.mark.parametrize(
    ("name", "topic"),
    [
        (
            "Netpol NetworkPolicy between server and client should x [Feature:NetworkPolicy]",
            "Netpol",
        ),
        ("Networking Granular Checks: Pods should function", "Networking Granular Checks: Pods"),
        ("DNS should provide", "DNS"),
        ("[Feature:IPv6DualStack] should create service", "IPv6DualStack"),
        ("Proxy version v1 should proxy", "Proxy"),
    ],
)
def test_a_spec_is_counted_under_what_it_tests(name: str, topic: str) -> None:
    assert report._topic(name) == topic
