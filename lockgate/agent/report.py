"""A node's part of `lockgate bugreport`: its kernel, its maps, its tables, its journal's end."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockgate.agent import doctor, questions
from lockgate.bpf import syscall

if TYPE_CHECKING:
    from lockgate.agent.agent import Agent

__all__ = ["report"]

_JOURNAL_LINES = 5000
_MOST = 5000  # entries of a table


def report(agent: Agent) -> dict[str, Any]:
    """What GET /v1/report answers. From the worker."""
    facts = doctor.collect(agent)
    return {
        "kernel": platform.uname()._asdict(),
        "status": questions.status(agent),
        "doctor": [one for one in doctor.check(facts) if one.severity != "ok"],
        "facts": facts,
        "maps": _maps(agent),
        "tables": _tables(agent),
        "journal": _tail(agent.journal.path),
    }


def _maps(agent: Agent) -> list[dict[str, Any]]:
    found = []
    for name in sorted(agent.dp.object.maps):
        info = syscall.map_info(agent.dp.object.map_fd(name))
        found.append(
            {
                "name": name,
                "type": info.type,
                "keySize": info.key_size,
                "valueSize": info.value_size,
                "maxEntries": info.max_entries,
            }
        )
    return found


def _tables(agent: Agent) -> dict[str, Any]:
    """The small tables in hexadecimal, key → value, as they are in the kernel (bpf/types.h)."""
    found: dict[str, Any] = {"facts": questions.dry_run_facts(agent)}
    for name in ("peers", "services", "backends", "routes", "link_roles"):
        table = getattr(agent.dp, name)
        keys, values = table.items()
        pairs = zip(keys[:_MOST], values[:_MOST], strict=True)
        found[name] = {
            "entries": len(keys),
            "dump": [f"{key.tobytes().hex()} {value.tobytes().hex()}" for key, value in pairs],
        }
    for name in ("connections", "half_open", "crowd", "nat", "fragments"):
        found[name] = {"entries": len(getattr(agent.dp, name))}
    return found


def _tail(path: Path) -> list[str]:
    return path.read_text(errors="replace").splitlines()[-_JOURNAL_LINES:]
