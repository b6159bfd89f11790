"""Leaving a node as it was before Lockgate.

To be done on the node, in its namespaces and with its folders, as the agent is; the agent must
have ended. Takes away, in this order: the CNI configuration and the plugin, programs and maps,
pods' links, routes, addresses and devices of ours, state and sockets. While pods have a link it
refuses: they would lose their network. What is not there is no error, so it can be repeated.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
from pathlib import Path

from lockgate.agent import install
from lockgate.agent.config import Config
from lockgate.bpf import links
from lockgate.net import dumps, pods
from lockgate.net.links import GATEWAY4
from lockgate.net.netlink import Batch

__all__ = ["Refused", "uninstall"]

_LO = 1
_DEVICES = ("lg-vxlan",)
#: What agent and observer write, by patterns; the rest of a folder is not ours.
_FILES = (
    "agent.sock",
    "cni.sock",
    "observer.sock",
    "journal.jsonl",
    "journal.jsonl.new",
    "firewall.jsonl",
    "firewall.jsonl.new",
    "ipam.json",
    "ipam.new",
    "ipam.json.damaged-*",
    "snapshot",
    "snapshot.new",
    "snapshot.behind",
    "apiserver",
    "apiserver.new",
)
#: Folders that are everybody's: a configuration that names one is wrong.
_SHARED = frozenset(
    Path(one)
    for one in (
        *("/", "/bin", "/boot", "/dev", "/etc", "/home", "/lib", "/opt", "/proc", "/root", "/run"),
        *("/sbin", "/srv", "/sys", "/tmp", "/usr", "/usr/local", "/var", "/var/lib", "/var/log"),
        *("/run/netns", "/sys/fs/bpf", "/var/cache", "/var/run", "/var/tmp"),
    )
)


class Refused(Exception):
    """Nothing was removed; the message says why, and what to do."""


def uninstall(config: Config, force: bool = False) -> tuple[list[str], list[str]]:
    """What was removed, and what stays in our folders since others put it there; one line each.
    Refused, or OSError when something resists: what came before it is gone then, and calling
    again goes on."""
    folders = {
        field: Path(path)
        for field, path in (("runDir", config.run_dir), ("stateDir", config.state_dir))
        if path
    }
    for field, folder in folders.items():
        if folder.resolve() in _SHARED or not folder.is_absolute():
            raise Refused(f"field {field}: {folder} is no folder of Lockgate's own")
    seals = pods.seals()
    live = [seal.uid for seal in seals.values() if seal is not None]
    if _answers(config.socket):
        raise Refused(
            f"the agent of node {config.node} still runs: delete the DaemonSet lockgate first "
            "(kubectl -n kube-system delete daemonset lockgate)"
        )
    if live and not force:
        shown = ", ".join(sorted(live)[:3]) + (", …" if len(live) > 3 else "")
        raise Refused(
            f"{len(live)} pods of node {config.node} have their network from Lockgate ({shown}): "
            "drain the node first (kubectl drain) while its agent runs, or say --force to cut "
            "them off"
        )
    removed = install.remove(config.cni_bin_dir, config.cni_conf_dir)
    removed += _programs(config.pins)
    if seals:
        pods.remove(sorted(seals))
        removed.append(f"{len(seals)} links of pods")
    removed += _node()
    kept = []
    for folder in dict.fromkeys(folders.values()):
        gone, left = _folder(folder)
        removed += gone
        kept += left
    return removed, kept


def _answers(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as wire:
        try:
            wire.connect(str(path))
        except OSError:
            return False
        return True


def _programs(pins: Path) -> list[str]:
    if not pins.exists():
        return []
    folder = pins / "links"
    names = links.links_in(str(folder))
    for name in names:
        links.remove(str(folder / name))
    shutil.rmtree(pins)
    for parent in (pins.parent, pins.parent.parent):
        with contextlib.suppress(OSError):  # another node's or cluster's pins are there
            parent.rmdir()
    return [f"{len(names)} programs, {pins}"]


def _node() -> list[str]:
    removed = []
    with Batch() as batch:
        routes = dumps.own_routes()
        for route in routes:
            batch.remove_route(route)
        for one in dumps.interfaces():
            if one.name in _DEVICES:
                batch.remove(one.name)
                removed.append(f"device {one.name}")
        # Only if it is marked as ours: others use this address, too.
        if f"{GATEWAY4}/32" in dumps.addresses(_LO, link_local=True, own=True):
            batch.remove_address(_LO, f"{GATEWAY4}/32")
            removed.append(f"{GATEWAY4} on lo")
        batch.send()
    return [*removed, *([f"{len(routes)} routes"] if routes else [])]


def _folder(path: Path) -> tuple[list[str], list[str]]:
    """Our files in it, and the folder if nothing else is there; it may be a mount, which stays."""
    ours = sorted({one for pattern in _FILES for one in path.glob(pattern) if not one.is_dir()})
    for one in ours:
        one.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()
        return [str(path)], []
    left = sorted(one.name for one in path.iterdir()) if path.exists() else []
    kept = [f"{path}: {', '.join(left)}"] if left else []
    return ([f"{len(ours)} files in {path}"] if ours else []), kept
