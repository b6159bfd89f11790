"""Addresses and CIDR blocks, both families as 16 bytes.

IPv4 is carried as IPv4-mapped IPv6 (RFC 4291, 2.5.5.2), in network byte order, as the kernel's
tables have it. Families stay apart nevertheless: `contains` never finds an IPv4 address in an
IPv6 block, not even in ::/0.
"""

from __future__ import annotations

import re
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address

__all__ = [
    "contains",
    "format_address",
    "format_cidr",
    "is_ipv4",
    "is_special",
    "listen",
    "parse_address",
    "parse_cidr",
]

_MAPPED = bytes(10) + b"\xff\xff"
_OCTET = "(25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4 = re.compile(r"\.".join([_OCTET] * 4))
_PREFIX_LENGTH = re.compile(r"0|[1-9][0-9]{0,2}")


@lru_cache(maxsize=4096)  # the specification asks about the same pods with each packet
def parse_address(text: str) -> bytes:
    """16 bytes of an IPv4 or IPv6 address. Raises ValueError; zones (%eth0) are refused."""
    found = _IPV4.fullmatch(text)
    if found is not None:  # most are, and this is some times faster than ipaddress
        return _MAPPED + bytes(map(int, found.groups()))
    try:
        if ":" in text and "%" not in text:
            return IPv6Address(text).packed
    except ValueError:
        pass
    raise ValueError(f"not an IP address: {text!r}")


def format_address(address: bytes) -> str:
    """The usual text of 16 bytes: dotted for IPv4, compressed (RFC 5952) for IPv6."""
    if len(address) != 16:
        raise ValueError(f"an address has 16 bytes, not {len(address)}")
    return str(IPv4Address(address[12:]) if is_ipv4(address) else IPv6Address(address))


def is_ipv4(address: bytes) -> bool:
    """Whether 16 bytes carry an IPv4 address."""
    return address[:12] == _MAPPED


def is_special(address: bytes) -> bool:
    """Whether nobody beyond the host or its link can reach 16 bytes as an address of one host:
    unspecified, loopback, link-local or multicast (ValidateNonSpecialIP in
    k8s.io/kubernetes/pkg/apis/core/validation)."""
    ip = IPv4Address(address[12:]) if is_ipv4(address) else IPv6Address(address)
    return ip.is_unspecified or ip.is_loopback or ip.is_link_local or ip.is_multicast


def parse_cidr(text: str) -> tuple[bytes, int]:
    """16 bytes with the host bits cleared, and the prefix length out of 128.

    Host bits may be set in the text, as in the NetworkPolicy API. Raises ValueError, also for
    blocks in IPv4-mapped notation (::ffff:10.0.0.0/104), whose family would be ambiguous.
    """
    host, slash, length = text.partition("/")
    try:
        address = parse_address(host)
    except ValueError:
        slash = ""
        address = b""
    if not slash or not _PREFIX_LENGTH.fullmatch(length):
        raise ValueError(f"not a CIDR block: {text!r}")
    bits = int(length)
    if ":" not in host:
        bits += 96
    elif is_ipv4(address):
        raise ValueError(f"an IPv4 block in IPv6 notation: {text!r}")
    if bits > 128:
        raise ValueError(f"prefix length out of range: {text!r}")
    mask = (1 << 128) - (1 << (128 - bits))
    return (int.from_bytes(address, "big") & mask).to_bytes(16, "big"), bits


def format_cidr(address: bytes, length: int) -> str:
    """The usual text of a block of `parse_cidr`."""
    ipv4 = is_ipv4(address) and length >= 96
    return f"{format_address(address) if ipv4 else IPv6Address(address)}/{length - 96 * ipv4}"


def contains(cidr: str, address: str) -> bool:
    """Whether the block has the address; never across families. Raises ValueError."""
    network, length = parse_cidr(cidr)
    value = parse_address(address)
    if is_ipv4(value) != (":" not in cidr):
        return False
    shift = 128 - length
    return int.from_bytes(value, "big") >> shift == int.from_bytes(network, "big") >> shift


def listen(text: str, where: str = "web") -> tuple[str, int]:
    """HOST:PORT, [HOST]:PORT or :PORT; ValueError says `where`."""
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdigit() or int(port) > 65535:
        raise ValueError(f"{where}: expected HOST:PORT, got {text!r}")
    return host.strip("[]"), int(port)
