"""Rules of others that drop packets: nftables (and iptables over it), and iptables' old tables.

Read over netlink (include/uapi/linux/netfilter/nf_tables.h) and by getsockopt
(linux/netfilter_ipv4/ip_tables.h), so no program is needed for it. Only read; of the calling
thread's network namespace.
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from lockgate.net.dumps import ATTRIBUTE, ask

__all__ = ["Chain", "Drop", "drops", "legacy_drops", "nft_chains", "reached"]

_NETLINK_NETFILTER = 12
_GETCHAIN, _GETRULE = 10 << 8 | 4, 10 << 8 | 7  # NFNL_SUBSYS_NFTABLES
_DUMP = 0x301
_FAMILIES = {1: "inet", 2: "ip", 3: "arp", 5: "netdev", 7: "bridge", 10: "ip6"}
_HOOKS = ("prerouting", "input", "forward", "output", "postrouting")
_NETDEV_HOOKS = ("ingress", "egress")
_DROP, _JUMP, _GOTO = 0, 0xFFFFFFFD, 0xFFFFFFFC  # verdict codes


@dataclass(frozen=True, slots=True)
class Drop:
    """A rule, or (rule 0) a chain's policy, that drops or rejects; `conditional`: unless it is
    for all packets that come there."""

    chain: str  # "inet filter input"
    hook: str  # input, output, forward, …; netdev's: ingress, egress
    rule: int  # handle, as `nft -a list ruleset` shows it; position in an old table
    conditional: bool


@dataclass(slots=True)
class Chain:
    """A chain: its hook if it is a base chain, what it jumps to, the rules that drop."""

    name: tuple[str, str, str]  # family, table, chain
    hook: str = ""
    policy_drop: bool = False
    conditional: bool = False  # some packets leave it before its end
    jumps: list[str] = field(default_factory=list)
    drops: list[tuple[int, bool]] = field(default_factory=list)  # handle, conditional


def drops() -> list[Drop]:
    """All that drops, wherever packets get to it by jumps; maps of verdicts are not followed."""
    return [*reached(nft_chains()), *legacy_drops()]


def reached(chains: list[Chain]) -> list[Drop]:
    """Pure: the drops of base chains and of what they jump to."""
    known = {chain.name: chain for chain in chains}
    found: dict[Drop, None] = {}
    for base in chains:
        if not base.hook:
            continue
        seen, waiting = set(), [base.name]
        while waiting:
            name = waiting.pop()
            chain = known.get(name)
            if chain is None or name in seen:
                continue
            seen.add(name)
            waiting += [(name[0], name[1], target) for target in chain.jumps]
            for rule, conditional in chain.drops:
                found[Drop(" ".join(name), base.hook, rule, conditional or chain is not base)] = (
                    None
                )
        if base.policy_drop:
            found[Drop(" ".join(base.name), base.hook, 0, base.conditional)] = None
    return list(found)


def nft_chains() -> list[Chain]:
    """All chains of all families; none when the kernel has no nftables, or we may not ask."""
    chains: dict[tuple[str, str, str], Chain] = {}
    try:
        for family, own in _ask(_GETCHAIN):
            name = (family, _text(own.get(1)), _text(own.get(3)))
            chain = chains[name] = Chain(name)
            if 4 in own:
                number = _be32(_attributes(own[4]).get(1))
                hooks = _NETDEV_HOOKS if family == "netdev" else _HOOKS
                chain.hook = hooks[number] if number < len(hooks) else "?"
                chain.policy_drop = 5 in own and _be32(own[5]) == 0
        for family, own in _ask(_GETRULE):
            found = chains.get((family, _text(own.get(1)), _text(own.get(2))))
            if found is not None:
                _rule(found, own)
    except OSError:
        return []
    return list(chains.values())


def _rule(chain: Chain, own: dict[int, bytes]) -> None:
    handle = int.from_bytes(own.get(3, b""), "big")
    conditional = False
    for body in _elements(own.get(4, b"")):
        expression = _attributes(body)
        name, data = _text(expression.get(1)), _attributes(expression.get(2, b""))
        if name == "immediate":
            verdict = _attributes(_attributes(data.get(2, b"")).get(2, b""))
            if 1 not in verdict:
                continue
            code = _be32(verdict[1])
            chain.conditional = True
            if code == _DROP:
                chain.drops.append((handle, conditional))
            elif code in (_JUMP, _GOTO):
                chain.jumps.append(_text(verdict.get(2)))
        elif name == "reject" or (name == "target" and _text(data.get(1)) == "REJECT"):
            chain.drops.append((handle, conditional))
        elif name not in ("counter", "log", "limit"):
            conditional = True


# ---- Netlink -----------------------------------------------------------------------


def _ask(request: int) -> Iterator[tuple[str, dict[int, bytes]]]:
    """Family and attributes of each object."""
    any_family = bytes(4)  # struct nfgenmsg
    for body in ask(request, _DUMP, any_family, _NETLINK_NETFILTER, "nftables"):
        yield _FAMILIES.get(body[0], str(body[0])), _attributes(body[4:])


def _attributes(body: bytes) -> dict[int, bytes]:
    return dict(_each(body))


def _elements(body: bytes) -> list[bytes]:
    return [value for _, value in _each(body)]


def _each(body: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + ATTRIBUTE.size <= len(body):
        length, type_ = ATTRIBUTE.unpack_from(body, at)
        if length < ATTRIBUTE.size:
            return
        yield type_ & 0x3FFF, body[at + ATTRIBUTE.size : at + length]
        at += length + 3 & ~3


def _text(value: bytes | None) -> str:
    return (value or b"").rstrip(b"\0").decode(errors="replace")


def _be32(value: bytes | None) -> int:
    return int.from_bytes(value or b"", "big")


# ---- iptables' old tables ------------------------------------------------------------

_GET_INFO, _GET_ENTRIES = 64, 65  # IPT_SO_GET_INFO, IPT_SO_GET_ENTRIES
_INFO = struct.Struct("=32sI5I5III")  # name, valid_hooks, hook_entry, underflow, count, size
_XT_DROP = -1  # -NF_DROP - 1


@dataclass(frozen=True, slots=True)
class _Layout:
    """struct ipt_entry and ip6t_entry: size, and where the target's offset is."""

    level: int
    family: int
    names: str
    size: int
    offsets: int


