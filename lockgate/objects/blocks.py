"""Many CIDR blocks at once, from text; `address` is for one."""

from __future__ import annotations

import re
from collections.abc import Iterable
from ipaddress import AddressValueError, IPv6Address

__all__ = ["pack_cidrs"]

_MAPPED = bytes(10) + b"\xff\xff"
_NUMBER = "(0|[1-9][0-9]{0,2})"
_V4 = re.compile(rf"{_NUMBER}\.{_NUMBER}\.{_NUMBER}\.{_NUMBER}(?:/(0|[1-9][0-9]?))?")
_V6 = re.compile(r"([0-9a-fA-F:.]+)(?:/(0|[1-9][0-9]{0,2}))?")


def pack_cidrs(texts: Iterable[str], *, bare: bool = False) -> tuple[bytes, bytes, list[int]]:
    """Many blocks, a million of IPv4 a second: 16 bytes of each, host bits as they are; a byte of
    each with the prefix length out of 128; and the places of texts that are no blocks, which
    have 0 in both. `bare`: an address without a length is the block of it alone."""
    addresses, lengths, bad = bytearray(), bytearray(), list[int]()
    of_four = _V4.fullmatch
    for place, text in enumerate(texts):
        try:
            found = of_four(text)
            if found is not None:
                a, b, c, d, length = found.groups()
                address = _MAPPED + bytes((int(a), int(b), int(c), int(d)))
                bits = 96 + int(length or 32)
            else:
                address, length = _six(text)
                bits = int(length or 128)
            if bits > 128 or (length is None and not bare):
                raise ValueError
        except ValueError:
            bad.append(place)
            address, bits = bytes(16), 0
        addresses += address
        lengths.append(bits)
    return bytes(addresses), bytes(lengths), bad


def _six(text: str) -> tuple[bytes, str | None]:
    found = _V6.fullmatch(text)
    if found is None or ":" not in text:
        raise ValueError
    try:
        address = IPv6Address(found[1]).packed
    except AddressValueError as error:
        raise ValueError from error
    if address[:12] == _MAPPED:  # its family would be ambiguous
        raise ValueError
    return address, found[2]
