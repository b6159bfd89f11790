"""What commands share: the cluster option, the supervisor's and agents' sockets, output, errors."""

from __future__ import annotations

import http.client
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from lockgate.standalone.state import State, valid_name

__all__ = [
    "Refused",
    "call",
    "cluster_option",
    "connect",
    "fail",
    "json_option",
    "need_root",
    "not_ready",
    "print_json",
    "running",
    "stream",
]

USAGE = 2
NO_FEATURE = 77

F = TypeVar("F", bound=Callable[..., Any])


class Refused(Exception):
    """The other side answered with an error; the message is its sentence."""


def fail(sentence: str, code: int = USAGE) -> NoReturn:
    """One sentence on stderr, and out."""
    click.echo(f"lockgate: {sentence}", err=True)
    sys.exit(code)


def need_root() -> None:
    if os.geteuid() != 0:
        fail("this needs root (network namespaces and eBPF): run it with sudo")


def cluster_option(command: F) -> F:
    return click.option(
        "--cluster",
        default="default",
        show_default=True,
        envvar="LOCKGATE_CLUSTER",
        help="Name of the cluster; several can run side by side.",
        callback=_check_name,
    )(command)


def json_option(command: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="JSON on standard output.")(command)


def _check_name(_ctx: click.Context, _param: click.Parameter, value: str) -> str:
    if not valid_name(value):
        raise click.BadParameter("expected 1 to 20 lower case letters, digits and '-'")
    return value


def running(cluster: str) -> State:
    """The state folder of a cluster whose supervisor answers, or a sentence and exit code 2."""
    need_root()
    state = State(cluster)
    try:
        connect(state.control, 5).close()
    except OSError:
        fail(f"no cluster {cluster!r} is running: start one with `lockgate up DIR`")
    return state


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def connect(path: Path, timeout: float | None = 30) -> http.client.HTTPConnection:
    """An open connection to a unix socket of ours. Raises OSError."""
    connection = _UnixConnection(path, timeout)
    connection.connect()
    return connection


def call(path: Path, method: str, url: str, body: Any = None, *, timeout: float | None = 30) -> Any:
    """One JSON request. Raises Refused with the other side's sentence, OSError without one."""
    connection = connect(path, timeout)
    try:
        data = None if body is None else json.dumps(body)
        connection.request(method, url, data, {"Content-Type": "application/json"})
        response = connection.getresponse()
        text = response.read()
    finally:
        connection.close()
    try:
        answer = json.loads(text) if text else None
    except ValueError:
        answer = {"error": text.decode(errors="replace").strip()}
    if response.status >= 400:
        error = answer.get("error") if isinstance(answer, dict) else None
        raise Refused(error or f"{url}: HTTP {response.status}")
    return answer


def stream(path: Path, url: str, *, timeout: float | None = None) -> Iterator[Any]:
    """The objects of an ndjson answer as they come."""
    connection = connect(path, timeout)
    try:
        connection.request("GET", url)
        response = connection.getresponse()
        if response.status >= 400:
            raise Refused(response.read().decode(errors="replace").strip())
        while line := response.readline():
            if line.strip():
                yield json.loads(line)
    finally:
        connection.close()


def print_json(value: Any) -> None:
    click.echo(json.dumps(value, ensure_ascii=False))


def not_ready(status: dict[str, Any]) -> list[str]:
    """The pods of a status that are not ready, with the reason where it is known."""
    why = status.get("waitingFor", {})
    return [f"{pod}: {why[pod]}" if pod in why else pod for pod in status["notReady"]]
