"""Removes every trace of a cluster, whatever is left of it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import time
from pathlib import Path

import msgspec

from lockgate.bpf.features import cgroup2_mount, mount_point
from lockgate.bpf.pins import node_folder
from lockgate.net import cgroup
from lockgate.standalone import underlay
from lockgate.standalone.state import RUN, State, bpffs

__all__ = ["remove", "remove_node", "supervisor_pid"]


def supervisor_pid(state: State) -> int | None:
    """The cluster's living supervisor. A pid that another program has by now is not it."""
    try:
        pid = int(msgspec.json.decode(state.settings.read_bytes())["pid"])
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except (OSError, ValueError, KeyError, msgspec.DecodeError):
        return None
    return pid if b"lockgate.standalone." in command else None


def remove(state: State) -> list[str]:
    """What was removed, one line each; nothing when there was nothing. Raises OSError when
    something resists."""
    removed: list[str] = []
    pid = supervisor_pid(state)
    if pid is not None and pid != os.getpid():
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        removed.append(f"supervisor (process {pid})")
    if cgroup2_mount():
        tree = state.cgroup_root()
        if tree.exists():
            processes = _processes(tree)
            cgroup.remove(tree)
            _remove_empty(tree.parent)
            removed.append(f"{tree} ({processes} processes)")
    if mount_point("bpf"):
        pins = state.pins()
        if pins.exists():
            count = sum(len(files) for _, _, files in os.walk(pins))
            shutil.rmtree(pins)
            _remove_empty(pins.parent)
            removed.append(f"{pins} ({count} pinned maps, programs and links)")
    removed += [f"network namespace {name}" for name in underlay.teardown(state)]
    if state.root.exists():
        _remove_folder(state.root)
        _remove_empty(RUN)
        removed.append(str(state.root))
    return removed


def remove_node(state: State, node: str, number: int) -> None:
    """Everything of one node, whose agent has ended. Raises UnderlayError, OSError."""
    cgroup.remove(state.cgroup(node))
    pins = node_folder(bpffs(), state.cluster, node)
    if pins.exists():
        shutil.rmtree(pins)
    underlay.remove(state, node, number)
    _remove_folder(state.node(node))


def _processes(tree: Path) -> int:
    count = 0
    for folder, _, _ in os.walk(tree):
        with contextlib.suppress(OSError):
            count += len(Path(folder, "cgroup.procs").read_text().split())
    return count


def _remove_folder(folder: Path) -> None:
    # A process that is just ending may still write its log.
    for _ in range(20):
        try:
            shutil.rmtree(folder)
            return
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.05)
    shutil.rmtree(folder)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
