"""kubeconfig files: where the API server is and who we are (kubectl's format, `v1 Config`).

Client certificates, tokens, token files and commands that make credentials (exec_plugin.py);
connections whose server is not checked are refused. Several files are merged as kubectl does
with $KUBECONFIG: of each name the first entry counts, whole, and paths in it are relative to its
own file.
"""

from __future__ import annotations

import base64
import binascii
import os
import ssl
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import yaml

from lockgate.kube.exec_plugin import Plugin, setting
from lockgate.kube.proxy import proxy_of
from lockgate.kube.tls import client_context

__all__ = ["Kubeconfig", "Merged", "load", "read"]

#: Of a cluster's entry, what provideClusterInfo tells as it is (Cluster in
#: client.authentication.k8s.io/v1).
_TOLD = ("server", "tls-server-name", "proxy-url", "disable-compression")
_EXTENSION = "client.authentication.k8s.io/exec"
_TABLES = {"contexts": "context", "clusters": "cluster", "users": "user"}


class Kubeconfig(msgspec.Struct):
    """One context. `plugin` is there when it has to be asked who we are."""

    server: str
    context: ssl.SSLContext | None
    server_name: str = ""
    token: str = ""
    token_file: str = ""
    namespace: str = "default"
    plugin: Plugin | None = None
    proxy: str = ""


class Merged(msgspec.Struct):
    """Files as one. `tables`: contexts, clusters and users by name, with the file of each."""

    title: str  # in errors
    current_context: str
    tables: dict[str, dict[str, tuple[Path, dict[str, Any]]]]

    def entry(self, table: str, name: str) -> tuple[Path, dict[str, Any]]:
        """ValueError names files and table."""
        if name not in self.tables[table]:
            raise ValueError(f"{self.title}, field {table}: expected an entry named {name!r}")
        return self.tables[table][name]


def load(paths: Sequence[Path]) -> Merged:
    """All that files have. ValueError names the file."""
    tables: dict[str, dict[str, tuple[Path, dict[str, Any]]]] = {name: {} for name in _TABLES}
    current = ""
    for path in paths:
        config = _load(path)
        current = current or str(config.get("current-context") or "")
        for table, field in _TABLES.items():
            for entry in config.get(table) or ():
                if isinstance(entry, dict) and isinstance(entry.get(field) or {}, dict):
                    named = path, entry.get(field) or {}
                    tables[table].setdefault(str(entry.get("name")), named)
    return Merged(" and ".join(map(str, paths)), current, tables)


def read(paths: Sequence[Path], context: str = "") -> Kubeconfig:
    """The context `context` of files, or their current one. ValueError names file and field."""
    merged = load(paths)
    context = context or merged.current_context
    if not context:
        raise ValueError(f"{merged.title}, field current-context: expected the name of a context")
    _, chosen = merged.entry("contexts", context)
    path, cluster = merged.entry("clusters", str(chosen.get("cluster") or ""))
    server = str(cluster.get("server") or "").rstrip("/")
    if cluster.get("insecure-skip-tls-verify"):
        raise ValueError(
            f"{path}, field insecure-skip-tls-verify: expected certificate-authority instead,"
            " a server that is not checked may be anybody's"
        )
    if not server.startswith(("https://", "http://")):
        raise ValueError(f"{path}, field server: expected https://HOST:PORT, got {server!r}")
    result = Kubeconfig(
        server,
        None,
        server_name=str(cluster.get("tls-server-name") or ""),
        namespace=str(chosen.get("namespace") or "default"),
    )
    try:
        result.proxy = proxy_of(server, str(cluster.get("proxy-url") or ""), os.environ)
    except ValueError as error:
        raise ValueError(f"{path}, {error}") from None
    ca = _data(path, cluster, "certificate-authority")
    user: dict[str, Any] = {}
    if chosen.get("user"):
        path, user = merged.entry("users", str(chosen["user"]))
    _user(result, path, str(chosen.get("user") or ""), user, cluster, ca)
    return result


def _user(
    result: Kubeconfig,
    path: Path,
    name: str,
    user: dict[str, Any],
    cluster: dict[str, Any],
    ca: bytes,
) -> None:
    """Who we are: `user` of the file `path`, into `result`."""
    for field in ("auth-provider", "username"):
        if user.get(field):
            raise ValueError(
                f"{path}, field users.user.{field}: expected a client certificate, token,"
                " tokenFile or exec"
            )
    result.token = str(user.get("token") or "")
    if user.get("tokenFile"):
        result.token_file = str(path.parent / user["tokenFile"])
    certificate = _data(path, user, "client-certificate"), _data(path, user, "client-key")
    if result.server.startswith("https://"):
        try:
            result.context = client_context(ca, *certificate)
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: certificates can't be read: {error}") from error
    if user.get("exec") is not None:
        command = setting(path, name, user["exec"])
        # As for kubectl, a token that is there needs nobody to make one.
        if not result.token and not result.token_file:
            where = f"{path}, user {name!r}"
            result.plugin = Plugin(where, command, _told(cluster, ca), ca, certificate)


def _told(cluster: dict[str, Any], ca: bytes) -> dict[str, Any]:
    """A cluster's entry as a plugin is told it."""
    told = {field: cluster[field] for field in _TOLD if cluster.get(field)}
    if ca:
        told["certificate-authority-data"] = base64.b64encode(ca).decode()
    for one in cluster.get("extensions") or ():
        if isinstance(one, dict) and one.get("name") == _EXTENSION:
            told["config"] = one.get("extension")
    return told


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


def _data(path: Path, entry: dict[str, Any], field: str) -> bytes:
    """What `FIELD-data` holds, or the file that `FIELD` names. ValueError."""
    try:
        if entry.get(f"{field}-data"):
            return base64.b64decode(entry[f"{field}-data"], validate=True)
        return (path.parent / entry[field]).read_bytes() if entry.get(field) else b""
    except (OSError, binascii.Error) as error:
        raise ValueError(f"{path}: certificates can't be read: {error}") from error
