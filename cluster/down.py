"""Removes every trace of a cluster, whatever is left of it."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

from cluster import network
from cluster.machines import remove_cgroups
from cluster.state import State

__all__ = ["remove"]


def remove(state: State) -> list[str]:
    """What was removed, one line each; nothing when there was nothing. Raises OSError or Failed
    when something resists."""
    removed = []
    if ended := remove_cgroups(state):
        removed.append(f"{ended} processes and their cgroups")
    removed += [f"network namespace {name}" for name in network.remove(state)]
    for folder in (state.root, state.data):
        if folder.exists():
            _remove_folder(folder)
            removed.append(str(folder))
        with contextlib.suppress(OSError):
            folder.parent.rmdir()
    return removed


def _remove_folder(folder: Path) -> None:
    # Mounts were in the nodes' namespaces and went with them; one that is still there must not be
    # followed.
    device = folder.stat().st_dev
    for directory, folders, _ in os.walk(folder):
        for name in list(folders):
            path = Path(directory, name)
            if not path.is_symlink() and path.stat().st_dev != device:
                raise OSError(f"{path} is a mount: a node's process still holds it?")
    shutil.rmtree(folder)
