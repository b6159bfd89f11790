"""Addresses and blocks as 16 bytes."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lockgate.objects.address import (
    contains,
    format_address,
    format_cidr,
    is_ipv4,
    parse_address,
    parse_cidr,
)

MAPPED = bytes(10) + b"\xff\xff"


@pytest.mark.parametrize(
    ("text", "octets", "canonical"),
    [
        ("10.0.0.1", MAPPED + bytes([10, 0, 0, 1]), "10.0.0.1"),
        ("::ffff:10.0.0.1", MAPPED + bytes([10, 0, 0, 1]), "10.0.0.1"),
        ("FD00:0::1", b"\xfd" + bytes(14) + b"\x01", "fd00::1"),
        ("::", bytes(16), "::"),
    ],
)
def test_address(text: str, octets: bytes, canonical: str) -> None:
    assert parse_address(text) == octets
    assert format_address(octets) == canonical


@pytest.mark.parametrize(
    "text", ["", "10.0.0", "10.0.0.01", "10.0.0.256", "fe80::1%eth0", "::1::", "1.2.3.4/32", " ::1"]
)
def test_no_address(text: str) -> None:
    with pytest.raises(ValueError, match="not an IP address"):
        parse_address(text)


@pytest.mark.parametrize(
    ("text", "length", "canonical"),
    [
        ("10.1.2.3/8", 104, "10.0.0.0/8"),
        ("10.1.2.3/32", 128, "10.1.2.3/32"),
        ("1.2.3.4/0", 96, "0.0.0.0/0"),
        ("fd00::1/64", 64, "fd00::/64"),
        ("::/0", 0, "::/0"),
        ("::1/128", 128, "::1/128"),
    ],
)
def test_cidr(text: str, length: int, canonical: str) -> None:
    network, bits = parse_cidr(text)
    assert bits == length
    assert format_cidr(network, bits) == canonical


@pytest.mark.parametrize(
    "text",
    ["", "/", "1.2.3.4", "1.2.3.4/", "1.2.3.4/33", "1.2.3.4/-1", "1.2.3.4/08", "::/129", "::/1 ",
     "1.2.3.4/255.0.0.0", "::ffff:1.2.3.4/104", "1.2.3.4/٨", "1.2.3.4/8/8"],
)  # fmt: skip
def test_no_cidr(text: str) -> None:
    with pytest.raises(ValueError, match=r"not a CIDR|out of range|IPv6 notation"):
        parse_cidr(text)


@given(st.ip_addresses())
def test_address_round_trip(address: IPv4Address | IPv6Address) -> None:
    octets = parse_address(str(address))
    assert ip_address(format_address(octets)) == (getattr(address, "ipv4_mapped", None) or address)
    assert is_ipv4(octets) == (":" not in format_address(octets))


@given(st.ip_addresses(), st.ip_addresses(), st.integers(0, 128))
def test_contains_as_the_standard_library(
    base: IPv4Address | IPv6Address, address: IPv4Address | IPv6Address, length: int
) -> None:
    if getattr(base, "ipv4_mapped", None) or getattr(address, "ipv4_mapped", None):
        return  # the standard library keeps them apart
    cidr = f"{base}/{min(length, base.max_prefixlen)}"
    assert contains(cidr, str(base))
    assert contains(cidr, str(address)) == (address in ip_network(cidr, strict=False))


def test_an_ipv6_block_never_has_an_ipv4_address() -> None:
    assert not contains("::/0", "::ffff:1.2.3.4")
    assert not contains("::/64", "1.2.3.4")
    assert not contains("0.0.0.0/0", "::1")
