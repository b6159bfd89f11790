"""First packets of connections, as frames: what a pod's stack would send.

Ethernet, then IPv4 (RFC 791) or IPv6 (RFC 8200), then a TCP SYN (RFC 9293), an empty UDP
datagram (RFC 768), an SCTP INIT (RFC 9260) or an ICMP echo request (RFC 792, RFC 4443), with
right checksums.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cache

from lockgate.objects.address import is_ipv4

__all__ = ["PROTOCOLS", "SOURCE_PORT", "Ends", "addresses_of", "ends_of", "first_packet"]

PROTOCOLS = ("TCP", "UDP", "SCTP", "ICMP")
SOURCE_PORT = 40000
TCP, UDP, SCTP, ICMP, ICMPV6 = 6, 17, 132, 1, 58
_CRC32C = 0x82F63B78  # reflected Castagnoli polynomial, RFC 9260 appendix A
_SYN_OPTIONS = bytes.fromhex("020405b40402")  # MSS 1460, SACK permitted
_SYN_OPTIONS += b"\1\1"  # padding


def first_packet(
    source: bytes,
    destination: bytes,
    protocol: str,
    port: int | None,
    *,
    source_mac: bytes = b"\x02\0\0\0\0\1",
    destination_mac: bytes = b"\x02\0\0\0\0\2",
    source_port: int = SOURCE_PORT,
    begins: bool = True,
) -> bytes:
    """The frame. Addresses are 16 bytes in network order (`parse_address`), MACs 6 bytes. Not
    `begins`: of TCP a segment from the midst of a connection.

    ValueError for an unknown protocol, a port missing, or two families.
    """
    ipv4 = is_ipv4(source)
    if ipv4 != is_ipv4(destination):
        raise ValueError("source and destination are of different families")
    src, dst = (source[12:], destination[12:]) if ipv4 else (source, destination)
    number, payload = _transport(protocol, port, source_port, src, dst, begins)
    link = destination_mac + source_mac
    if not ipv4:
        head = struct.pack("!IHBB", 0x6000_0000, len(payload), number, 64)
        return link + b"\x86\xdd" + head + src + dst + payload
    head = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 1, 0x4000, 64, number, 0)
    check = _checksum(head + src + dst)
    return link + b"\x08\0" + head[:10] + check.to_bytes(2, "big") + src + dst + payload


def addresses_of(frame: bytes) -> tuple[bytes, bytes]:
    """Source and destination of an IPv4 or IPv6 frame, 16 bytes each."""
    if frame[12:14] == b"\x86\xdd":
        return frame[22:38], frame[38:54]
    mapped = bytes(10) + b"\xff\xff"
    return mapped + frame[26:30], mapped + frame[30:34]


@dataclass(frozen=True, slots=True)
class Ends:
    """Addresses of 16 bytes, and ports where the protocol has them, else 0. `outer`: source and
    destination of a header of the same family around it (RFC 2003, RFC 2473)."""

    source: bytes
    destination: bytes
    sport: int = 0
    dport: int = 0
    outer: tuple[bytes, bytes] | None = None


def ends_of(frame: bytes) -> Ends:
    """Of an IPv4 or IPv6 frame without IPv4 options or IPv6 extension headers."""
    six = frame[12:14] == b"\x86\xdd"
    size, inside, at = (40, 41, 6) if six else (20, 4, 9)
    outer = None
    number = frame[14 + at]
    if number == inside:
        outer = addresses_of(frame)
        frame = frame[:14] + frame[14 + size :]
        number = frame[14 + at]
    source, destination = addresses_of(frame)
    sport = dport = 0
    if number in (TCP, UDP, SCTP):
        sport, dport = struct.unpack_from("!HH", frame, 14 + size)
    return Ends(source, destination, sport, dport, outer)


def _transport(
    protocol: str, port: int | None, source_port: int, src: bytes, dst: bytes, begins: bool
) -> tuple[int, bytes]:
    if protocol == "ICMP":
        kind, number = (8, ICMP) if len(src) == 4 else (128, ICMPV6)
        echo = struct.pack("!BBHHH", kind, 0, 0, source_port, 1) + bytes(8)
        covered = echo if len(src) == 4 else _pseudo(src, dst, number, len(echo)) + echo
        return number, echo[:2] + _checksum(covered).to_bytes(2, "big") + echo[4:]
    if port is None:
        raise ValueError(f"{protocol} needs a port")
    if protocol == "TCP":
        options, flags = (_SYN_OPTIONS, 2) if begins else (b"", 16)
        words = (20 + len(options)) // 4
        segment = struct.pack("!HHIIBBHHH", source_port, port, 1, 0, words << 4, flags, 64240, 0, 0)
        segment += options
        check = _checksum(_pseudo(src, dst, TCP, len(segment)) + segment)
        return TCP, segment[:16] + check.to_bytes(2, "big") + segment[18:]
    if protocol == "UDP":
        datagram = struct.pack("!HHHH", source_port, port, 8, 0)
        check = _checksum(_pseudo(src, dst, UDP, 8) + datagram) or 0xFFFF
        return UDP, datagram[:6] + check.to_bytes(2, "big")
    if protocol == "SCTP":
        init = struct.pack("!BBHIIHHI", 1, 0, 20, 1, 65535, 1, 1, 1)
        packet = struct.pack("!HHII", source_port, port, 0, 0) + init
        return SCTP, packet[:8] + _crc32c(packet).to_bytes(4, "little") + packet[12:]
    raise ValueError(f"{protocol} is not one of {', '.join(PROTOCOLS)}")


def _pseudo(src: bytes, dst: bytes, number: int, length: int) -> bytes:
    """The pseudo-header; the sum of IPv4's and IPv6's forms is computed alike."""
    return src + dst + struct.pack("!II", length, number)


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    if len(data) % 2:
        data += b"\0"
    total = int(sum(struct.unpack(f"!{len(data) // 2}H", data)))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total ^ 0xFFFF


@cache
def _crc_table() -> tuple[int, ...]:
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (_CRC32C if value & 1 else 0)
        table.append(value)
    return tuple(table)


def _crc32c(data: bytes) -> int:
    table, value = _crc_table(), 0xFFFFFFFF
    for byte in data:
        value = table[(value ^ byte) & 0xFF] ^ value >> 8
    return value ^ 0xFFFFFFFF
