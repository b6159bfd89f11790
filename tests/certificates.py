"""Certificates for servers and clients of tests, made by openssl."""

from __future__ import annotations

import ssl
import subprocess
from pathlib import Path

__all__ = ["Certificates"]


class Certificates:
    """A CA, and certificates of it, as files."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.ca, self._key = folder / f"{name}.crt", folder / f"{name}.key"
        self._openssl("req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256",
                      "-nodes", "-days", "2", "-subj", f"/CN={name}", "-keyout", str(self._key),
                      "-out", str(self.ca))  # fmt: skip

    def issue(self, *names: str) -> tuple[Path, Path]:
        """A certificate for `names`, and its key."""
        stem = self.folder / f"{self.name}-{names[0]}"
        request, key = stem.with_suffix(".csr"), stem.with_suffix(".key")
        self._openssl("req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                      "-subj", f"/CN={names[0]}", "-keyout", str(key),
                      "-out", str(request))  # fmt: skip
        extension = stem.with_suffix(".ext")
        kinds = ("IP" if name[0].isdigit() else "DNS" for name in names)
        listed = ",".join(f"{kind}:{name}" for kind, name in zip(kinds, names, strict=True))
        extension.write_text(f"subjectAltName={listed}\n")
        self._openssl("x509", "-req", "-in", str(request), "-CA", str(self.ca), "-CAkey",
                      str(self._key), "-CAcreateserial", "-days", "2", "-extfile",
                      str(extension), "-out", str(stem.with_suffix(".crt")))  # fmt: skip
        return stem.with_suffix(".crt"), key

    def server(self, *names: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(*self.issue(*names))
        return context

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
