"""lockgate up: starts a cluster's supervisor, shows how it gets ready, and ends it with Ctrl-C."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click
import msgspec

from lockgate.agent.limits import CAPTURE_MAX, Limits
from lockgate.cli.common import (
    NO_FEATURE,
    Refused,
    call,
    cluster_option,
    fail,
    json_option,
    need_root,
    not_ready,
    print_json,
    reach,
)
from lockgate.standalone.children import Settings
from lockgate.standalone.state import State

__all__ = ["up"]

#: Of others, which nodes and their agents are started with, and the packages that have them.
_PROGRAMS = {"ip": "iproute2", "bash": "bash", "nsenter": "util-linux"}

#: Exit code after Ctrl-C, as shells have it.
INTERRUPTED = 130


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(exists=True, path_type=Path))
@click.option("--nodes", default=2, show_default=True, type=click.IntRange(1, 64))
@click.option(
    "--routing",
    default="auto",
    show_default=True,
    type=click.Choice(["auto", "direct", "vxlan"]),
    help="How packets reach other nodes: over the link, or in a tunnel.",
)
@click.option(
    "--forwarding",
    default="dsr",
    show_default=True,
    type=click.Choice(["dsr", "snat"]),
    help="How clients outside reach a service's backends on other nodes.",
)
@click.option(
    "--capture",
    default=0,
    show_default=True,
    type=click.IntRange(0, CAPTURE_MAX),
    metavar="BYTES",
    help="First bytes of its packet that a flow record keeps, 128 at most.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=N",
    callback=lambda _context, _option, given: _limits(given),
    help="What a pod may use up in a second, 0 for no limit: answers, connections, events,"
    " fragments.",
)
@click.option("--detach", is_flag=True, help="Return when the pods are ready; the cluster stays.")
@click.option("--once", is_flag=True, help="Check everything, clean up, leave with 0 or 1.")
@click.option(
    "--timeout", default=60.0, show_default=True, help="Seconds until the pods are ready."
)
@cluster_option
@json_option
def up(
    folder: Path,
    nodes: int,
    routing: str,
    forwarding: str,
    capture: int,
    limits: Limits,
    detach: bool,
    once: bool,
    timeout: float,
    cluster: str,
    as_json: bool,
) -> None:
    """Run a cluster from the manifests in DIR, a folder or one file.

    Nodes are network namespaces of this machine, pods are processes. The folder
    is watched: what you save is applied at once. Without --detach the cluster
    ends with Ctrl-C, and everything it made is removed.
    """
    need_root()
    from lockgate.cli.screen import everything, show

    _need_features()
    state = State(cluster)
    _check_manifests(folder, state)
    _clear(state, quiet=as_json)
    settings = Settings(routing, forwarding, capture, limits)
    supervisor = _start(state, folder, nodes, settings, detach)
    code = 0
    try:
        status = _until_ready(state, supervisor, timeout, quiet=as_json)
        late = [*status["reasons"], *(f"pod is not ready: {text}" for text in not_ready(status))]
        if not as_json:
            _greet(status, cluster, late)
        code = 1 if late else 0
        if detach:
            if as_json:
                print_json(status)
            sys.exit(code)
        if as_json:
            with closing(reach(cluster)) as access:
                rest, good = everything(access)
            print_json({"status": status, **rest})
        else:
            with closing(reach(cluster)) as access:
                good = show(access, "" if cluster == "default" else f" --cluster {cluster}")
        code = code if good else 1
        if not once:
            if not as_json:
                click.echo("\nThe cluster runs until Ctrl-C.")
            supervisor.wait()
            click.echo("The cluster was taken down.", err=True)
    except KeyboardInterrupt:
        code = INTERRUPTED if once else code  # the check was not made
    finally:
        if not detach:
            _stop(state, supervisor, quiet=as_json)
    sys.exit(code)


def _need_features() -> None:
    from lockgate.agent.needs import require
    from lockgate.bpf.features import MissingFeature
    from lockgate.paths import bpf_object, pod_binary

    try:
        require()
    except MissingFeature as error:
        fail(str(error), NO_FEATURE)
    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            fail(f"This machine has no program {program}: install {package}.", NO_FEATURE)
    try:
        bpf_object()
        pod_binary()
    except FileNotFoundError as error:
        fail(str(error))


def _check_manifests(folder: Path, cluster: State) -> None:
    """Tells what is wrong with the manifests before anything is made."""
    from lockgate.kube.folder import Folder
    from lockgate.objects.model import Node

    with Folder(folder) as source:
        state = source.refresh(first=True)
    if state.errors:
        for error in state.errors:
            click.echo(f"lockgate: {error}", err=True)
        sys.exit(2)
    if not state.objects:
        fail(f"{folder} has no objects in its manifests")
    for item in state.objects:
        if isinstance(item, Node) and (problem := cluster.node_problem(item.metadata.name)):
            fail(f"Node {item.metadata.name}, field metadata.name: {problem}")


def _clear(state: State, quiet: bool) -> None:
    from lockgate.standalone import teardown

    if teardown.supervisor_pid(state) is not None:
        fail(
            f"the cluster {state.cluster!r} is running already: end it with `lockgate down`,"
            " or give this one another --cluster"
        )
    removed = teardown.remove(state)
    if removed and not quiet:
        click.echo(f"Removed what an earlier run had left ({len(removed)} things).", err=True)


def _limits(given: tuple[str, ...]) -> Limits:
    """`NAME=N`s. BadParameter names the one that is none."""
    found: dict[str, int] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if not equals or not number.isdecimal():
            raise click.BadParameter(f"expected NAME=N, got {text!r}")
        found[name] = int(number)
    try:
        return msgspec.convert(found, Limits)
    except msgspec.ValidationError as error:
        raise click.BadParameter(str(error)) from None


def _start(
    state: State, folder: Path, nodes: int, settings: Settings, detach: bool
) -> subprocess.Popen[bytes]:
    state.root.mkdir(parents=True, exist_ok=True)
    argv = [sys.executable, "-m", "lockgate.standalone.main", "--cluster", state.cluster]
    argv += ["--nodes", str(nodes), "--settings", msgspec.json.encode(settings).decode()]
    argv += [*(["--detached"] if detach else []), str(folder.absolute())]
    package = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join(filter(None, (package, os.environ.get("PYTHONPATH", ""))))
    with state.log.open("ab") as log:
        return subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL if detach else subprocess.PIPE,
            stdout=log,
            stderr=log,
            start_new_session=True,
            cwd="/",
            env={**os.environ, "PYTHONPATH": path},
        )


def _until_ready(
    state: State, supervisor: subprocess.Popen[bytes], timeout: float, quiet: bool
) -> dict[str, Any]:
    """Follows the start; the last status when everything is ready or the time is over."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    end = time.monotonic() + timeout
    log = state.log.open("rb")
    with (
        log,
        Progress(
            TextColumn("{task.description:<8}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=Console(stderr=True),
            disable=quiet,
        ) as progress,
    ):
        nodes = progress.add_task("nodes", total=None, note="")
        pods = progress.add_task("pods", total=None, note="")
        while True:
            code = supervisor.poll()
            if code is not None:
                log.seek(0)
                lines = log.read().decode(errors="replace").strip().splitlines()
                fail(f"the cluster did not start: {lines[-1] if lines else f'exit code {code}'}", 1)
            try:
                status = call(state.control, "GET", "/v1/status", timeout=5)
            except (OSError, Refused):
                time.sleep(0.02)
                continue
            wanted = status["revision"]
            current = [n for n in status["nodes"] if wanted and n["applied"]]
            progress.update(nodes, total=len(status["nodes"]), completed=len(current))
            count = status["pods"]
            note = status["notReady"][0][:30] if status["notReady"] else ""
            progress.update(pods, total=count["total"], completed=count["ready"], note=note)
            assert isinstance(status, dict)
            if wanted and not status["notReady"] and not status["reasons"]:
                blind = _blind(state, status)
                if not blind or time.monotonic() > end:
                    return {**status, "reasons": blind}
                progress.update(nodes, note=blind[0])
            elif time.monotonic() > end:
                return status
            time.sleep(0.05)


def _blind(state: State, status: dict[str, Any]) -> list[str]:
    """The nodes whose flows nobody reads yet, as sentences: what is denied there is not told."""
    found = []
    for node in status["nodes"]:
        try:
            told = call(state.observer(node["name"]), "GET", "/v1/status", timeout=5)
        except (OSError, Refused):
            told = {"ready": False}
        if not told["ready"]:
            found.append(f"node {node['name']}: the observer does not read events yet")
    return found


def _greet(status: dict[str, Any], cluster: str, late: list[str]) -> None:
    for warning in status["warnings"]:
        click.echo(f"warning: {warning}", err=True)
    for sentence in late:
        click.echo(f"lockgate: {sentence}", err=True)
    count = status["pods"]
    nodes = len(status["nodes"])
    click.echo(
        f"Cluster {cluster}: {nodes} node{'s' * (nodes != 1)}, {count['ready']} of"
        f" {count['total']} pods ready, watching {status['folder']}"
    )


def _stop(state: State, supervisor: subprocess.Popen[bytes], quiet: bool) -> None:
    from lockgate.standalone import teardown

    if supervisor.stdin:
        supervisor.stdin.close()  # its sign to end
    supervisor.terminate()
    try:
        supervisor.wait(10)
    except subprocess.TimeoutExpired:
        supervisor.kill()
        supervisor.wait()
    teardown.remove(state)
    if not quiet:
        click.echo("Everything that the cluster made is removed.", err=True)
