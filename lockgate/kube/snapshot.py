"""The objects as last seen, on disk: what an agent starts with when there is no API server.

A file of MessagePack values: a head, then lists of at most a thousand objects of one kind, so
that neither side ever holds the whole encoded. It is replaced whole (written beside, synced,
renamed).
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lockgate.kube.kinds import KINDS
from lockgate.objects import model

__all__ = ["Tables", "load", "save"]

#: Kind → objects by key.
Tables = Mapping[str, Mapping[Any, Any]]

_FORMAT = "lockgate-snapshot-1"
_CHUNK = 1000
_LENGTH = 4
_LISTS: dict[str, Any] = {
    "Namespace": list[model.Namespace],
    "Node": list[model.Node],
    "Pod": list[model.Pod],
    "Service": list[model.Service],
    "EndpointSlice": list[model.EndpointSlice],
    "NetworkPolicy": list[model.NetworkPolicy],
    "ServiceCIDR": list[model.ServiceCIDR],
    "Firewall": list[model.Firewall],
}


class _Head(msgspec.Struct):
    format: str
    time: float


class _Chunk(msgspec.Struct, array_like=True):
    kind: str
    objects: Any


class _RawChunk(msgspec.Struct, array_like=True):
    kind: str
    objects: msgspec.Raw


def save(path: Path, tables: dict[str, list[Any]]) -> int:
    """Write all; the size of the file. OSError leaves the former file as it was."""
    encode = msgspec.msgpack.encode
    beside = path.with_suffix(".new")
    fd = os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    with open(fd, "wb") as file:

        def write(value: object) -> None:
            data = encode(value)
            file.write(len(data).to_bytes(_LENGTH, "little") + data)

        write(_Head(_FORMAT, time.time()))
        for kind, objects in tables.items():
            for at in range(0, len(objects), _CHUNK):
                write(_Chunk(kind, objects[at : at + _CHUNK]))
        write(_Chunk("", None))
        file.flush()
        os.fsync(file.fileno())
        size = file.tell()
    os.replace(beside, path)
    return size


def load(path: Path) -> tuple[float, dict[str, dict[Any, Any]]] | None:
    """When it was written (Unix time), and the tables; None if there is none that is whole."""
    tables: dict[str, dict[Any, Any]] = {kind.name: {} for kind in KINDS}
    keys = {kind.name: kind.key for kind in KINDS}
    try:
        with open(path, "rb") as file:

            def read() -> bytes:
                return file.read(int.from_bytes(file.read(_LENGTH), "little"))

            head = msgspec.msgpack.decode(read(), type=_Head)
            if head.format != _FORMAT:
                return None
            while (chunk := msgspec.msgpack.decode(read(), type=_RawChunk)).kind:
                key, table = keys[chunk.kind], tables[chunk.kind]
                objects: Any = _LISTS[chunk.kind]
                for item in msgspec.msgpack.decode(chunk.objects, type=objects):
                    table[key(item.metadata.namespace, item.metadata.name)] = item
    except (OSError, msgspec.MsgspecError, KeyError):
        return None
    return head.time, tables
