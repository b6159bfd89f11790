"""Trees of cgroup v2 directories."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path

from lockgate.bpf.features import cgroup2_mount

__all__ = ["create", "find", "kill", "remove"]


def find() -> Path:
    """Where cgroup v2 is mounted, alone or beside v1. FileNotFoundError if nowhere."""
    mount = cgroup2_mount()
    if mount is None:
        raise FileNotFoundError("cgroup v2 is not mounted: mount -t cgroup2 none /sys/fs/cgroup")
    return Path(mount)


def create(path: Path) -> Path:
    """Make the directory and those above it; what exists is left alone."""
    path.mkdir(parents=True, exist_ok=True)
    return path


def kill(path: Path, deadline: float = 5.0) -> bool:
    """SIGKILL every process of the tree; True when none is left within `deadline` seconds."""
    try:
        (path / "cgroup.kill").write_text("1")
    except FileNotFoundError:
        return True
    until = time.monotonic() + deadline
    while time.monotonic() < until:
        try:
            if "populated 0" in (path / "cgroup.events").read_text():
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.005)
    return False


def remove(path: Path) -> None:
    """Kill what runs in the tree and remove it, deepest first. Nothing there is success."""
    if not path.exists():
        return
    kill(path)
    for directory, _folders, _files in os.walk(path, topdown=False):
        with contextlib.suppress(FileNotFoundError):
            os.rmdir(directory)
