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
    """Either a standalone cluster's name, or a kubeconfig file and a context of it."""

    cluster: str = ""
    kubeconfig: str = ""
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
    """Of several files, the first that has the context (its cluster and user with it)."""
    files = config_files(file, environment)
    there = [path for path in files if _readable(path)]
    if not there:
        raise Wrong(f"there is no kubeconfig {' or '.join(map(str, files))} that can be read")
    try:
        current = (kubeconfig.current_context(path) for path in there)
        name = context or next(filter(None, current), "")
        if not name:
            raise Wrong(f"{there[0]} names no current context: give --context NAME")
        for path in there:
            if name in kubeconfig.contexts(path):
                return Choice(kubeconfig=str(path), context=name)
    except ValueError as error:
        raise Wrong(str(error)) from error
    raise Wrong(f"{' and '.join(map(str, there))}: there is no context {name!r}")
