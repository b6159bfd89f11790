"""What the tier stands on: Lockgate's image, Kubernetes and helm from their sources. That takes ten
minutes the first time, so it is done beside the other tests, which mostly wait, and with the least
priority."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

from tests.system.harness import ROOT

__all__ = ["Preparation"]

_LOG = ROOT / "build/cluster-tests.log"
_STEPS = ("scripts.image", "cluster build", "cluster.helm version --short")
_SAYS = ("cluster: ", "image: ", "helm ")
_DEADLINE = 3600.0


class Preparation:
    """`begin` starts it, `missing` waits for its end."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def begin(self) -> None:
        """Start what follows in the background; what is in the caches takes a second."""
        steps = " && ".join(f'"$0" -m {step}' for step in _STEPS)
        _LOG.parent.mkdir(exist_ok=True)
        with _LOG.open("wb") as log:
            self._process = subprocess.Popen(
                ["nice", "-n", "19", "sh", "-c", steps, sys.executable],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def missing(self) -> str:
        """Wait for the end: what could not be made and why, or ""."""
        assert self._process is not None
        try:
            if not self._process.wait(_DEADLINE):
                return ""
        except subprocess.TimeoutExpired:
            return f"Kubernetes was not built within {_DEADLINE / 60:.0f} minutes ({_shown()})"
        last = _LOG.read_text().strip().splitlines()[-15:]
        # The sentence begins with who says it; what a command said may follow.
        begin = max((n for n, line in enumerate(last) if line.startswith(_SAYS)), default=0)
        return "\n".join(last[begin:]) or f"{_shown()} says nothing"

    def end(self) -> None:
        """Stop what still runs."""
        if self._process is not None and self.running:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGTERM)
            self._process.wait()


def _shown() -> Path:
    return _LOG.relative_to(ROOT)
