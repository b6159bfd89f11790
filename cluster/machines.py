"""Nodes as machines: namespaces, cgroups, files; no Kubernetes yet (kubelets.py)."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from cluster import processes
from cluster.commands import Failed, Word, until
from cluster.state import State
from lockgate.bpf.features import cgroup2_mount
from lockgate.net import cgroup

__all__ = ["Machine", "cgroup_v1_hierarchies"]

_SCRIPT = Path(__file__).parent / "node.sh"
_V2_CONTROLLERS = ("cpuset", "cpu", "io", "memory", "hugetlb", "pids")


class Machine:
    """A node's namespaces, made by node.sh and held by the node's first process."""

    def __init__(self, state: State, name: str) -> None:
        self.state = state
        self.name = name
        self.folder = state.node(name)
        self.etc = self.folder / "etc"
        self.data = state.data / name

    def boot(self, pause: Path) -> None:
        """Start the first process and wait until it holds everything. Raises Failed."""
        self._write_etc()
        for folder in (self.folder, self.data):
            folder.mkdir(parents=True, exist_ok=True)
        roots = self._cgroup_roots()
        for root in roots:
            cgroup.create(root)
            _inherit_cpuset(root)
        # Namespaced cgroups have the process's own as their root: be in the root for that moment.
        command = (
            *("nsenter", f"--net={self.state.netns_path(self.name)}"),
            *("unshare", "--mount", "--pid", "--uts", "--cgroup", "--fork", "--kill-child"),
            *("sh", _SCRIPT, self.name, self.folder, self.data, pause),
        )
        processes.launch(command, roots, self.state.log_of(self.name, "machine"))
        try:
            until(f"{self.name}'s first process", self.pid, 30)
        except Failed as error:
            log = self.state.log_of(self.name, "machine").read_text()
            raise Failed(f"{error}\n{log.strip()}") from None
        self._leave_root(roots[-1])

    def remove(self) -> None:
        """End all that runs on it, and remove its files."""
        remove_cgroups(self.state, self.name)
        for folder in (self.folder, self.data):
            shutil.rmtree(folder)

    def pid(self) -> int | None:
        """The node's first process, as this machine numbers it; None unless it is up."""
        for pid in processes.pids(self.state.cgroup(self.name)):
            with contextlib.suppress(OSError):
                status = dict(
                    line.split(":\t", 1)
                    for line in Path(f"/proc/{pid}/status").read_text().splitlines()
                    if ":\t" in line
                )
                if status["NSpid"].split()[1:] == ["1"] and status["Name"] == "pause":
                    return pid
        return None

    def command(self, *command: Word) -> list[Word]:
        """The command line that runs a command in the node's namespaces."""
        if (pid := self.pid()) is None:
            raise Failed(f"{self.name} is not up")
        return [
            *("nsenter", "-t", str(pid), "--mount", "--pid", "--uts", "--net", "--cgroup"),
            *("--wd=/", "--", *command),
        ]

    def path(self, path: str) -> Path:
        """A file of the node, as this machine reaches it."""
        if (pid := self.pid()) is None:
            raise Failed(f"{self.name} is not up")
        return Path(f"/proc/{pid}/root{path}")

    def start(self, program: str, *command: Word) -> None:
        """Start a program that stays up, in a cgroup of its own below the node's."""
        below = Path("programs", program)
        cgroups = [root / below for root in self._cgroup_roots()]
        for folder in cgroups:
            cgroup.create(folder)
            for made in (folder.parent, folder):
                _inherit_cpuset(made)
        processes.launch(self.command(*command), cgroups, self.state.log_of(self.name, program))

    def _cgroup_roots(self) -> list[Path]:
        """The node's cgroup in every hierarchy, v2's last."""
        below = Path("lockgate-cluster", self.state.cluster, self.name)
        return [root / below for root in cgroup_v1_hierarchies()] + [self.state.cgroup(self.name)]

    def _leave_root(self, root: Path) -> None:
        # A v2 cgroup with processes of its own hands no controllers to those below it.
        init = cgroup.create(root / "programs" / "init")
        for pid in (root / "cgroup.procs").read_text().split():
            with contextlib.suppress(ProcessLookupError):
                (init / "cgroup.procs").write_text(pid)
        for folder in _downwards(root):
            available = (folder / "cgroup.controllers").read_text().split()
            for controller in available:
                if controller in _V2_CONTROLLERS:
                    with contextlib.suppress(OSError):
                        (folder / "cgroup.subtree_control").write_text(f"+{controller}")

    def _write_etc(self) -> None:
        self.etc.mkdir(parents=True, exist_ok=True)
        (self.etc / "hostname").write_text(f"{self.name}\n")
        (self.etc / "hosts").write_text(
            f"127.0.0.1 localhost\n::1 localhost\n127.0.1.1 {self.name}\n"
        )
        resolver = self.etc / "resolv.conf"
        resolver.unlink(missing_ok=True)
        resolver.write_text("# The cluster's outside has no name server.\n")


def cgroup_v1_hierarchies() -> list[Path]:
    """Mount points of version 1 hierarchies; none on a machine with version 2 alone."""
    return [Path(where) for where in _mounts("cgroup")]


def _mounts(kind: str) -> Iterator[str]:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, found, *_ = line.split()
        if found == kind:
            yield where


def _downwards(root: Path) -> list[Path]:
    """v2 cgroups from the mount to `root`, both included."""
    top = Path(cgroup2_mount() or "/sys/fs/cgroup")
    return [top, *reversed([folder for folder in (root, *root.parents) if top in folder.parents])]


def _inherit_cpuset(folder: Path) -> None:
    """A new v1 cpuset allows nothing, and admits no process, until it is told."""
    for name in ("cpuset.cpus", "cpuset.mems"):
        chain = [folder]
        while chain[0].parent.joinpath(name).exists():
            chain.insert(0, chain[0].parent)
        if not chain[0].joinpath("cpuset.cpu_exclusive").exists():
            return  # version 2
        for above, below in itertools.pairwise(chain):
            if not below.joinpath(name).read_text().strip():
                below.joinpath(name).write_text(above.joinpath(name).read_text())


def remove_cgroups(state: State, machine: str = "") -> int:
    """End every process of the cluster, or of one machine, and remove its cgroups in all
    hierarchies; the number of processes that there were."""
    ended = 0
    if cgroup2_mount():
        below = state.cgroup_root() / machine
        ended = len(processes.pids(below))
        cgroup.remove(below)
    for root in cgroup_v1_hierarchies():
        tree = root / "lockgate-cluster" / state.cluster / machine
        for directory, _, _ in os.walk(tree, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(directory)
    for root in (*cgroup_v1_hierarchies(), state.cgroup_root().parent.parent):
        with contextlib.suppress(OSError):
            (root / "lockgate-cluster").rmdir()
    return ended
