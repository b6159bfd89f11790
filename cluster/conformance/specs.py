"""Which of Kubernetes' specs run, and which are left out for what reason."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.commands import Failed, run

__all__ = ["GROUP", "Plan", "choose", "is_wide", "left_out", "plan"]

GROUP = "[sig-network] "
_LEFT_OUT = Path(__file__).parent / "left_out.yaml"

# These skip themselves unless there are three zones of two nodes, or three nodes.
_WIDE = re.compile(
    r"Topology Hints |Traffic Distribution |Services should implement NodePort and HealthCheckNode"
)

# What a reason in left_out.yaml may depend on.
_SCTP_SOCKETS = "SCTP sockets"


@dataclass(frozen=True)
class Plan:
    """Names of specs, without "[sig-network] "."""

    together: Sequence[str]  # beside others
    alone: Sequence[str]  # [Serial] and [Disruptive]
    left_out: Mapping[str, str]  # name -> reason

    def __len__(self) -> int:
        """How many are to run."""
        return len(self.together) + len(self.alone)

    def only(self, wide: bool) -> Plan:
        """Those for a cluster of three zones of two nodes, or those for one of two nodes."""
        together, alone = (
            [name for name in names if is_wide(name) == wide]
            for names in (self.together, self.alone)
        )
        return Plan(together, alone, self.left_out)


def plan(e2e: Path, focus: str = "") -> Plan:
    """What to run of the specs in the program `e2e` whose names match the regular expression
    `focus`. Raises Failed."""
    return choose(_names(e2e), left_out(_LEFT_OUT.read_text(), _abilities()), focus)


def is_wide(name: str) -> bool:
    """Whether it needs more than two nodes."""
    return bool(_WIDE.match(name))


def choose(names: Sequence[str], reasons: Mapping[str, str], focus: str = "") -> Plan:
    """Raises Failed for a bad `focus`, and where a name that is left out is not among `names`."""
    if unknown := sorted(set(reasons) - set(names)):
        raise Failed(f"{_LEFT_OUT.name} names what is no spec of {GROUP.strip()}: {unknown[0]!r}")
    try:
        wanted = [name for name in names if re.search(focus, name)]
    except re.error as error:
        raise Failed(f"--focus {focus!r}: {error}") from None
    if not wanted:
        raise Failed(f"--focus {focus!r}: no spec of {GROUP.strip()} matches")
    chosen = [name for name in wanted if name not in reasons]
    alone = [name for name in chosen if re.search(r"\[(Serial|Disruptive)\]", name)]
    return Plan(
        [name for name in chosen if name not in alone],
        alone,
        {name: reasons[name] for name in wanted if name in reasons},
    )


def left_out(text: str, abilities: Iterable[str]) -> dict[str, str]:
    """Name -> reason, of left_out.yaml's text: a list of {reason, specs, unless}. What the machine
    is able to do (`abilities`) puts back what is left out unless it is. Raises Failed."""
    able = set(abilities)
    found: dict[str, str] = {}
    for entry in yaml.safe_load(text):
        if entry.get("unless") in able:
            continue
        for name in entry["specs"]:
            if name in found:
                raise Failed(f"{_LEFT_OUT.name} names {name!r} twice")
            found[name] = entry["reason"]
    return found


def _names(e2e: Path) -> list[str]:
    """Names of all specs of the group, sorted. Lines are "FILE:LINE: NAME"."""
    text = run(e2e, "--list-tests", timeout=60)
    names = re.findall(rf"^\s+\S+:\d+: {re.escape(GROUP)}(.+)$", text, re.M)
    if len(set(names)) != len(names):
        raise Failed(f"{e2e.name} has specs of the same name")
    return sorted(names)


def _abilities() -> set[str]:
    try:
        socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_SCTP).close()
    except OSError:
        return set()
    return {_SCTP_SOCKETS}
