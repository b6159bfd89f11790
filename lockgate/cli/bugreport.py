"""`lockgate bugreport`: what a maintainer needs, in one file, and nothing that is secret.

Objects are written from the structs that Lockgate itself decodes, with fields left out by name,
never by removing what looks secret: Secrets and ConfigMaps are not asked for, and neither
environments, commands nor annotations (but our own) are written.
"""

from __future__ import annotations

import io
import platform
import tarfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import click
import msgspec

from lockgate import __version__
from lockgate.access import ROLES, Access, Refused, Role
from lockgate.cli.common import access_options, fail, fail_unanswered, json_option, print_json
from lockgate.cli.doctor import examine
from lockgate.cli.status import gather, problems
from lockgate.objects.model import Cluster, Pod

__all__ = ["bugreport", "objects"]

_LOG_LINES = 5000
_FLOWS = 2000
_OURS = "lockgate.dev/"


@click.command()
@click.argument("file", metavar="[FILE]", required=False, type=click.Path(path_type=Path))
@json_option
@access_options
def bugreport(file: Path | None, as_json: bool, access: Access) -> None:
    """Pack what a maintainer needs into FILE (lockgate-bugreport-TIME.tar.gz), and list it.

    Status, what the doctor found, versions, each node's map sizes, tables, journal, logs and last
    denied flows, and the objects' names and specs. No Secrets or ConfigMaps, no environments, no
    commands, no annotations but ours. Names, labels and addresses are in it: look before you
    publish it.

    Exit codes: 0 written (perhaps without what could not be asked), 2 no such cluster, or no file.
    """
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    target = file or Path(f"lockgate-bugreport-{stamp}.tar.gz")
    try:
        parts = _collect(access)
    except (OSError, Refused) as error:
        fail_unanswered(access, error)
    try:
        contents = _write(target, parts)
    except OSError as error:
        fail(f"{target} can't be written: {error.strerror}")
    if as_json:
        print_json({"file": str(target), "contents": contents})
        return
    for one in contents:
        click.echo(f"{one['bytes']:>10}  {one['name']}")
    click.echo(f"\n{target}: names, labels and addresses of your cluster are in it.")


def _collect(access: Access) -> dict[str, bytes]:
    """Contents by name. What could not be asked has the reason as its content."""
    told = gather(access)
    told["problems"] = problems(told)
    cluster = access.objects()
    asked: dict[str, Callable[[], bytes]] = {
        "doctor.json": lambda: _json(msgspec.to_builtins(examine(access, {}))),
    }
    for node in told["nodes"]:
        asked |= _of_node(access, node["name"])

    def ask(item: tuple[str, Callable[[], bytes]]) -> tuple[str, bytes]:
        try:
            return item[0], item[1]()
        except (OSError, Refused, ValueError) as error:
            return f"{item[0]}.failed", f"{error}\n".encode()

    with ThreadPoolExecutor(16) as pool:
        found = dict(pool.map(ask, asked.items()))
    versions = {
        "lockgate": __version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
    }
    return {
        "versions.json": _json(versions),
        "status.json": _json(told),
        "objects.json": _json(objects(cluster)),
        **found,
    }


def _of_node(access: Access, node: str) -> dict[str, Callable[[], bytes]]:
    def log(role: Role) -> bytes:
        return access.logs(node, role, _LOG_LINES).encode()

    def report() -> bytes:
        return _json(access.call(node, "agent", "GET", "/v1/report", timeout=60))

    def denied() -> bytes:
        url = f"/v1/flows?verdict=deny&limit={_FLOWS}"
        return _json(list(access.stream(node, "observer", url, timeout=30)))

    return {
        **{f"nodes/{node}/{role}.log": partial(log, role) for role in ROLES},
        f"nodes/{node}/report.json": report,
        f"nodes/{node}/denied.json": denied,
    }


def objects(cluster: Cluster) -> dict[str, Any]:
    """Pure: the objects as lists by kind, with what may be told of them."""
    tables: dict[str, Any] = {
        "namespaces": cluster.namespaces,
        "nodes": cluster.nodes,
        "pods": cluster.pods,
        "services": cluster.services,
        "slices": cluster.slices,
        "policies": cluster.policies,
    }
    return {
        kind: [_object(one) for _, one in sorted(table.items())] for kind, table in tables.items()
    }


def _object(one: Any) -> Any:
    if isinstance(one, Pod):
        one = _pod(one)
    told = msgspec.to_builtins(one)
    annotations = told["metadata"].pop("annotations", {})
    ours = {key: value for key, value in annotations.items() if key.startswith(_OURS)}
    if ours:
        told["metadata"]["annotations"] = ours
    return told


def _pod(pod: Pod) -> dict[str, Any]:
    """What the data plane uses of a pod: never its containers' environments or commands."""
    meta, spec, status = pod.metadata, pod.spec, pod.status
    return {
        "metadata": msgspec.to_builtins(meta),
        "spec": {
            "nodeName": spec.node_name,
            "hostNetwork": spec.host_network,
            "containers": [
                {"name": one.name, "image": one.image, "ports": msgspec.to_builtins(one.ports)}
                for one in spec.containers
            ],
        },
        "status": {"phase": status.phase, "podIPs": pod.ips, "ready": pod.ready},
    }


def _json(value: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value)) + b"\n"


def _write(path: Path, parts: dict[str, bytes]) -> list[dict[str, Any]]:
    """The archive, readable by its owner alone; what is in it."""
    folder = path.name.removesuffix(".tar.gz")
    path.touch(mode=0o600)
    path.chmod(0o600)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in parts.items():
            entry = tarfile.TarInfo(f"{folder}/{name}")
            entry.size, entry.mtime, entry.mode = len(content), int(time.time()), 0o600
            archive.addfile(entry, io.BytesIO(content))
    return [{"name": name, "bytes": len(content)} for name, content in parts.items()]
