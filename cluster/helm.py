"""helm, which renders deploy/chart: that of PATH, else built once from its Go module.

    python -m cluster.helm template …       (what `make manifests` does)

It is a module of its own: with Kubernetes' own modules its dependencies would have to agree.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from cluster.binaries import go_environment, go_program
from cluster.commands import Failed
from cluster.state import cache

__all__ = ["helm", "main"]

_MODULE = "helm.sh/helm/v3/cmd/helm"
_VERSION = "v3.22.0"


def helm() -> Path:
    """Where it is. CalledProcessError, after what the go command said, if it can't be built."""
    found = shutil.which("helm")
    if found:
        return Path(found)
    target = cache() / "bin" / f"helm-{_VERSION}" / "helm"
    if not target.exists():
        print(f"  building helm {_VERSION}: about 2 minutes, once", file=sys.stderr)
        unfinished = target.parent.with_name(f"{target.parent.name}.{os.getpid()}")
        subprocess.run(
            [go_program(), "install", "-trimpath", "-ldflags=-s -w", f"{_MODULE}@{_VERSION}"],
            env={**go_environment(), "GOBIN": str(unfinished)},
            check=True,
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        (unfinished / "helm").replace(target)
        unfinished.rmdir()
    return target


def main() -> int:
    """Run helm with the command line's arguments."""
    try:
        program = helm()
    except (Failed, subprocess.CalledProcessError) as error:
        print(f"helm {_VERSION} could not be built: {error}", file=sys.stderr)
        return 1
    return subprocess.run([program, *sys.argv[1:]], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
