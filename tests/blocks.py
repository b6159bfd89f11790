"""CIDR blocks as a trie may get them wrong, and which of them an address is in."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from random import Random

__all__ = ["CASES", "edges", "is_mapped", "leaves", "longest", "random_blocks"]

Network = IPv4Network | IPv6Network
Address = IPv4Address | IPv6Address

#: Name → blocks; the class of a block is its position, from 1 on.
CASES: dict[str, list[str]] = {
    "no block": [],
    "everything": ["0.0.0.0/0", "::/0"],
    "IPv4 only": ["0.0.0.0/0"],
    "IPv6 only": ["::/0"],
    "halves": ["0.0.0.0/1", "128.0.0.0/1", "::/1", "8000::/1"],
    "one half": ["128.0.0.0/1", "8000::/1"],
    "one address": ["198.51.100.7/32", "2001:db8::7/128"],
    "the first and the last address": [
        *("0.0.0.0/32", "255.255.255.255/32", "::/128"),
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff/128",
    ],
    "around 16 bits": [
        *("10.0.0.0/15", "10.2.0.0/16", "10.3.128.0/17", "10.3.0.0/31", "10.3.0.2/32"),
        *("2001:db8::/31", "2001:dba::/32", "2001:dbb:8000::/33", "2001:dbb::/127"),
    ],
    "one in the other, each length": [
        *(f"{IPv4Address(0xAAAAAAAA >> 32 - n << 32 - n)}/{n}" for n in range(33)),
        *(f"{IPv6Address(0x5A5A << 112 >> 128 - n << 128 - n)}/{n}" for n in range(129)),
    ],
    "each length by itself": [
        *(f"{IPv4Address(1 << 32 - n)}/{n}" for n in range(1, 33)),
        *(f"{IPv6Address(1 << 128 - n)}/{n}" for n in range(1, 129)),
    ],
    "side by side": [
        *(f"192.0.2.{16 * n}/28" for n in range(16)),
        *(f"2001:db8:0:{n:x}::/64" for n in range(16)),
    ],
    "an inner one at either end": [
        *("10.0.0.0/8", "10.0.0.0/24", "10.255.255.0/24", "10.0.0.0/32", "10.255.255.255/32"),
        *("fd00::/8", "fd00::/64", "fdff:ffff:ffff:ffff::/64", "fd00::/128"),
    ],
    "far from each other": ["1.2.3.0/24", "200.2.3.4/32", "2001:db8::/48", "fd12:3456:789a::1/128"],
    "a long common beginning": [
        *("203.0.113.8/30", "203.0.113.12/31"),
        *("2001:db8:1:2:3:4:5:600/120", "2001:db8:1:2:3:4:5:700/121", "2001:db8:1:2:3:4:5:601/128"),
    ],
    "an outer one ends a common beginning": ["10.9.8.0/22", "10.9.9.9/32", "2001:db8::/40",
                                             "2001:db8:12:3456::/64"],
    "many": [f"100.64.{n >> 4}.{n % 16 * 16}/28" for n in range(1, 1200, 2)],
}  # fmt: skip


def random_blocks(rng: Random, count: int) -> list[str]:
    """Blocks of both families, many of them near or in each other."""
    found: dict[Network, None] = {}
    last = {32: rng.getrandbits(32), 128: rng.getrandbits(128)}
    for _ in range(count):
        bits = rng.choice((32, 128))
        number = last[bits] ^ rng.getrandbits(bits) >> rng.randrange(bits)
        last[bits] = number if rng.random() < 0.3 else last[bits]
        length = rng.randint(0, bits)
        kind = IPv4Network if bits == 32 else IPv6Network
        found[kind((number >> bits - length << bits - length, length))] = None
    return list(map(str, found))


def edges(blocks: list[str]) -> list[Address]:
    """The first and the last address of each block, and their neighbours."""
    numbers: dict[Address, None] = {
        ip_address(text): None for text in ("0.0.0.0", "255.255.255.255", "::", "1::", "ffff::")
    }
    for block in blocks:
        network = ip_network(block)
        kind = type(network.network_address)
        first, last = int(network.network_address), int(network.broadcast_address)
        for number in (first - 1, first, last, last + 1):
            if 0 <= number < 1 << network.max_prefixlen:
                numbers[kind(number)] = None
    return [number for number in numbers if not is_mapped(number)]


def is_mapped(address: Address) -> bool:
    """Is it written as IPv6, but means IPv4?"""
    return address.version == 6 and int(address) >> 32 == 0xFFFF


def leaves(blocks: list[str]) -> list[tuple[int, int, int, int]]:
    """The blocks with their classes, as the trie takes them."""
    return [
        (network.version, int(network.network_address), network.prefixlen, cls)
        for cls, network in enumerate(map(ip_network, blocks), 1)
    ]


def longest(blocks: list[str], addresses: list[Address]) -> dict[Address, int]:
    """For each address the class of the longest block that contains it; 0 without one."""
    ranges = sorted(
        (network.prefixlen, cls, network.version, int(network[0]), int(network[-1]))
        for cls, network in enumerate(map(ip_network, blocks), 1)
    )
    return {
        address: next(
            (
                cls
                for _, cls, version, first, last in reversed(ranges)
                if version == address.version and first <= int(address) <= last
            ),
            0,
        )
        for address in addresses
    }
