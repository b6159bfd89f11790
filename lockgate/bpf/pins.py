"""Names of pinned maps, and reading those of other versions.

A map is pinned as NAME-VERSION (a bpffs takes no dots), where the version is a hash of what
its records look like: programs of another layout never find it, and both may exist side by
side while one takes over from the other. What the agent publishes is read together, so it has
one version together; what the programs remember has one per map, and goes on whenever it can.

The layout of another version's records is in the BTF that the kernel keeps with its maps.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from . import syscall
from .btf import BtfError, MapType, Schema

__all__ = [
    "PUBLISHED",
    "TOGETHER",
    "OtherPin",
    "convert",
    "map_version",
    "node_folder",
    "other_pins",
    "pin_names",
    "ring_record",
    "schema_of",
]

PUBLISHED = (
    "state",
    "ids",
    "images",
    "peers",
    "endpoints",
    "services",
    "service_backends",
    "hops",
    "routes",
    "link_roles",
    "peer_bits",
    "frontend_bits",
)
"""Maps that only the agent writes."""

TOGETHER = (PUBLISHED, ("flows", "flow_tags"))
"""Maps of which none means anything without the others."""

_RECORDS = {"events": "event", "events_raw": "event_raw"}
_ARRAYS = (syscall.MapType.ARRAY, syscall.MapType.PERCPU_ARRAY)
_DIGITS = 8


@dataclass(frozen=True, slots=True)
class OtherPin:
    """A pinned map of another version; `version` is "" for pins from before there were any."""

    path: Path
    name: str
    version: str


def node_folder(bpffs: Path | str, cluster: str, node: str) -> Path:
    """Where a node's maps are pinned, its links in `links` below. A bpffs refuses names with dots
    (bpf_lookup in kernel/bpf/inode.c), which names of nodes may have; underscores they have none.
    """
    return Path(bpffs, "lockgate", cluster, node.replace(".", "_"))


def pin_names(schema: Schema) -> dict[str, str]:
    """Map → the name of its pin, for all maps of an object."""
    layouts = {name: _layout(schema, name) for name in schema.maps}
    for group in TOGETHER:
        members = [f"{name} {layouts[name]}" for name in group if name in layouts]
        if not members:
            continue
        meaning = schema.enum("format")["FORMAT_PUBLISHED"] if group is PUBLISHED else 0
        together = "\n".join([*members, str(meaning)])
        layouts |= {name: together for name in group if name in layouts}
    return {name: f"{name}-{_hash(layout)}" for name, layout in layouts.items()}


def map_version(schema: Schema, name: str) -> str:
    """The version of one map that stands for itself."""
    return _hash(_layout(schema, name))


def other_pins(directory: Path, names: dict[str, str]) -> list[OtherPin]:
    """Maps that are pinned in `directory` under other versions than those of `names`."""
    mine = set(names.values())
    found = []
    for path in sorted(directory.iterdir()):
        if path.name not in mine and path.is_file():
            name, _, version = path.name.partition("-")
            found.append(OtherPin(path, name, version))
    return found


def schema_of(fd: int) -> Schema | None:
    """The types that the maker of a map knew, all of its object; None for a map without."""
    info = syscall.map_info(fd)
    if not info.btf_id:
        return None
    return Schema(syscall.btf_by_id(info.btf_id), {}, f"map {info.name}")


def ring_record(ring: OtherPin) -> np.dtype[Any] | None:
    """The records of another version's ring. A ring has no types of its own: they are those of
    another map's maker for whom a ring has this version. None if no such map is left."""
    for schema in _schemas(ring.path.parent):
        try:
            if _hash(_layout(schema, ring.name)) == ring.version:
                return schema.dtype(_RECORDS[ring.name])
        except (BtfError, KeyError):
            continue
    return None


def convert(records: npt.NDArray[Any], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Records with the fields that have the same name in both, by value; others are 0. Numbers
    that do not fit are cut off; of arrays, as many elements as both have."""
    if records.dtype == dtype:
        return records
    base, shape = dtype.subdtype if dtype.subdtype is not None else (dtype, ())
    made = np.zeros((len(records), *shape), base)
    _fill(made, records)
    return made


# ---- Inside --------------------------------------------------------------------


def _fill(to: npt.NDArray[Any], of: npt.NDArray[Any]) -> None:
    if to.ndim != of.ndim or (to.dtype.names is None) != (of.dtype.names is None):
        return
    common = tuple(slice(min(a, b)) for a, b in zip(to.shape, of.shape, strict=True))
    to, of = to[common], of[common]
    if to.dtype.names is not None and of.dtype.names is not None:
        for name in to.dtype.names:
            if name in of.dtype.names:
                _fill(to[name], of[name])
    elif to.dtype.kind != "V" or to.dtype == of.dtype:
        to[...] = of.astype(to.dtype, casting="unsafe")


def _schemas(directory: Path) -> Iterator[Schema]:
    seen = set()
    for path in sorted(directory.iterdir()):
        if not path.is_file():
            continue
        try:
            fd = syscall.obj_get(str(path))
        except OSError:
            continue
        try:
            number = syscall.map_info(fd).btf_id
            if number not in seen and (schema := schema_of(fd)) is not None:
                yield schema
            seen.add(number)
        except (OSError, BtfError):
            continue
        finally:
            os.close(fd)


def _layout(schema: Schema, name: str) -> str:
    made: MapType = schema.map(name)
    # Sizes of tables are settings; an array's is what its indices mean.
    size = made.max_entries if made.type in _ARRAYS else 0
    parts = [str(made.type), str(made.flags), str(size), _text(made.key), _text(made.value)]
    if name in _RECORDS:
        parts.append(_text(schema.dtype(_RECORDS[name])))
    return " ".join(parts)


def _text(dtype: np.dtype[Any] | None) -> str:
    if dtype is None:
        return "-"
    if dtype.subdtype is not None:
        base, shape = dtype.subdtype
        return f"{_text(base)}{list(shape)}"
    if dtype.fields is None or dtype.names is None:
        return dtype.str
    fields = (f"{n}@{dtype.fields[n][1]}:{_text(dtype.fields[n][0])}" for n in dtype.names)
    return f"{{{' '.join(fields)}}}{dtype.itemsize}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:_DIGITS]
