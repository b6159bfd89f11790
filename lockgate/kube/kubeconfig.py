"""kubeconfig files: where the API server is and who we are (kubectl's format, `v1 Config`).

Client certificates, tokens and token files; commands that make credentials (`exec`) and
connections whose server is not checked are refused.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

__all__ = ["Kubeconfig", "contexts", "current_context", "read"]


class Kubeconfig(msgspec.Struct):
    """One context of a file."""

    server: str
    context: ssl.SSLContext | None
    server_name: str = ""
    token: str = ""
    token_file: str = ""
    namespace: str = "default"


def read(path: Path, context: str = "") -> Kubeconfig:
    """The context `context` of a file, or its current one. ValueError names file and field."""
    config = _load(path)
    context = context or str(config.get("current-context") or "")
    if not context:
        raise ValueError(f"{path}, field current-context: expected the name of a context")
    chosen = _named(path, config, "contexts", context, "context")
    cluster = _named(path, config, "clusters", str(chosen.get("cluster") or ""), "cluster")
    user: dict[str, Any] = {}
    if chosen.get("user"):
        user = _named(path, config, "users", str(chosen["user"]), "user")
    server = str(cluster.get("server") or "").rstrip("/")
    if cluster.get("insecure-skip-tls-verify"):
        raise ValueError(
            f"{path}, field insecure-skip-tls-verify: expected certificate-authority instead,"
            " a server that is not checked may be anybody's"
        )
    for field in ("exec", "auth-provider", "username"):
        if user.get(field):
            raise ValueError(
                f"{path}, field users.user.{field}: expected a client certificate, token or"
                " tokenFile"
            )
    result = Kubeconfig(
        server,
        None,
        server_name=str(cluster.get("tls-server-name") or ""),
        token=str(user.get("token") or ""),
        namespace=str(chosen.get("namespace") or "default"),
    )
    if user.get("tokenFile"):
        result.token_file = str(path.parent / user["tokenFile"])
    if server.startswith("https://"):
        result.context = _tls(path, cluster, user)
    elif not server.startswith("http://"):
        raise ValueError(f"{path}, field server: expected https://HOST:PORT, got {server!r}")
    return result


def contexts(path: Path) -> list[str]:
    """The names of a file's contexts. ValueError names the file."""
    entries = _load(path).get("contexts") or ()
    return [str(entry["name"]) for entry in entries if isinstance(entry, dict) and "name" in entry]


def current_context(path: Path) -> str:
    """A file's current context, "" if it names none. ValueError names the file."""
    return str(_load(path).get("current-context") or "")


def _load(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: this is no YAML: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path}: expected an object, the kubeconfig")
    return config


def _named(path: Path, config: dict[str, Any], table: str, name: str, field: str) -> dict[str, Any]:
    for entry in config.get(table) or ():
        if isinstance(entry, dict) and entry.get("name") == name:
            value = entry.get(field) or {}
            if isinstance(value, dict):
                return value
    raise ValueError(f"{path}, field {table}: expected an entry named {name!r}")


def _tls(path: Path, cluster: dict[str, Any], user: dict[str, Any]) -> ssl.SSLContext:
    try:
        data = _data(path, cluster, "certificate-authority")
        context = ssl.create_default_context(cadata=data.decode() if data else None)
        certificate = _data(path, user, "client-certificate")
        key = _data(path, user, "client-key")
        if certificate and key:
            with _files(certificate, key) as (certificate_file, key_file):
                context.load_cert_chain(certificate_file, key_file)
    except (OSError, UnicodeDecodeError, binascii.Error) as error:
        raise ValueError(f"{path}: certificates can't be read: {error}") from error
    return context


def _data(path: Path, entry: dict[str, Any], field: str) -> bytes:
    """What `FIELD-data` holds, or the file that `FIELD` names."""
    if entry.get(f"{field}-data"):
        return base64.b64decode(entry[f"{field}-data"], validate=True)
    return (path.parent / entry[field]).read_bytes() if entry.get(field) else b""


@contextlib.contextmanager
def _files(*contents: bytes) -> Iterator[list[str]]:
    """Contents as files that only we can read, for as long as the block lasts: ssl takes
    client certificates from files only."""
    with tempfile.TemporaryDirectory(prefix="lockgate-") as folder:
        paths = []
        for number, content in enumerate(contents):
            path = os.path.join(folder, str(number))
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(fd, "wb") as file:
                file.write(content)
            paths.append(path)
        yield paths