_LAYOUTS = (
    _Layout(socket.IPPROTO_IP, socket.AF_INET, "ip_tables_names", 112, 88),
    _Layout(socket.IPPROTO_IPV6, socket.AF_INET6, "ip6_tables_names", 168, 140),
)


def legacy_drops() -> list[Drop]:
    """Those of tables that iptables-legacy made; none where it made no table."""
    found = []
    for layout in _LAYOUTS:
        try:
            tables = Path("/proc/self/net", layout.names).read_text().split()
        except OSError:
            continue
        for table in tables:
            try:
                found += _table(layout, table)
            except OSError:
                continue
    return found


def _table(layout: _Layout, table: str) -> list[Drop]:
    name = table.encode().ljust(32, b"\0")
    with socket.socket(layout.family, socket.SOCK_RAW, socket.IPPROTO_RAW) as sock:
        info = _get(sock.fileno(), layout.level, _GET_INFO, name.ljust(_INFO.size, b"\0"))
        _, _, *numbers = _INFO.unpack(info)
        hooks, underflows, size = numbers[:5], numbers[5:10], numbers[11]
        asked = name + struct.pack("=I4x", size) + bytes(size)
        blob = _get(sock.fileno(), layout.level, _GET_ENTRIES, asked)[40:]
    family = "ip" if layout.family == socket.AF_INET else "ip6"
    return entries(blob, layout, f"{family} {table}", hooks, underflows)


def entries(
    blob: bytes, layout: _Layout, title: str, hooks: list[int], underflows: list[int]
) -> list[Drop]:
    """Pure: the rules that drop. Chains of users come after the last hook's, hook "?"."""
    found, at, position = [], 0, 0
    blank = bytes(layout.offsets - 4)
    while at + layout.size <= len(blob):
        target, following = struct.unpack_from("=HH", blob, at + layout.offsets)
        name = blob[at + target + 2 : at + target + 31].partition(b"\0")[0]
        verdict = struct.unpack_from("=i", blob, at + target + 32)[0] if not name else 0
        position += 1
        if verdict == _XT_DROP or name == b"REJECT":
            hook = next((h for h, end in enumerate(underflows) if hooks[h] <= at <= end), None)
            conditional = target > layout.size or blob[at : at + len(blank)] != blank
            policy = hook is not None and at == underflows[hook]
            where = "?" if hook is None else _HOOKS[hook]
            found.append(
                Drop(f"{title} {where.upper()}", where, 0 if policy else position, conditional)
            )
        if not following:
            break
        at += following
    return found


def _get(fd: int, level: int, option: int, value: bytes) -> bytes:
    """getsockopt(2) that reads what it is given: Python's does not pass it."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    buffer = ctypes.create_string_buffer(value, len(value))
    length = ctypes.c_uint32(len(value))
    if libc.getsockopt(fd, level, option, buffer, ctypes.byref(length)):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return buffer.raw[: length.value]
