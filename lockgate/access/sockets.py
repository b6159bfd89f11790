"""JSON over a unix socket of ours: the supervisor's, an agent's, an observer's."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lockgate.access import Refused

__all__ = ["call", "connect", "stream"]


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
    except http.client.HTTPException as error:
        raise ConnectionError(f"it ended in the middle of an answer: {error}") from error
    finally:
        connection.close()
    if response.status >= 400:
        raise Refused(sentence(text) or f"{url}: HTTP {response.status}")
    return json.loads(text) if text else None


def stream(path: Path, url: str, *, timeout: float | None = None) -> Iterator[Any]:
    """The objects of an ndjson answer as they come."""
    connection = connect(path, timeout)
    try:
        connection.request("GET", url)
        response = connection.getresponse()
        if response.status >= 400:
            raise Refused(sentence(response.read()))
        while line := response.readline():
            if line.strip():
                yield json.loads(line)
    except http.client.HTTPException as error:
        raise ConnectionError(f"it ended in the middle of an answer: {error}") from error
    finally:
        connection.close()


def sentence(body: bytes) -> str:
    """The text of {"error": …}, or the body itself."""
    try:
        answer = json.loads(body)
    except ValueError:
        answer = None
    error = answer.get("error") if isinstance(answer, dict) else None
    return str(error) if error else body.decode(errors="replace").strip()
