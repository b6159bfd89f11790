"""What commands added to the node's firewall, on disk: a line for each change, the latest last.

Times are of day, so that lifetimes end whatever the machine does in between. A line that a crash
cut short is the end of the file. The file is written anew when most of it is history.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

import msgspec
import numpy as np

from lockgate.compile.firewall import Rule
from lockgate.compile.prefixes import Prefixes
from lockgate.objects.blocks import pack_cidrs
from lockgate.objects.firewall import Range

__all__ = ["Entries", "FirewallLog"]

#: Of each rule and expiry (seconds since the epoch, 0 = never), the prefixes.
Entries = dict[tuple[Rule, float], Prefixes]
_SLACK = 4096


class _Line(msgspec.Struct, omit_defaults=True):
    """`add` or `del`: prefixes, as text."""

    action: str
    ports: list[Range] = []
    rate: int = 0
    expires: float = 0.0
    add: list[str] = []
    delete: list[str] = msgspec.field(name="del", default_factory=list)


class FirewallLog:
    """Opens or makes the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._written = 0  # prefixes in the file
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o640)

    def close(self) -> None:
        """May be called again."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def load(self, now: float) -> Entries:
        """All that has not expired."""
        found: dict[Rule, dict[bytes, float]] = {}
        decode = msgspec.json.Decoder(_Line).decode
        end = 0
        with open(self.path, "rb") as file:
            for raw in file:
                if not raw.endswith(b"\n"):
                    break
                end += len(raw)
                with contextlib.suppress(msgspec.MsgspecError):
                    line = decode(raw)
                    self._written += len(line.add) + len(line.delete)
                    _take(found.setdefault(_rule(line), {}), line)
        os.ftruncate(self._fd, end)
        entries: dict[tuple[Rule, float], list[bytes]] = {}
        for rule, keys in found.items():
            for key, expires in keys.items():
                if not 0 < expires <= now:
                    entries.setdefault((rule, expires), []).append(key)
        return {one: _prefixes(keys) for one, keys in entries.items()}

    def added(self, rule: Rule, prefixes: Iterable[str], expires: float) -> None:
        """Before it is in force. OSError: it is not in the file."""
        self._write([_line(rule, expires, add=list(prefixes))])

    def deleted(self, changes: Iterable[tuple[Rule, list[str]]]) -> None:
        self._write([_line(rule, 0.0, delete=texts) for rule, texts in changes])

    def overgrown(self, entries: int) -> bool:
        """Is most of the file history, when there are so many entries?"""
        return self._written > 2 * entries + _SLACK

    def rewrite(self, entries: Entries) -> None:
        """Another file with nothing but these. On OSError the old one stays."""
        fresh = self.path.with_name(self.path.name + ".new")
        fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o640)
        try:
            written = 0
            for (rule, expires), prefixes in entries.items():
                texts = [prefixes.text(place) for place in range(len(prefixes))]
                _write_all(fd, _line(rule, expires, add=texts))
                written += len(texts)
            os.fsync(fd)
            os.rename(fresh, self.path)
        except BaseException:
            os.close(fd)
            raise
        os.close(self._fd)
        self._fd, self._written = fd, written

    # ---- Inside --------------------------------------------------------------------

    def _write(self, lines: list[bytes]) -> None:
        start = os.fstat(self._fd).st_size
        try:
            for line in lines:
                _write_all(self._fd, line)
            os.fdatasync(self._fd)
        except OSError:
            os.ftruncate(self._fd, start)
            raise
        self._written += sum(line.count(b",") for line in lines)


def _take(keys: dict[bytes, float], line: _Line) -> None:
    for texts, expires in ((line.delete, None), (line.add, line.expires)):
        addresses, lengths, _ = pack_cidrs(texts)
        for place in range(len(lengths)):
            key = addresses[16 * place : 16 * place + 16] + lengths[place : place + 1]
            if expires is None:
                keys.pop(key, None)
            else:
                keys[key] = expires


def _prefixes(keys: list[bytes]) -> Prefixes:
    raw = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 17)
    words = np.ascontiguousarray(raw[:, :16]).view(">u8").astype(np.uint64)
    return Prefixes(words[:, 0], words[:, 1], raw[:, 16].copy()).unique()


def _rule(line: _Line) -> Rule:
    action = "deny" if line.action == "deny" else "allow"
    ports = tuple((str(p), int(first), int(last)) for p, first, last in line.ports)
    return Rule("command", action, ports, line.rate)  # type: ignore[arg-type]


def _line(rule: Rule, expires: float, **prefixes: list[str]) -> bytes:
    made = _Line(rule.action, list(rule.ports), rule.rate, expires, **prefixes)
    return msgspec.json.encode(made) + b"\n"


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
