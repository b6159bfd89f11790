"""python -m cluster: starts, shows and removes real clusters (see the package's docstring)."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import click
from rich.console import Console

from cluster import cni, conformance, images, shop
from cluster.binaries import Binaries
from cluster.cluster import Cluster
from cluster.commands import Failed
from cluster.down import remove
from cluster.install import install
from cluster.state import State, clusters, valid_name
from lockgate.cli.common import reach
from lockgate.cli.screen import show

_console = Console(stderr=True, highlight=False)


def _check_name(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not valid_name(value):
        raise click.BadParameter("expected 1 to 20 lower case letters, digits and '-'")
    return value


_name = click.option("--name", default="default", show_default=True, callback=_check_name)
_rest = click.argument("words", nargs=-1, type=click.UNPROCESSED)
_pass_on = {"ignore_unknown_options": True}


@click.group(help=__doc__)
def main() -> None:
    if os.geteuid() != 0:
        raise Failed("this needs root (namespaces, eBPF): run it with sudo")


@main.command()
@_name
@click.option("--nodes", default=2, show_default=True)
@click.option("--zones", default=0, help="That the nodes are of, one each in turn.")
@click.option("--cni", "network", type=click.Choice(cni.CHOICES), default="none", show_default=True)
@click.option("--install", "with_lockgate", is_flag=True, help="Install Lockgate on it.")
def up(name: str, nodes: int, zones: int, network: str, with_lockgate: bool) -> None:
    """Start a cluster."""
    begin = time.monotonic()
    cluster = Cluster.up(
        name,
        nodes=nodes,
        zones=zones,
        cni=network,
        progress=lambda text: _console.print(f"  {text}"),
    )
    if with_lockgate:
        _console.print("  installing Lockgate")
        install(cluster)
    _console.print(f"  up after {time.monotonic() - begin:.0f} s")
    print(f"export KUBECONFIG={cluster.kubeconfig}")


@main.command("run")
@_name
@click.option("--nodes", default=2, show_default=True)
@click.option("--once", is_flag=True, help="Check everything, clean up, leave with 0 or 1.")
@click.argument(
    "folder", type=click.Path(exists=True, path_type=Path), default=str(shop.FOLDER), metavar="DIR"
)
def run_example(name: str, nodes: int, once: bool, folder: Path) -> None:
    """Start a cluster with Lockgate and the manifests in DIR, show it, end it with Ctrl-C."""

    def progress(text: str) -> None:
        _console.print(f"  {text} [dim]({time.monotonic() - begin:.0f} s)[/dim]")

    begin = time.monotonic()
    good = False
    with Cluster.up(name, nodes=nodes, progress=progress) as cluster:
        try:
            progress("installing Lockgate")
            install(cluster)
            progress(f"applying {folder}")
            shop.apply(cluster, folder)
            shop.wait(cluster)
            progress("every pod is ready")
            print(f"export KUBECONFIG={cluster.kubeconfig}")
            # A standalone cluster that runs as well would come first.
            option = f" --kubeconfig {cluster.kubeconfig}"
            with closing(reach(kubeconfig=str(cluster.kubeconfig))) as access:
                good = show(access, option)
            if not once:
                print("\nThe cluster runs until Ctrl-C.")
                signal.pause()
        except KeyboardInterrupt:
            _console.print("  taking the cluster down")
    _console.print("  everything that the cluster made is removed")
    sys.exit(not good)


@main.command("conformance")
@click.option("--name", default="conformance", show_default=True, callback=_check_name)
@click.option("--focus", default="", metavar="REGEX", help="Only specs whose name matches.")
@click.option("--parallel", default=2, show_default=True, type=click.IntRange(1, 16))
@click.option(
    "--results",
    type=click.Path(file_okay=False, path_type=Path),
    default=str(conformance.RESULTS),
    help="Where junit.xml and logs go.",
)
def run_conformance(name: str, focus: str, parallel: int, results: Path) -> None:
    """Run Kubernetes' own tests of networking. Exit code 1 unless all that are to run pass.

    On the cluster of that name, if it is up with Lockgate; else on one for this run alone.
    """
    good = conformance.run(name, focus, parallel, results, _console)
    sys.exit(not good)


@main.command()
def build() -> None:
    """Build Kubernetes and the images into the cache, unless they are there."""
    binaries = Binaries.get(_console)
    images.build_all(binaries)
    print(binaries.folder)


@main.command()
@_name
def down(name: str) -> None:
    """Remove a cluster with every trace, also after a crash."""
    for line in remove(State(name)) or [f"no cluster {name!r}: nothing to remove"]:
        _console.print(f"  {line}")


@main.command()
@_name
def status(name: str) -> None:
    """What runs. Exit code 1 unless everything does."""
    if name not in clusters():
        others = ", ".join(clusters()) or "none"
        raise Failed(f"no cluster {name!r} (there are: {others})")
    cluster = Cluster(name)
    running = cluster.running()
    for machine, programs in running.items():
        print(f"{machine}: {', '.join(programs) or 'nothing runs'}")
    print(cluster.kubectl("get", "nodes", "-o", "wide"), end="")
    wanted = [len(cluster.control.programs)] + [len(cluster.node_programs)] * len(cluster.nodes)
    sys.exit([len(programs) for programs in running.values()] != wanted)


@main.command(context_settings=_pass_on)
@_name
@_rest
def kubectl(name: str, words: tuple[str, ...]) -> None:
    """Run kubectl as the administrator."""
    sys.exit(subprocess.run(Cluster(name).kubectl_command(*words), check=False).returncode)


@main.command(context_settings=_pass_on)
@_name
@click.argument("machine")
@_rest
def node(name: str, machine: str, words: tuple[str, ...]) -> None:
    """Run a command (a shell if none is given) on a node."""
    command = Cluster(name).node_command(machine, *(words or ("bash",)))
    sys.exit(subprocess.run(command, check=False).returncode)


if __name__ == "__main__":
    try:
        main(prog_name="python -m cluster")
    except Failed as error:
        sys.exit(f"cluster: {error}")
