"""Puts the built kernel objects and pod runtime into the wheel, as lockgate/_bin.

A wheel made so is for one machine architecture, and says so in its tag.
An editable install needs none of this: lockgate.paths finds build/ itself.
"""

import platform
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

BUILT = ("lockgate.bpf.o", "lockgate-xdp.bpf.o", "lockgate-pod", "lockgate-cni")


class LockgateBuildHook(BuildHookInterface):  # type: ignore[type-arg]
    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            return
        for name in BUILT:
            path = Path(self.root) / "build" / name
            if not path.exists():
                raise FileNotFoundError(f"build/{name} is missing: run `make build` first")
            build_data["force_include"][str(path)] = f"lockgate/_bin/{name}"
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-linux_{platform.machine()}"
