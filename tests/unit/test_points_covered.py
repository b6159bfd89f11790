"""Every point of docs/policy.md has rows in a table, where that page says."""

from __future__ import annotations

import re
from pathlib import Path

from tests.bytecode import test_points as packets
from tests.system import test_cluster as running
from tests.unit import test_spec_policy as verdicts

POLICY = Path(__file__).parents[2] / "docs" / "policy.md"
ON_PACKETS = {15, 19, 20, 22, 23, 24, 25, 30, 31}
ROWS = {
    "tests/unit/test_spec_policy.py": [row[0] for row in (*verdicts.CASES, *verdicts.CHANGES)],
    "tests/bytecode/test_points.py": [row.name for row in packets.ROWS],
    "tests/system/test_cluster.py": [row[0] for row in running.SAVED],
}


def points(file: str) -> set[int]:
    return {int(name.split()[0]) for name in ROWS[file]}


def test_every_point_has_rows() -> None:
    assert set().union(*(points(file) for file in ROWS)) == set(range(1, 33))


def test_the_rows_are_where_the_page_says() -> None:
    assert points("tests/bytecode/test_points.py") == ON_PACKETS
    assert points("tests/system/test_cluster.py") == {32}
    assert points("tests/unit/test_spec_policy.py") >= set(range(1, 33)) - ON_PACKETS - {32}
    text = POLICY.read_text()
    assert "only packets show (15, 19, 20, 22 to 25, 30, 31)" in text
    for file in re.findall(r"`(tests/[^`]+)`", text):
        assert (POLICY.parents[1] / file).exists(), file
    assert set(ROWS) <= set(re.findall(r"`(tests/[^`]+)`", text))


def test_names_of_rows_are_their_own() -> None:
    for file, names in ROWS.items():
        assert len(names) == len(set(names)), file
