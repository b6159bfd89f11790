"""BTF of a compiled object → numpy dtypes and enumerators.

Reads the `.BTF` section of an ELF file: nothing but `struct`, no tool. So the C
header stays the only schema, and a field that moves in C moves in Python.
Format: Documentation/bpf/btf.rst of the kernel.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["BtfError", "MapType", "Schema", "Variable"]

INT, PTR, ARRAY, STRUCT, UNION, ENUM, FWD, TYPEDEF, VOLATILE, CONST, RESTRICT = range(1, 12)
FUNC, FUNC_PROTO, VAR, DATASEC, FLOAT, DECL_TAG, TYPE_TAG, ENUM64 = range(12, 20)

_ALIASES = (TYPEDEF, VOLATILE, CONST, RESTRICT, TYPE_TAG)
_EXTRA = {INT: 4, ARRAY: 12, VAR: 4, DECL_TAG: 4}
_PER_MEMBER = {STRUCT: 12, UNION: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, ENUM64: 12}
_BIG_ENDIAN = {"__be16": ">u2", "__be32": ">u4", "__be64": ">u8"}
_INT_SIGNED = 1


class BtfError(Exception):
    """The object has no (or damaged) BTF, or not the type that was asked for."""


@dataclass(frozen=True, slots=True)
class Variable:
    """A global variable: its section, and offset and size in bytes there."""

    name: str
    section: str
    offset: int
    size: int
    dtype: np.dtype[Any]


@dataclass(frozen=True, slots=True)
class MapType:
    """A map as C declares it; `key` and `value` are None where C gives no type."""

    type: int
    flags: int
    max_entries: int
    key: np.dtype[Any] | None
    value: np.dtype[Any] | None


@dataclass(slots=True)
class _Type:
    kind: int
    name: str
    vlen: int
    kind_flag: bool
    value: int  # size or type, by kind
    extra: bytes


class Schema:
    """Types of one object by the names they have in C.

    `dtype` and `enum` raise BtfError when no such type is in the object: clang emits
    only types that a variable, a map or a function uses.
    """

    def __init__(self, raw: bytes, variables: dict[str, tuple[str, int, int]], source: str) -> None:
        """`raw` is the content of .BTF; `variables` maps symbols to (section, offset, size)."""
        self._source = source
        self._symbols = variables
        self._types: list[_Type] = [_Type(0, "void", 0, False, 0, b"")]
        self._dtypes: dict[int, np.dtype[Any]] = {}
        try:
            self._parse(raw)
        except (struct.error, ValueError) as error:
            raise BtfError(f"{source}: the .BTF section is damaged: {error}") from error
        self._by_name: dict[tuple[int, str], int] = {}
        for number, type_ in enumerate(self._types):
            if type_.name:
                self._by_name.setdefault((type_.kind, type_.name), number)

    @classmethod
    def from_object(cls, path: str | os.PathLike[str]) -> Schema:
        """Read an object that clang built with -g. BtfError if it is none."""
        raw = Path(path).read_bytes()
        try:
            sections, symbols = _read_elf(raw)
        except (struct.error, ValueError, IndexError) as error:
            raise BtfError(f"{path}: not a 64-bit little-endian ELF object ({error})") from error
        if ".BTF" not in sections:
            raise BtfError(f"{path}: no .BTF section; compile with clang -g -target bpf")
        return cls(sections[".BTF"], symbols, str(path))

    def dtype(self, name: str) -> np.dtype[Any]:
        """numpy dtype of `struct name` (or the typedef or integer `name`), padding and all:
        `itemsize` is sizeof. __be16/32/64 are big-endian; `struct addr` is ('u1', 16)."""
        for kind in (STRUCT, TYPEDEF, INT):
            number = self._by_name.get((kind, name))
            if number is not None:
                return self._dtype(number)
        raise BtfError(f"{self._source}: no struct {name} in the BTF; does anything use it?")

    def enum(self, name: str) -> dict[str, int]:
        """Enumerators of `enum name` → values, in the order of the source."""
        for kind in (ENUM, ENUM64):
            number = self._by_name.get((kind, name))
            if number is not None:
                return self._enumerators(self._types[number])
        raise BtfError(f"{self._source}: no enum {name} in the BTF; does anything use it?")

    @property
    def structs(self) -> list[str]:
        """Names of all structs."""
        return [name for kind, name in self._by_name if kind == STRUCT]

    @property
    def enums(self) -> list[str]:
        """Names of all enums."""
        return [name for kind, name in self._by_name if kind in (ENUM, ENUM64)]

    def variable(self, name: str) -> Variable:
        """The global variable `name`. BtfError if the object defines none."""
        number = self._by_name.get((VAR, name))
        if number is None or name not in self._symbols:
            raise BtfError(f"{self._source}: no global variable {name}")
        section, offset, size = self._symbols[name]
        return Variable(name, section, offset, size, self._dtype(self._types[number].value))

    @property
    def maps(self) -> list[str]:
        """Names of the maps (section .maps)."""
        section = self._by_name.get((DATASEC, ".maps"))
        if section is None:
            return []
        members = struct.iter_unpack("<III", self._types[section].extra)
        return [self._types[number].name for number, _offset, _size in members]

    def map(self, name: str) -> MapType:
        """How C declares map `name`; what holds other maps has the value of those. BtfError if
        there is none."""
        number = self._by_name.get((VAR, name))
        if number is None or name not in self.maps:
            raise BtfError(f"{self._source}: no map {name}")
        return self._map(self._types[number].value)

    def variables(self, section: str) -> list[str]:
        """Names of the global variables in `section` (".rodata")."""
        return [
            name
            for kind, name in self._by_name
            if kind == VAR and self._symbols.get(name, ("",))[0] == section
        ]

    # ---- Inside ------------------------------------------------------------------

    def _map(self, number: int) -> MapType:
        """libbpf's convention: members are pointers, to the type that is meant or to an array
        with as many elements as the number says; __array is an array of pointers."""
        fields = {
            self._string(at): self._types[member]
            for at, member, _ in struct.iter_unpack("<III", self._types[number].extra)
        }

        def count(field: str) -> int:
            if field not in fields:
                return 0
            length: int = struct.unpack("<III", self._types[fields[field].value].extra)[2]
            return length

        def of(field: str) -> np.dtype[Any] | None:
            return self._dtype(fields[field].value) if field in fields else None

        value = of("value")
        if "values" in fields:
            pointer = struct.unpack("<III", fields["values"].extra)[0]
            value = self._map(self._types[pointer].value).value
        return MapType(count("type"), count("map_flags"), count("max_entries"), of("key"), value)

    def _parse(self, raw: bytes) -> None:
        magic, _version, _flags, header, type_off, type_len, str_off, str_len = struct.unpack_from(
            "<HBBIIIII", raw
        )
        if magic != 0xEB9F:
            raise ValueError("wrong magic")
        strings = raw[header + str_off : header + str_off + str_len]
        position, end = header + type_off, header + type_off + type_len
        while position < end:
            name_off, info, value = struct.unpack_from("<III", raw, position)
            position += 12
            kind, vlen = info >> 24 & 0x1F, info & 0xFFFF
            if not INT <= kind <= ENUM64:
                raise ValueError(f"kind {kind} is not known")
            length = _EXTRA.get(kind, 0) + _PER_MEMBER.get(kind, 0) * vlen
            name = strings[name_off : strings.index(b"\0", name_off)].decode()
            extra = raw[position : position + length]
            self._types.append(_Type(kind, name, vlen, bool(info >> 31), value, extra))
            position += length
        self._strings = strings

    def _string(self, offset: int) -> str:
        return self._strings[offset : self._strings.index(b"\0", offset)].decode()

    def _enumerators(self, type_: _Type) -> dict[str, int]:
        if type_.kind == ENUM:
            form = "<Ii" if type_.kind_flag else "<II"
            return {self._string(n): v for n, v in struct.iter_unpack(form, type_.extra)}
        return {
            self._string(n): _signed64(low | high << 32) if type_.kind_flag else low | high << 32
            for n, low, high in struct.iter_unpack("<III", type_.extra)
        }

    def _dtype(self, number: int) -> np.dtype[Any]:
        if number not in self._dtypes:
            self._dtypes[number] = self._make(self._types[number])
        return self._dtypes[number]

    def _make(self, type_: _Type) -> np.dtype[Any]:
        if type_.kind == TYPEDEF and type_.name in _BIG_ENDIAN:
            return np.dtype(_BIG_ENDIAN[type_.name])
        if type_.kind in _ALIASES:
            return self._dtype(type_.value)
        if type_.kind == INT:
            encoding = struct.unpack("<I", type_.extra)[0] >> 24
            return np.dtype(f"<{'i' if encoding & _INT_SIGNED else 'u'}{type_.value}")
        if type_.kind in (ENUM, ENUM64):
            return np.dtype(f"<{'i' if type_.kind_flag else 'u'}{type_.value}")
        if type_.kind == PTR:
            return np.dtype("<u8")
        if type_.kind == ARRAY:
            element, _index, count = struct.unpack("<III", type_.extra)
            return np.dtype((self._dtype(element), (count,)))
        if type_.kind == STRUCT:
            return self._make_struct(type_)
        # Unions and the like have no numpy counterpart: keep their bytes.
        return np.dtype((np.void, type_.value))

    def _make_struct(self, type_: _Type) -> np.dtype[Any]:
        members = list(struct.iter_unpack("<III", type_.extra))
        names = [self._string(name) for name, _, _ in members]
        # A struct that only wraps bytes (struct addr) is those bytes.
        if len(members) == 1 and members[0][2] == 0:
            only = self._dtype(members[0][1])
            if only.subdtype is not None and only.subdtype[0] == np.dtype("u1"):
                return only
        offsets = []
        for name, (_, _, place) in zip(names, members, strict=True):
            if type_.kind_flag and place >> 24:
                raise BtfError(f"{self._source}: struct {type_.name}.{name} is a bit-field")
            offsets.append((place & 0xFFFFFF if type_.kind_flag else place) // 8)
        return np.dtype(
            {
                "names": [name or f"_{i}" for i, name in enumerate(names)],
                "formats": [self._dtype(member) for _, member, _ in members],
                "offsets": offsets,
                "itemsize": type_.value,
            }
        )


def _signed64(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _read_elf(raw: bytes) -> tuple[dict[str, bytes], dict[str, tuple[str, int, int]]]:
    """Sections by name; symbols of objects by name as (section, offset, size)."""
    if raw[:6] != b"\x7fELF\x02\x01":
        raise ValueError("wrong magic")
    (table,) = struct.unpack_from("<Q", raw, 0x28)
    entry, count, names_at = struct.unpack_from("<HHH", raw, 0x3A)
    headers = [struct.unpack_from("<IIQQQQIIQQ", raw, table + i * entry) for i in range(count)]

    def content(i: int) -> bytes:
        no_bits = 8
        offset, size = headers[i][4], headers[i][5]
        return b"" if headers[i][1] == no_bits else raw[offset : offset + size]

    def text(strings: bytes, offset: int) -> str:
        return strings[offset : strings.index(b"\0", offset)].decode()

    names = content(names_at)
    titles = [text(names, header[0]) for header in headers]
    symbols: dict[str, tuple[str, int, int]] = {}
    symtab, stt_object = 2, 1
    for i, header in enumerate(headers):
        if header[1] != symtab:
            continue
        strings = content(header[6])
        for name, info, _other, section, value, size in struct.iter_unpack("<IBBHQQ", content(i)):
            if info & 0xF == stt_object and 0 < section < count:
                symbols[text(strings, name)] = (titles[section], value, size)
    return {title: content(i) for i, title in enumerate(titles)}, symbols
