"""The verifier's work per program stays within a budget: a sudden rise is a regression, and the
kernel's limit (1,000,000 instructions) ends what runs on users' machines.

verified_insns.json holds the most that was measured; kernels differ, so less is fine and a tenth
more is. `python -m tests.bytecode.test_complexity` renews it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from lockgate.bpf.object import Object
from tests.bytecode.world import OBJECT

BUDGET = Path(__file__).parent / "verified_insns.json"
SLACK = 1.1


@pytest.mark.parametrize("program", sorted(json.loads(BUDGET.read_text())))
def test_program_is_within_its_budget(world, program):
    budget = json.loads(BUDGET.read_text())[program]
    found = world.object.verified_insns()[program]
    assert found <= budget * SLACK, (
        f"the verifier walks {found} instructions of {program}, its budget is {budget}: "
        "find out what grew, or renew the budget: python -m tests.bytecode.test_complexity"
    )


def test_every_program_has_a_budget(world):
    assert sorted(json.loads(BUDGET.read_text())) == sorted(world.object.verified_insns()), (
        "renew the budget: python -m tests.bytecode.test_complexity"
    )


def renew() -> None:
    with Object(OBJECT) as loaded:
        loaded.load()
        BUDGET.write_text(json.dumps(loaded.verified_insns(), indent=2, sort_keys=True) + "\n")
    print(f"wrote {BUDGET}", file=sys.stderr)


if __name__ == "__main__":
    renew()
