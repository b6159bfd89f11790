"""Agents and observers as child processes: started in a node, restarted when they die."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec

from lockgate.agent.cards import AUTO
from lockgate.agent.limits import Limits
from lockgate.agent.sizes import SHARE
from lockgate.standalone.state import State, bpffs

__all__ = ["Child", "ChildStatus", "Settings", "write_config"]

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 5.0
#: A process that lived so long starts the back-off anew.
_HEALTHY = 10.0


class Settings(msgspec.Struct, frozen=True):
    """What every agent of a cluster is told, as in lockgate/agent/config.py."""

    routing: str = "auto"
    forwarding: str = "dsr"
    xdp: str = "auto"
    flows: bool = True
    capture: int = 0
    limits: Limits = Limits()


class ChildStatus(msgspec.Struct, rename="camel"):
    pid: int | None
    up: bool
    restarts: int
    error: str = ""


def write_config(state: State, node: str, role: str, settings: Settings, nodes: int) -> Path:
    """The settings of a node's agent or observer (lockgate/agent/config.py, observer/config.py).
    `nodes` share this machine's memory."""
    folder = state.node(node)
    folder.mkdir(parents=True, exist_ok=True)
    config: dict[str, object] = {"cluster": state.cluster, "node": node}
    if role == "agent":
        config |= {
            "stateDir": str(folder),
            "control": str(state.control),
            "netns": str(state.netns_path(node)),
            "cgroup": str(state.cgroup(node)),
            "underlay": "underlay0",
            "outside": AUTO,
            "routing": settings.routing,
            "forwarding": settings.forwarding,
            "xdp": settings.xdp,
            "flows": {"remember": settings.flows},
            "capture": settings.capture,
            "limits": settings.limits,
            "memoryShare": SHARE / nodes,
            "serviceCidrs": ["10.96.0.0/16", "fd00:10:96::/112"],
            "bpffs": str(bpffs()),
        }
    else:
        config |= {
            "bpffs": str(bpffs()),
            "journal": str(folder / "journal.jsonl"),
            "socket": str(state.observer(node)),
            "control": str(state.control),
        }
    path = folder / f"{role}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(config)) + b"\n")
    return path


class Child:
    """`python -m MODULE --config FILE` in a node's network namespace and a cgroup of its own."""

    def __init__(self, state: State, node: str, role: str, config: Path) -> None:
        self.node = node
        self.role = role
        self._cgroup = state.cgroup(node) / role
        self._log = state.node(node) / f"{role}.log"
        self._netns = state.netns_path(node)
        self._argv = [sys.executable, "-m", f"lockgate.{role}", "--config", str(config)]
        self._process: asyncio.subprocess.Process | None = None
        self._restarts = 0
        self._error = ""
        self._task: asyncio.Task[None] | None = None

    @property
    def status(self) -> ChildStatus:
        process = self._process
        up = process is not None and process.returncode is None
        return ChildStatus(
            pid=process.pid if process and up else None,
            up=up,
            restarts=self._restarts,
            error="" if up else self._error,
        )

    @property
    def last_error(self) -> str:
        """Why it ended, until it `answered` again."""
        return self._error

    def answered(self) -> None:
        """It does its work."""
        self._error = ""

    def start(self, died: Callable[[Child], None]) -> None:
        """Runs it until `stop`; `died` is told of each unexpected end."""
        self._task = asyncio.create_task(self._keep(died))

    async def stop(self) -> None:
        if self._task:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        process = self._process
        if process and process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
            try:
                async with asyncio.timeout(2):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    async def _keep(self, died: Callable[[Child], None]) -> None:
        self._cgroup.mkdir(parents=True, exist_ok=True)
        pause = _FIRST_PAUSE
        while True:
            began = time.monotonic()
            # The shell joins the cgroup before anything else runs, and becomes the process.
            script = 'echo 0 > "$0"/cgroup.procs && exec nsenter --net="$1" -- "${@:2}"'
            with self._log.open("ab") as log:
                self._process = await asyncio.create_subprocess_exec(
                    *("bash", "-c", script, str(self._cgroup), str(self._netns), *self._argv),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, "PYTHONPATH": _import_path()},
                )
            code = await self._process.wait()
            self._restarts += 1
            self._error = f"killed by signal {-code}" if code < 0 else self._last_line()
            died(self)
            if time.monotonic() - began > _HEALTHY:
                pause = _FIRST_PAUSE
            await asyncio.sleep(pause)
            pause = min(pause * 2, _LONGEST_PAUSE)

    def _last_line(self) -> str:
        try:
            with self._log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - 2000))
                lines = log.read().decode(errors="replace").strip().splitlines()
        except OSError:
            return ""
        return lines[-1] if lines else "it wrote no log"


def _import_path() -> str:
    """Where this package was imported from, for children that run in other folders."""
    here = str(Path(__file__).resolve().parents[2])
    before = os.environ.get("PYTHONPATH", "")
    return f"{here}:{before}" if before and here not in before.split(":") else here
