"""The cluster's certificate authority, certificates and kubeconfig files, made with openssl."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path

import yaml

from cluster.commands import run

__all__ = ["Authority"]

_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "3650")


class Authority:
    """Signs for everybody in the cluster. Files: ca.crt, ca.key, service-account.{key,pub}."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.certificate = folder / "ca.crt"
        self.key = folder / "ca.key"
        self.service_account_key = folder / "service-account.key"
        self.service_account_public = folder / "service-account.pub"

    def create(self) -> None:
        """Make the authority's own files. Raises Failed."""
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        run(
            *("openssl", "req", "-x509", *_KEY, "-subj", "/CN=lockgate-cluster"),
            *("-addext", "keyUsage=critical,keyCertSign,digitalSignature"),
            *("-keyout", self.key, "-out", self.certificate),
        )
        run("openssl", "genrsa", "-out", self.service_account_key, "2048")
        run(
            *("openssl", "rsa", "-in", self.service_account_key, "-pubout"),
            *("-out", self.service_account_public),
        )

    def sign(
        self, name: str, subject: str, group: str = "", addresses: Sequence[str] = ()
    ) -> tuple[Path, Path]:
        """Certificate and key, NAME.crt and NAME.key, for a subject (a user) in a group; with
        addresses ("IP:…", "DNS:…") also for a server. Raises Failed."""
        certificate, key = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        extensions = ["extendedKeyUsage=clientAuth,serverAuth"]
        if addresses:
            extensions.append("subjectAltName=" + ",".join(addresses))
        organisation = f"/O={group}" if group else ""
        run(
            *("openssl", "req", "-x509", *_KEY, "-subj", f"{organisation}/CN={subject}"),
            *("-CA", self.certificate, "-CAkey", self.key),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *(word for extension in extensions for word in ("-addext", extension)),
            *("-keyout", key, "-out", certificate),
        )
        return certificate, key

    def kubeconfig(self, path: Path, server: str, certificate: Path, key: Path) -> None:
        """Write a kubeconfig file with everything inside it."""
        text = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [
                _named(
                    "cluster",
                    {"server": server, **_inline("certificate-authority", self.certificate)},
                )
            ],
            "users": [
                _named(
                    "user", _inline("client-certificate", certificate) | _inline("client-key", key)
                )
            ],
            "contexts": [_named("context", {"cluster": "lockgate", "user": "lockgate"})],
            "current-context": "lockgate",
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_text(yaml.safe_dump(text))


def _named(kind: str, content: object) -> dict[str, object]:
    return {"name": "lockgate", kind: content}


def _inline(field: str, path: Path) -> dict[str, str]:
    return {f"{field}-data": base64.b64encode(path.read_bytes()).decode()}
