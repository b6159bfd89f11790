"""The journal: ids that outlive the process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from lockgate.agent import journal as journal_module
from lockgate.agent.foreign import Foreign
from lockgate.agent.ids import NodeIds
from lockgate.agent.journal import Journal, LastIds
from lockgate.compile import compile_node
from lockgate.objects.model import ObjectMeta, Pod
from lockgate.observer import journal as reader_module
from lockgate.observer.journal import Journal as Reader
from tests import generate


def pod(name: str, **labels: str) -> Pod:
    return Pod(metadata=ObjectMeta(name=name, namespace="shop", uid=f"uid-{name}", labels=labels))


def read(path: Path) -> Reader:
    reader = Reader(path)
    reader.refresh()
    return reader


def test_ids_are_the_same_after_a_restart_and_never_reused(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        first = journal.endpoint(pod("a"))
        rule = journal.reason("allow", "ingress", (("shop", "p", 0), ("shop", "q", 2)))
        service = journal.service("shop", "web", "http", "TCP", 80)
        assert min(first, rule, service) > 0
        assert journal.commit() == 3
    with Journal(path) as journal:
        assert journal.endpoint(pod("a")) == first
        assert journal.reason("allow", "ingress", (("shop", "p", 0), ("shop", "q", 2))) == rule
        assert journal.service("shop", "web", "http", "TCP", 80) == service
        assert journal.commit() == 0
        assert journal.endpoint(pod("b")) == first + 1
        assert journal.reason("deny", "ingress", (("shop", "p", 0),)) == rule + 1


def test_new_labels_are_told_under_the_same_id(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        number = journal.endpoint(pod("a", app="x"))
        assert journal.endpoint(pod("a", app="y")) == number
        journal.commit()
    assert read(path).endpoints[number].labels == {"app": "y"}


def clock(monkeypatch: pytest.MonkeyPatch, boot: str = "") -> list[int]:
    """The clock of events, and the boot, for writers made from now on."""
    time = [1000]
    monkeypatch.setattr(journal_module, "now", lambda: time[0])
    if boot:
        monkeypatch.setattr(journal_module, "this_boot", lambda: boot)
    return time


def app(reader: Reader, number: int, time: int) -> str:
    found = reader.endpoint(number, time)
    assert found is not None
    return found.labels["app"]


@pytest.mark.parametrize("shortened", [False, True])
def test_what_a_pod_was_before_is_known_by_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shortened: bool
) -> None:
    path, time = tmp_path / "journal.jsonl", clock(monkeypatch)
    with Journal(path) as journal:
        number = journal.endpoint(pod("a", app="x"))
        journal.commit()
        reader = read(path)
        for time[0], name in ((2000, "y"), (3000, "x")):
            journal.endpoint(pod("a", app=name))
        journal.endpoint(pod("a", app="x"))
        journal.commit()
        if shortened:
            reader.refresh()
            for _ in range(2):
                with journal.asking():
                    journal.endpoint(pod("a", app="x"))
                time[0] += 1000
                journal.shorten()
        reader.refresh()
        times = (1, 1000, 1999, 2000, 2999, 3000, 1 << 62)
        assert [app(reader, number, t) for t in times] == ["x", "x", "x", "y", "y", "x", "x"]
        assert reader.endpoint(number + 1, 5000) is None


def test_what_was_before_a_boot_is_of_no_event(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "journal.jsonl"
    for boot, name in (("another", "x"), ("another", "y"), ("", "y"), ("", "z")):
        with monkeypatch.context() as patch:
            time = clock(patch, boot)
            time[0] = 9000 if boot else 500 + 100 * (name == "z")
            with Journal(path) as journal:
                number = journal.endpoint(pod("a", app=name))
                journal.commit()
    reader = read(path)
    assert [app(reader, number, t) for t in (1, 599, 600, 9999)] == ["y", "y", "z", "z"]


def test_lines_without_a_time_replace_what_is_known(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    line = '{{"k":"endpoint","id":1,"namespace":"shop","name":"a","labels":{{"app":"{}"}}}}\n'
    path.write_text(line.format("x") + line.format("y"))
    assert app(read(path), 1, 5) == "y"


def test_changes_that_are_remembered_are_bounded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "EARLIER", 3)
    path, time = tmp_path / "journal.jsonl", clock(monkeypatch)
    with Journal(path) as journal:
        numbers = {name: journal.endpoint(pod(name, app="0")) for name in "ab"}
        for change, name in enumerate("aabbb", start=1):
            time[0] += 10
            journal.endpoint(pod(name, app=str(change)))
        journal.commit()
    reader = read(path)
    assert [app(reader, numbers["a"], t) for t in (1005, 1015, 1025)] == ["2", "2", "2"]
    assert [app(reader, numbers["b"], t) for t in (1025, 1035, 1045, 1055)] == list("0345")


@pytest.mark.parametrize("torn", [b'{"k":"endpoint","id":9', b"\xff\xfe", b'{"k"'])
def test_a_torn_last_line_is_cut_off(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.endpoint(pod("a"))
        journal.commit()
    with path.open("ab") as file:
        file.write(torn)
    with Journal(path) as journal:
        assert journal.endpoint(pod("b")) == 2
        journal.commit()
    assert {n: found.name for n, found in read(path).endpoints.items()} == {1: "a", 2: "b"}


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"k":"reason","id":4}\nnonsense\n{"k":"service","id":"x"}\n[]\n')
    with Journal(path) as journal:
        assert journal.reason("deny", "egress", (("shop", "p", 0),)) == 5


def test_nothing_is_on_disk_before_commit(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.endpoint(pod("a"))
        assert path.read_bytes() == b""


LINE = b'{"k":"endpoint","id":3,"uid":"uid-c","namespace":"shop","name":"c"}\n'


@pytest.mark.parametrize(
    "damage",
    [lambda text: b"", lambda text: text[:-20], lambda text: text[:-30] + b"\0" * 30,
     lambda text: text.replace(b'"id":3', b'"id":1'), None],
    ids=["emptied", "cut", "overwritten", "changed", "deleted"],
)  # fmt: skip
def test_ids_are_not_reused_whatever_becomes_of_the_file(
    tmp_path: Path, damage: Callable[[bytes], bytes] | None
) -> None:
    path, last = tmp_path / "journal.jsonl", new_last()
    with Journal(path, last) as journal:
        for name in "abc":
            journal.endpoint(pod(name))
        journal.reason("allow", "ingress", (("shop", "p", 0),))
        journal.commit()
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage(path.read_bytes()))
    with Journal(path, last) as journal:
        assert journal.endpoint(pod("d")) == 4
        assert journal.reason("deny", "ingress", (("shop", "p", 0),)) == 2


def test_the_second_place_learns_from_the_file(tmp_path: Path) -> None:
    path, last = tmp_path / "journal.jsonl", new_last()
    path.write_bytes(LINE)
    Journal(path, last).close()
    assert last == {"endpoint": 3, "reason": 0, "service": 0}


def new_last() -> LastIds:
    return {"endpoint": 0, "reason": 0, "service": 0}


def ask(journal: Journal, pods: str, rules: str) -> dict[str, int]:
    """As a compilation from nothing does."""
    with journal.asking():
        ids = {name: journal.endpoint(pod(name)) for name in pods}
        ids |= {name: journal.reason("allow", "ingress", (("shop", name, 0),)) for name in rules}
        ids["web"] = journal.service("shop", "web", "http", "TCP", 80)
    journal.commit()
    journal.shorten()
    return ids


def test_what_was_wanted_twice_no_more_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        first = ask(journal, "abc", "pqr")
        before = path.stat().st_ino
        following = Reader(path)
        following.refresh()
        second = ask(journal, "ab", "p")
        assert path.stat().st_ino != before
        assert sorted(read(path).endpoints) == [1, 2, 3], "records of c may be about"
        third = ask(journal, "abd", "p")
        found = read(path)
        assert {n: one.name for n, one in found.endpoints.items()} == {1: "a", 2: "b", 4: "d"}
        assert list(found.reasons) == [first["p"]] == [second["p"]] == [third["p"]]
        assert list(found.services) == [first["web"]]
        following.refresh()
        assert following.endpoints.keys() == {1, 2, 3, 4}, "a follower forgets nothing"
        assert following.damaged == found.damaged == 0
        assert ask(journal, "c", "")["c"] == 5, "another id than before"
    with Journal(path) as journal:
        assert [journal.endpoint(pod(name)) for name in "abd"] == [1, 2, 4]
        assert journal.endpoint(pod("e")) == 6
        assert journal.reason("allow", "ingress", (("shop", "q", 0),)) == 4


@pytest.mark.parametrize("seed", range(8))
def test_a_compilation_from_nothing_asks_for_every_id_in_its_tables(
    tmp_path: Path, seed: int
) -> None:
    cluster = generate.cluster(Random(seed))
    with Journal(tmp_path / "journal.jsonl") as journal:
        journal.cluster = cluster
        ids = NodeIds(journal, NoEndpoints(), Foreign(), NoHops())  # type: ignore[arg-type]
        cold = compile_node(cluster, "a", ids)
        journal.commit()
        all_of_them = journal.path.read_bytes().splitlines()
        for _ in range(2):
            compile_node(cluster, "a", ids, cold)
            with journal.asking():
                compile_node(cluster, "a", ids, None)
            journal.shorten()
        shorter = journal.path.read_bytes().splitlines()
        assert len(shorter) == len(all_of_them) + 1, "all, and the line with the last ids"


class NoEndpoints:
    def slot(self, uid: str) -> int | None:
        return None


class NoHops:
    def number(self, node: str) -> int | None:
        return None


def test_the_last_ids_outlive_what_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        for pods in ("abc", "a", "a"):
            ask(journal, pods, "")
    with Journal(path) as journal:
        assert journal.endpoint(pod("d")) == 4


def test_it_is_overgrown_when_most_of_it_is_of_the_past(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(journal_module, "SLACK", 4)
    monkeypatch.setattr(journal_module, "REST", 0.0)
    with Journal(tmp_path / "journal.jsonl") as journal:
        answers = []
        for number in range(20):
            journal.endpoint(pod("a", version=str(number)))
            journal.commit()
            answers.append(journal.overgrown)
            if journal.overgrown:
                ask(journal, "a", "")
        assert True in answers
        assert len(journal.path.read_bytes().splitlines()) < 14


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        ask(journal, "ab", "")
        text = path.read_bytes()
        (tmp_path / "journal.jsonl.new").mkdir()  # as good a reason as a full disk
        with pytest.raises(OSError):
            ask(journal, "a", "")
        assert path.read_bytes() == text
        assert journal.endpoint(pod("c")) == 3
        journal.commit()
        assert len(path.read_bytes().splitlines()) == 4
