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

from lockgate.bpf import clock
from lockgate.bpf.object import Object
from tests.bytecode import edge
from tests.bytecode.world import OBJECT

BUDGET = Path(__file__).parent / "verified_insns.json"
SLACK = 1.1
#: All that XDP can do at once.
XDP = {"config_balance": 1, "config_firewall": 1, "config_generic": 1}


def walked(first: Object) -> dict[str, int]:
    """Instructions by program, of both objects; XDP's shares the maps of the loaded one."""
    with Object(edge.OBJECT) as second:
        second.share_maps(first)
        second.set_rodata({**XDP, **clock.constants()})
        second.load()
        return first.verified_insns() | second.verified_insns()


@pytest.fixture(scope="module")
def found(_world) -> dict[str, int]:
    return walked(_world.object)


@pytest.mark.parametrize("program", sorted(json.loads(BUDGET.read_text())))
def test_program_is_within_its_budget(found, program):
    budget = json.loads(BUDGET.read_text())[program]
    assert found[program] <= budget * SLACK, (
        f"the verifier walks {found[program]} instructions of {program}, its budget is {budget}: "
        "find out what grew, or renew the budget: python -m tests.bytecode.test_complexity"
    )


def test_every_program_has_a_budget(found):
    assert sorted(json.loads(BUDGET.read_text())) == sorted(found), (
        "renew the budget: python -m tests.bytecode.test_complexity"
    )


def renew() -> None:
    with Object(OBJECT) as loaded:
        loaded.set_rodata(clock.constants())
        loaded.load()
        BUDGET.write_text(json.dumps(walked(loaded), indent=2, sort_keys=True) + "\n")
    print(f"wrote {BUDGET}", file=sys.stderr)


if __name__ == "__main__":
    renew()
