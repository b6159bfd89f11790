"""Users whose credentials a command makes: kubeconfig's `users[].user.exec`, for EKS, GKE, AKS,
OIDC and others.

The contract is client.authentication.k8s.io/v1 and v1beta1 (ExecConfig, ExecCredential) as
kubectl keeps it: the command is told the cluster in KUBERNETES_EXEC_INFO, writes an
ExecCredential to standard output, and has our standard error for what it says to the user.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import ssl
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from lockgate.kube.tls import client_context

__all__ = ["Credential", "CredentialError", "Plugin", "Setting", "setting"]

_GROUP = "client.authentication.k8s.io"
_V1 = f"{_GROUP}/v1"
_VERSIONS = (_V1, f"{_GROUP}/v1beta1")


class CredentialError(OSError):
    """A plugin gave no credential; the message names the plugin, the user and the file."""


class _Variable(msgspec.Struct):
    name: str
    value: str = ""


class Setting(msgspec.Struct, rename="camel"):
    """clientcmd/v1 ExecConfig."""

    command: str
    api_version: str
    args: tuple[str, ...] = ()
    env: tuple[_Variable, ...] = ()
    install_hint: str = ""
    provide_cluster_info: bool = False
    interactive_mode: Literal["Never", "IfAvailable", "Always", ""] = ""


class _Status(msgspec.Struct, rename="camel"):
    token: str | None = None
    client_certificate_data: str | None = None
    client_key_data: str | None = None
    expiration_timestamp: Annotated[datetime, msgspec.Meta(tz=True)] | None = None


class _Answer(msgspec.Struct, rename="camel"):
    """ExecCredential."""

    kind: str
    api_version: str
    status: _Status | None = None


class Credential(msgspec.Struct, frozen=True, eq=False):
    """Who we are, until `expires`; None = until the server refuses it."""

    token: str
    context: ssl.SSLContext
    expires: datetime | None

    @property
    def expired(self) -> bool:
        return self.expires is not None and self.expires <= datetime.now(UTC)


def setting(path: Path, user: str, raw: Any) -> Setting:
    """A user's `exec`. ValueError names file, user and field."""
    where = f"{path}, user {user!r}"
    if isinstance(raw, dict):
        # What writes kubeconfigs leaves fields null that it has nothing for.
        raw = {key: value for key, value in raw.items() if value is not None}
    try:
        found = msgspec.convert(raw, Setting)
    except msgspec.ValidationError as error:
        text, _, at = str(error).partition(" - at `$")
        raise ValueError(f"{where}, field exec{at.rstrip('`')}: {text}") from error
    if not found.command:
        raise ValueError(f"{where}, field exec.command: expected a command")
    if found.api_version not in _VERSIONS:
        raise ValueError(
            f"{where}, field exec.apiVersion: expected {' or '.join(_VERSIONS)},"
            f" got {found.api_version!r}"
        )
    if not found.interactive_mode:
        if found.api_version == _V1:
            raise ValueError(
                f"{where}, field exec.interactiveMode: expected Never, IfAvailable or Always"
            )
        found.interactive_mode = "IfAvailable"
    if "/" in found.command:  # else it is looked for in PATH
        found.command = str(path.parent / found.command)
    return found


class Plugin:
    """A user's command, and what it answered last."""

    def __init__(
        self,
        where: str,
        setting: Setting,
        cluster: dict[str, Any],
        ca: bytes,
        certificate: tuple[bytes, bytes] = (b"", b""),
    ) -> None:
        """`where` names user and file in errors. `cluster` is what the command is told with
        provideClusterInfo; `ca` checks the server; `certificate` (and its key) is the user's
        own, where the command gives none."""
        self._where = f"{where}: the plugin {setting.command}"
        self._setting = setting
        self._cluster, self._ca, self._certificate = cluster, ca, certificate
        self._lock = asyncio.Lock()
        self._last: Credential | None = None
        self._failures = 0
        self._failed: CredentialError | None = None

    async def credential(self, refused: Credential | None = None) -> Credential:
        """The last credential unless it expired or is `refused`, which the server did with 401;
        else the command runs, once for all who wait, also when it fails. CredentialError."""
        known = self._failures
        async with self._lock:
            if self._last is None or self._last is refused or self._last.expired:
                if self._failures > known and self._failed is not None:
                    raise CredentialError(str(self._failed))
                try:
                    self._last = self._read(await self._run())
                except CredentialError as error:
                    self._failures, self._failed = self._failures + 1, error
                    raise
            return self._last

    async def _run(self) -> bytes:
        setting = self._setting
        interactive = self._interactive()
        spec: dict[str, Any] = {"interactive": interactive}
        if setting.provide_cluster_info:
            spec["cluster"] = self._cluster
        info = {"kind": "ExecCredential", "apiVersion": setting.api_version, "spec": spec}
        # Looked for in our PATH, also where the command is to have another.
        command = shutil.which(setting.command)
        if command is None:
            there = "is not an executable file" if "/" in setting.command else "is not in PATH"
            hint = f"\n\n{setting.install_hint}" if setting.install_hint else ""
            raise CredentialError(f"{self._where} {there}{hint}")
        environment = {
            **os.environ,
            **{one.name: one.value for one in setting.env},
            "KUBERNETES_EXEC_INFO": msgspec.json.encode(info).decode(),
        }
        try:
            process = await asyncio.create_subprocess_exec(
                command,
                *setting.args,
                stdin=None if interactive else asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                env=environment,
            )
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else error
            raise CredentialError(f"{self._where} can't be run: {why}") from error
        try:
            output, _ = await process.communicate()
        finally:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
        if process.returncode:
            raise CredentialError(f"{self._where} failed with exit code {process.returncode}")
        return output

    def _interactive(self) -> bool:
        """May the command ask the user?"""
        mode = self._setting.interactive_mode
        if mode == "Never":
            return False
        terminal = os.isatty(0)
        if mode == "Always" and not terminal:
            raise CredentialError(
                f"{self._where} wants to ask (interactiveMode Always), and standard input is no"
                " terminal"
            )
        return terminal

    def _read(self, output: bytes) -> Credential:
        try:
            answer = msgspec.json.decode(output, type=_Answer)
        except (msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise self._bad(f"no ExecCredential: {error}") from error
        if answer.kind != "ExecCredential":
            raise self._bad(f"kind {answer.kind!r}, expected 'ExecCredential'")
        if answer.api_version != self._setting.api_version:
            raise self._bad(
                f"apiVersion {answer.api_version!r}, expected {self._setting.api_version!r}"
            )
        status = answer.status or _Status()
        certificate, key = status.client_certificate_data or "", status.client_key_data or ""
        if bool(certificate) != bool(key):
            raise self._bad("one of status.clientCertificateData and clientKeyData, expected both")
        if not status.token and not certificate:
            raise self._bad(
                "no credential: expected status.token or status.clientCertificateData and"
                " clientKeyData"
            )
        token = status.token or ""
        if not token.isascii() or not token.isprintable():
            raise self._bad("a status.token that no HTTP header can carry")
        pair = (certificate.encode(), key.encode()) if certificate else self._certificate
        try:
            context = client_context(self._ca, *pair)
        except (OSError, UnicodeDecodeError) as error:
            raise self._bad(f"a certificate that can't be used with its key: {error}") from error
        return Credential(token, context, status.expiration_timestamp)

    def _bad(self, what: str) -> CredentialError:
        return CredentialError(f"{self._where} answered {what}")
