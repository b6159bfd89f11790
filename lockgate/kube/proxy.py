"""The proxy by which an API server is reached: a kubeconfig's `proxy-url`, else HTTPS_PROXY and
NO_PROXY as kubectl reads them (golang.org/x/net/http/httpproxy)."""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
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
    """Loopback always is. Entries are addresses, blocks, names (example.com: with all below;
    .example.com and *.example.com: only what is below), or *; addresses and names may have a
    port, an IPv6 address then in brackets."""
    address = _address(host)
    if host == "localhost" or (address is not None and address.is_loopback):
        return True
    for entry in (entry.strip().lower() for entry in excluded.split(",")):
        if entry == "*":
            return True
        if "/" in entry:
            try:
                if address is not None and address in ip_network(entry, strict=False):
                    return True
            except ValueError:
                pass
            continue
        name, colon, number = entry.rpartition(":")
        port_given = number.isdecimal() or not number
        if colon and port_given and (":" not in name or name.endswith("]")):
            if number and int(number) != port:
                continue
            entry = name.removeprefix("[").removesuffix("]")
        if address is not None:
            if _address(entry) == address:
                return True
        elif entry:
            below = entry.removeprefix("*") if entry.startswith("*.") else entry
            if host.endswith(below if below.startswith(".") else f".{below}") or host == below:
                return True
    return False


def _address(text: str) -> IPv4Address | IPv6Address | None:
    """None for what is none. As in Go, an IPv4 address in IPv6's form is that address."""
    try:
        found = ip_address(text)
    except ValueError:
        return None
    return getattr(found, "ipv4_mapped", None) or found
