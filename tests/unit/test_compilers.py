"""Tests compile with any clang that scripts/setup.sh is content with."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from tests import compilers

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("name", compilers.VERSIONS)
def test_one_of_them_is_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).symlink_to("/bin/true")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert compilers.clang.__wrapped__() == str(tmp_path / name)


def test_none_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(LookupError, match=r"scripts/setup\.sh test installs one"):
        compilers.clang.__wrapped__()


def test_they_are_those_of_the_build_and_no_test_names_one() -> None:
    assert " ".join(compilers.VERSIONS) in (ROOT / "Makefile").read_text()
    numbers = [name.partition("-")[2] for name in compilers.VERSIONS]
    assert f"for version in {' '.join(numbers)}; do" in (ROOT / "scripts/setup.sh").read_text()
    mine = {Path(__file__), ROOT / "tests/compilers.py"}
    named = [
        os.fspath(path)
        for path in (ROOT / "tests").rglob("*.py")
        if path not in mine and re.search(r"[\"']clang(-\d+)?[\"']", path.read_text())
    ]
    assert named == []
