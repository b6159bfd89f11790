"""Which cluster a command is about.

1. `--cluster NAME` (or LOCKGATE_CLUSTER): the standalone cluster of that name.
2. `--kubeconfig FILE` or `--context NAME`: a real cluster. Without FILE: $KUBECONFIG, else
   ~/.kube/config.
3. Neither: the standalone cluster "default" if it runs; else the current context of
   $KUBECONFIG or ~/.kube/config. `kubectl lockgate` leaves out the first half.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from lockgate.kube import kubeconfig

__all__ = ["Choice", "Wrong", "choose", "config_files"]

DEFAULT = "default"


class Wrong(ValueError):
    """No cluster can be chosen; the message is one sentence."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Either a standalone cluster's name, or kubeconfig files and a context of theirs."""

    cluster: str = ""
    kubeconfig: tuple[str, ...] = ()
    context: str = ""


def config_files(given: str, environment: Mapping[str, str]) -> list[Path]:
    """The kubeconfig files that are looked at, in this order."""
    if given:
        return [Path(given)]
    listed = environment.get("KUBECONFIG", "")
    if listed:
        return [Path(part) for part in listed.split(os.pathsep) if part]
    return [Path(environment.get("HOME", "/root"), ".kube/config")]


def choose(
    cluster: str,
    file: str,
    context: str,
    environment: Mapping[str, str],
    runs: Callable[[str], bool],
    *,
    plugin: bool = False,
) -> Choice:
    """The cluster that is meant; "" stands for an option that was not given. `runs` tells
    whether a standalone cluster does; `plugin` that we were called as `kubectl lockgate`."""
    if file or context:
        if cluster and cluster != environment.get("LOCKGATE_CLUSTER"):
            raise Wrong("--cluster is a standalone cluster: it does not go with a kubeconfig")
        return _kubernetes(file, context, environment)
    if cluster:
        return Choice(cluster=cluster)
    if not plugin and runs(DEFAULT):
        return Choice(cluster=DEFAULT)
    if plugin or environment.get("KUBECONFIG") or _readable(config_files("", environment)[0]):
        return _kubernetes("", "", environment)
    if os.geteuid() != 0:
        raise Wrong(
            "there is no kubeconfig that can be read, and a standalone cluster needs root:"
            " give --kubeconfig FILE, or run it again with sudo"
        )
    raise Wrong(
        f"no cluster {DEFAULT!r} is running, and there is no kubeconfig:"
        " start one with `lockgate up DIR`, or give --kubeconfig FILE"
    )


def _readable(path: Path) -> bool:
    """Also False where the folder may not be looked into."""
    return os.access(path, os.R_OK)


def _kubernetes(file: str, context: str, environment: Mapping[str, str]) -> Choice:
    """Files that are not there are left out, as kubectl does."""
    files = config_files(file, environment)
    there = [path for path in files if _readable(path)]
    if not there:
        raise Wrong(f"there is no kubeconfig {' or '.join(map(str, files))} that can be read")
    try:
        merged = kubeconfig.load(there)
    except ValueError as error:
        raise Wrong(str(error)) from error
    name = context or merged.current_context
    if not name:
        raise Wrong(f"{merged.title}: no current context is named: give --context NAME")
    if name not in merged.tables["contexts"]:
        raise Wrong(f"{merged.title}: there is no context {name!r}")
    return Choice(kubeconfig=tuple(map(str, there)), context=name)
