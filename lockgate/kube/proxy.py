"""The proxy by which an API server is reached: a kubeconfig's `proxy-url`, else HTTPS_PROXY and
NO_PROXY as kubectl reads them (golang.org/x/net/http/httpproxy)."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network
from urllib.parse import urlsplit

__all__ = ["proxy_of"]


def proxy_of(server: str, given: str, environment: Mapping[str, str]) -> str:
    """http://HOST:PORT, or "" for none. `given` is the cluster's own, which counts for every
    server. ValueError names the proxies that are not spoken."""
    if given:
        return _checked(given, "field proxy-url")
    parts = urlsplit(server)
    if parts.scheme != "https" or not parts.hostname:
        return ""
    for name in ("HTTPS_PROXY", "https_proxy"):
        if environment.get(name):
            excluded = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
            direct = _excluded(parts.hostname, parts.port or 443, excluded)
            return "" if direct else _checked(environment[name], name)
    return ""


def _checked(url: str, where: str) -> str:
    url = url if "://" in url else f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme != "http" or not parts.hostname:
        # Without what follows the scheme: it may have a password.
        raise ValueError(f"{where}: expected a proxy http://HOST:PORT, got {parts.scheme}://…")
    return url


def _excluded(host: str, port: int, excluded: str) -> bool:
    """Loopback always is. Entries are names (with all below), addresses, blocks, or *, and may
    have a port."""
    try:
        address = ip_address(host)
    except ValueError:
        address = None
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    for entry in (entry.strip().lower() for entry in excluded.split(",")):
        if entry == "*":
            return True
        if address is not None and "/" in entry:
            try:
                if address in ip_network(entry, strict=False):
                    return True
            except ValueError:
                continue
        name, colon, number = entry.rpartition(":")
        if colon and number.isdigit() and (":" not in name or name.endswith("]")):
            if int(number) != port:
                continue
            entry = name
        entry = entry.strip("[]")
        if address is not None:
            if entry == host:
                return True
        elif entry and f".{host}".endswith(f".{entry.removeprefix('*').removeprefix('.')}"):
            return True
    return False
