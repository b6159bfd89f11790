"""Putting the CNI plugin and its configuration on the node, and taking them away again.

The runtime takes the lexically first configuration in its folder. Ours is written last, when
the agent could serve an ADD, and goes first: a node that is half installed, or half
uninstalled, has none of ours, and what runs goes on running. Files appear by rename, so nobody
sees half of one. Other configurations are left alone; those that would win are named.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any

from lockgate.agent.cni_messages import VERSIONS

__all__ = ["CONFLIST", "PLUGIN", "configuration", "install", "remove", "rivals"]

PLUGIN = "lockgate-cni"
CONFLIST = "05-lockgate.conflist"
_SUFFIXES = (".conf", ".conflist", ".json")


def configuration(chain: list[dict[str, Any]]) -> dict[str, Any]:
    """The network configuration list; plugins of `chain` run after ours. Runtimes that do not
    know `cniVersions` (CNI 1.1) take 1.0.0."""
    return {
        "cniVersion": "1.0.0",
        "cniVersions": list(VERSIONS),
        "name": "lockgate",
        "plugins": [{"type": PLUGIN}, *chain],
    }


def install(plugin: Path, bin_dir: Path | None, conf_dir: Path | None, chain: list[Any]) -> None:
    """The plugin, then the configuration; a folder of None gets nothing. What is there already
    as it should be is not touched. OSError names the file."""
    if bin_dir is not None:
        _put(bin_dir / PLUGIN, plugin.read_bytes(), 0o755)
    if conf_dir is not None:
        text = json.dumps(configuration(chain), indent=2) + "\n"
        _put(conf_dir / CONFLIST, text.encode(), 0o644)


def remove(bin_dir: Path | None, conf_dir: Path | None) -> list[str]:
    """The configuration, then the plugin; returns what was there."""
    paths = []
    if conf_dir is not None:
        paths.append(conf_dir / CONFLIST)
    if bin_dir is not None:
        paths.append(bin_dir / PLUGIN)
    found = []
    for path in paths:
        for one in (path, _draft(path)):
            with contextlib.suppress(FileNotFoundError):
                one.unlink()
                found.append(str(one))
    return found


def rivals(conf_dir: Path) -> list[str]:
    """Configurations that the runtime takes before ours."""
    try:
        names = sorted(os.listdir(conf_dir))
    except FileNotFoundError:
        return []
    return [name for name in names if name.endswith(_SUFFIXES) and name < CONFLIST]


def _put(path: Path, data: bytes, mode: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == data and path.stat().st_mode & 0o777 == mode:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = _draft(path)
    with open(draft, "wb") as file:
        file.write(data)
        os.fchmod(file.fileno(), mode)
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, path)


def _draft(path: Path) -> Path:
    # A name that no runtime takes for a configuration or a plugin.
    return path.with_name(f".{path.name}.new")
