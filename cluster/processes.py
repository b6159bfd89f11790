"""Programs that stay up, each alone in a cgroup.

The cgroup is the record of what runs: it says which processes are ours, however they came to be
and whoever started them, and cgroup.kill ends them all without a pid that could be another's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from cluster.commands import Word
from lockgate.net import cgroup

__all__ = ["alive", "launch", "pids", "stop"]

# Moves itself into the cgroups given as its first words up to "--", then becomes the program.
_MOVE = (
    'while [ "$1" != -- ]; do echo 0 >"$1/cgroup.procs" || exit 125; shift; done; shift; exec "$@"'
)


def launch(command: Sequence[Word], cgroups: Sequence[Path], log: Path) -> None:
    """Start the command in all of the cgroups (one per hierarchy; the last is v2's), its output
    to the log, and do not wait."""
    for folder in cgroups:
        cgroup.create(folder)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        # Not a child to be waited for: a grandchild, so that no zombie is left of it.
        subprocess.run(
            ["sh", "-c", '"$@" & ', "sh", "sh", "-c", _MOVE, "sh", *cgroups, "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
            check=True,
        )


def pids(folder: Path) -> list[int]:
    """Processes of the cgroup and those below it."""
    found = []
    for directory, _, _ in os.walk(folder):
        with contextlib.suppress(OSError):
            found += [int(word) for word in Path(directory, "cgroup.procs").read_text().split()]
    return found


def alive(folder: Path) -> bool:
    """Whether a process is left in the cgroup or below it."""
    try:
        return "populated 1" in (folder / "cgroup.events").read_text()
    except OSError:
        return False


def stop(folder: Path, grace: float) -> None:
    """SIGTERM, and SIGKILL after `grace` seconds; at once when that is 0."""
    if grace:
        for pid in pids(folder):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
        end = time.monotonic() + grace
        while alive(folder) and time.monotonic() < end:
            time.sleep(0.02)
    cgroup.kill(folder)
