"""TLS to a server that is checked, with the client's certificate if there is one."""

from __future__ import annotations

import contextlib
import os
import ssl
import tempfile
from collections.abc import Iterator

__all__ = ["as_kubectl", "client_context"]


def as_kubectl(context: ssl.SSLContext) -> ssl.SSLContext:
    """Takes the certificates that kubectl takes: Python 3.13 began to ask for extensions that CAs
    of many clusters lack (ssl.create_default_context)."""
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


def client_context(ca: bytes, certificate: bytes = b"", key: bytes = b"") -> ssl.SSLContext:
    """All are PEM; without `ca`, the system's. OSError (of which ssl.SSLError is one) or
    UnicodeDecodeError for what can't be read, or a key of another certificate."""
    context = as_kubectl(ssl.create_default_context(cadata=ca.decode() if ca else None))
    if certificate and key:
        with _files(certificate, key) as (certificate_file, key_file):
            context.load_cert_chain(certificate_file, key_file)
    return context


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
