"""The journal: ids that outlive the process."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockgate.agent.journal import Journal, Reader
from lockgate.objects.model import ObjectMeta, Pod


def pod(name: str, **labels: str) -> Pod:
    return Pod(metadata=ObjectMeta(name=name, namespace="shop", uid=f"uid-{name}", labels=labels))


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
    reader = Reader(path)
    assert reader.update() == 2
    assert reader.endpoints[number]["labels"] == {"app": "y"}


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
    reader = Reader(path)
    assert reader.update() == 2
    assert [reader.endpoints[n]["name"] for n in (1, 2)] == ["a", "b"]


def test_a_damaged_line_costs_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    path.write_bytes(b'{"k":"reason","id":4}\nnonsense\n{"k":"service","id":"x"}\n[]\n')
    with Journal(path) as journal:
        assert journal.reason("deny", "egress", (("shop", "p", 0),)) == 5


def test_a_reader_follows_and_leaves_a_line_in_the_making(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    reader = Reader(path)
    assert reader.update() == 0
    with path.open("ab", buffering=0) as file:
        file.write(b'{"k":"endpoint","id":1,"name":"a"}\n{"k":"endpoint",')
        assert reader.update() == 1
        file.write(b'"id":2,"name":"b"}\n')
        assert reader.update() == 1
    assert reader.endpoints[2]["name"] == "b"


def test_nothing_is_on_disk_before_commit(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        journal.endpoint(pod("a"))
        assert path.read_bytes() == b""
