"""python -m lockgate.agent.uninstall --config FILE.json [--force]: leave a node as it was.

To be run on the node, in its namespaces and with its folders, as the agent is; the agent must
have ended. Takes away, in this order: the CNI configuration and the plugin, programs and maps,
pods' links, routes, addresses and devices of ours, state and sockets. While pods have a link it
refuses: they would lose their network. What is not there is no error, so it can be repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import shutil
import socket
import sys
from pathlib import Path

from lockgate.agent import install
from lockgate.agent.config import Config, read
from lockgate.bpf import links
from lockgate.net import dumps, pods
from lockgate.net.links import GATEWAY4
from lockgate.net.namespaces import enter
from lockgate.net.netlink import Batch

__all__ = ["Refused", "main", "uninstall"]

_LO = 1
_DEVICES = ("lg-vxlan",)


class Refused(Exception):
    """Nothing was removed; the message says why, and what to do."""


def uninstall(config: Config, force: bool = False) -> list[str]:
    """What was removed, one line each. Refused, or OSError when something resists: what came
    before it is gone then, and calling again goes on."""
    seals = pods.seals()
    live = [str(seal).partition(" ")[0] for seal in seals.values() if seal is not None]
    if _answers(config.socket):
        raise Refused(
            f"the agent of node {config.node} still runs: delete the DaemonSet lockgate first "
            "(kubectl -n kube-system delete daemonset lockgate)"
        )
    if live and not force:
        shown = ", ".join(sorted(live)[:3]) + (", …" if len(live) > 3 else "")
        raise Refused(
            f"{len(live)} pods of node {config.node} have their network from Lockgate ({shown}): "
            "drain the node first (kubectl drain), or say --force to cut them off"
        )
    removed = install.remove(config.cni_bin_dir, config.cni_conf_dir)
    removed += _programs(config.pins)
    if seals:
        pods.remove(sorted(seals))
        removed.append(f"{len(seals)} links of pods")
    removed += _node()
    for path in (config.run_dir, config.state_dir):
        if path and Path(path).exists():
            removed += _folder(Path(path))
    return removed


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
        if f"{GATEWAY4}/32" in dumps.addresses(_LO, link_local=True):
            batch.remove_address(_LO, f"{GATEWAY4}/32")
            removed.append(f"{GATEWAY4} on lo")
        batch.send()
    return [*removed, *([f"{len(routes)} routes"] if routes else [])]


def _folder(path: Path) -> list[str]:
    """All that is in it; the folder itself may be a mount."""
    content = list(path.iterdir())
    for one in content:
        if one.is_dir() and not one.is_symlink():
            shutil.rmtree(one)
        else:
            one.unlink()
    with contextlib.suppress(OSError):
        path.rmdir()
    return [str(path)] if content or not path.exists() else []


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 done, 1 failed, 3 refused."""
    parser = argparse.ArgumentParser(
        prog="lockgate.agent.uninstall", description="Leave this node as it was before Lockgate."
    )
    parser.add_argument("--config", type=Path, required=True, help="the agent's configuration")
    parser.add_argument("--force", action="store_true", help="even if running pods are cut off")
    options = parser.parse_args(arguments)
    try:
        config = read(options.config)
        if config.netns_path is not None:
            enter(config.netns_path)
        for line in uninstall(config, options.force):
            print(f"removed {line}")
    except Refused as error:
        print(error, file=sys.stderr)
        return 3
    except (OSError, ValueError) as error:
        print(f"uninstall: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
