"""Loading a compiled object through libbpf (1.0 or later, by ctypes).

libbpf relocates, creates maps and loads programs. It does not attach: 1.1 does not
know tcx, so `links` does that with raw system calls.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from . import syscall
from .btf import Schema

__all__ = ["LoadError", "Object"]


class LoadError(Exception):
    """The object could not be opened or loaded. The message is one sentence and ends with
    what the verifier said; `log` is everything that libbpf said."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


_PRINT = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
_VERIFIER_LOG = b"BEGIN PROG LOAD LOG"
_MAX_LOG = 17 << 20  # libbpf's largest verifier log is 16 MiB
_LIBBPF_DEBUG = 2

_lock = threading.Lock()
_captured: list[str] = []
_libc = ctypes.CDLL(None)
_lib: ctypes.CDLL | None = None


def _print(level: int, form: bytes, arguments: int) -> int:
    # A va_list parameter is passed as one pointer on x86-64, arm64 and riscv64.
    if level >= _LIBBPF_DEBUG:
        return 0
    size = _MAX_LOG if _VERIFIER_LOG in form else 16384
    buffer = ctypes.create_string_buffer(size)
    _libc.vsnprintf(buffer, ctypes.c_size_t(size), form, ctypes.c_void_p(arguments))
    _captured.append(buffer.value.decode(errors="replace"))
    return 0


_print_callback = _PRINT(_print)  # libbpf keeps the pointer, so we keep the object


def _library() -> ctypes.CDLL:
    global _lib
    if _lib is not None:
        return _lib
    try:
        lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise LoadError("libbpf.so.1 is not installed (Debian and Ubuntu: libbpf1)") from error
    pointer, text, integer = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int
    for name, result, arguments in (
        ("bpf_object__open_file", pointer, [text, pointer]),
        ("bpf_object__load", integer, [pointer]),
        ("bpf_object__close", None, [pointer]),
        ("bpf_object__next_map", pointer, [pointer, pointer]),
        ("bpf_object__next_program", pointer, [pointer, pointer]),
        ("bpf_map__name", text, [pointer]),
        ("bpf_map__fd", integer, [pointer]),
        ("bpf_map__is_internal", ctypes.c_bool, [pointer]),
        ("bpf_map__type", integer, [pointer]),
        ("bpf_map__key_size", ctypes.c_uint32, [pointer]),
        ("bpf_map__value_size", ctypes.c_uint32, [pointer]),
        ("bpf_map__max_entries", ctypes.c_uint32, [pointer]),
        ("bpf_map__map_flags", ctypes.c_uint32, [pointer]),
        ("bpf_map__set_max_entries", integer, [pointer, ctypes.c_uint32]),
        ("bpf_map__set_inner_map_fd", integer, [pointer, integer]),
        ("bpf_map__reuse_fd", integer, [pointer, integer]),
        ("bpf_map__initial_value", pointer, [pointer, ctypes.POINTER(ctypes.c_size_t)]),
        ("bpf_program__name", text, [pointer]),
        ("bpf_program__section_name", text, [pointer]),
        ("bpf_program__fd", integer, [pointer]),
        ("bpf_program__set_autoload", integer, [pointer, ctypes.c_bool]),
        ("libbpf_set_print", pointer, [_PRINT]),
    ):
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    lib.libbpf_set_print(_print_callback)
    _lib = lib
    return lib


@contextlib.contextmanager
def _log() -> Iterator[list[str]]:
    """Collects what libbpf says; its log is one for the process, hence the lock."""
    with _lock:
        _captured.clear()
        yield _captured


class Object:
    """An object file on its way into the kernel.

    Open it, make settings, `load`, take descriptors, close. Descriptors belong to the
    object and close with it; duplicate or pin what shall live on.

        with Object("build/lockgate.bpf.o") as object:
            object.set_rodata({"config_capture": 0})
            object.load()
            fd = object.prog_fd("from_pod")
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Open and parse. LoadError if the file is not there or no BPF object."""
        self.path = os.fspath(path)
        self._lib = _library()
        self._handle: int | None = None
        if not os.path.exists(self.path):
            raise LoadError(f"{self.path} does not exist; build it first (make)")
        self.schema = Schema.from_object(self.path)
        with _log() as log:
            self._handle = self._lib.bpf_object__open_file(self.path.encode(), None)
            text = "".join(log)
        if not self._handle:
            raise LoadError(f"{self.path} is no BPF object: {_last_lines(text, 1)}", text)
        self._maps = {self._map_name(m): m for m in self._each("bpf_object__next_map")}
        self._progs = {
            self._name("bpf_program__name", p): p for p in self._each("bpf_object__next_program")
        }
        self._loaded = False

    def __enter__(self) -> Object:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all descriptors. What is pinned or attached lives on. May be called again."""
        if self._handle:
            self._lib.bpf_object__close(self._handle)
            self._handle = None
            self._maps, self._progs = {}, {}

    @property
    def maps(self) -> list[str]:
        """Names of the maps as in C; sections of variables have theirs (".rodata")."""
        return list(self._maps)

    @property
    def programs(self) -> dict[str, str]:
        """Programs' names → their section ("tc", "cgroup/connect4")."""
        return {name: self._name("bpf_program__section_name", p) for name, p in self._progs.items()}

    # ---- Before loading ------------------------------------------------------------

    def set_rodata(self, values: Mapping[str, Any]) -> None:
        """Set `const volatile` variables by name; values are converted to their C type.

        LoadError for an unknown name, one that is not read-only, or a value that does not fit.
        """
        self._must_not_be_loaded("set constants")
        for name, value in values.items():
            variable = self.schema.variable(name)
            handle = self._maps.get(variable.section)
            if handle is None or not variable.section.startswith(".rodata"):
                raise LoadError(f"{self.path}: {name} is not a constant (const volatile)")
            size = ctypes.c_size_t()
            start = self._lib.bpf_map__initial_value(handle, ctypes.byref(size))
            try:
                raw = np.array(value, dtype=variable.dtype.base).tobytes()
            except (ValueError, OverflowError, TypeError) as error:
                raise LoadError(f"{self.path}: {name} = {value!r}: {error}") from error
            if len(raw) != variable.size or variable.offset + len(raw) > size.value:
                raise LoadError(f"{self.path}: {name} takes {variable.size} bytes, not {len(raw)}")
            ctypes.memmove(start + variable.offset, raw, len(raw))

    def set_max_entries(self, name: str, count: int) -> None:
        """Size of a map in elements (ring buffers: bytes, a power of two of at least a page)."""
        self._must_not_be_loaded("resize maps")
        self._check(
            self._lib.bpf_map__set_max_entries(self._map(name), count),
            f"set the size of map {name} to {count}",
        )

    def set_inner_map(self, name: str, fd: int) -> None:
        """Prototype for the inner maps of map `name`, where C does not declare one."""
        self._must_not_be_loaded("set inner maps")
        self._check(
            self._lib.bpf_map__set_inner_map_fd(self._map(name), fd), f"set inner map of {name}"
        )

    def reuse_map(self, name: str, fd: int) -> None:
        """Use an existing map (a pinned one) instead of creating it. The descriptor stays the
        caller's. LoadError if type, key, value or flags differ from what the object declares;
        the existing map's size wins."""
        self._must_not_be_loaded("reuse maps")
        handle, info = self._map(name), syscall.map_info(fd)
        for what, mine, theirs in (
            ("type", self._lib.bpf_map__type(handle), info.type),
            ("key size", self._lib.bpf_map__key_size(handle), info.key_size),
            ("value size", self._lib.bpf_map__value_size(handle), info.value_size),
            ("flags", self._lib.bpf_map__map_flags(handle), info.flags),
        ):
            # Ring buffers and libbpf's own maps: libbpf fills in what is 0 here.
            if mine != theirs:
                raise LoadError(
                    f"{self.path}: map {name} has {what} {mine} but the existing map has "
                    f"{theirs}: they are of different versions"
                )
        self._check(self._lib.bpf_map__reuse_fd(handle, fd), f"reuse map {name}")

    def share_maps(self, other: Object) -> None:
        """Use the maps of a loaded object wherever both declare one of a name. LoadError as
        `reuse_map`."""
        for name in self._maps:
            if not name.startswith(".") and name in other._maps:
                self.reuse_map(name, other.map_fd(name))

    def reuse_pinned(self, directory: str | os.PathLike[str]) -> list[str]:
        """Reuse every map that is pinned under its name in `directory`; returns their names.
        LoadError as `reuse_map`; nothing is unpinned."""
        found = []
        for name in self._maps:
            path = os.path.join(directory, name)
            if name.startswith(".") or not os.path.exists(path):
                continue
            fd = syscall.obj_get(path)
            try:
                self.reuse_map(name, fd)
            finally:
                os.close(fd)
            found.append(name)
        return found

    def skip_program(self, name: str) -> None:
        """Do not load program `name`."""
        self._must_not_be_loaded("skip programs")
        self._check(
            self._lib.bpf_program__set_autoload(self._prog(name), False), f"skip program {name}"
        )

    # ---- Loading and after -----------------------------------------------------------

    def load(self) -> None:
        """Create the maps and load the programs. On LoadError nothing stays in the kernel."""
        self._must_not_be_loaded("load")
        with _log() as log:
            result = self._lib.bpf_object__load(self._handle)
            text = "".join(log)
        if result:
            raise LoadError(
                f"{self.path} does not load ({os.strerror(-result)}): {_explain(text)}", text
            )
        self._loaded = True

    def pin_maps(
        self, directory: str | os.PathLike[str], pins: Mapping[str, str] | None = None
    ) -> list[str]:
        """Pin every declared map in `directory` (which must exist in a bpffs) under the name that
        `pins` has for it, else its own, leaving pins that are there; returns those newly pinned."""
        done = []
        for name in self._maps:
            path = os.path.join(directory, name if pins is None else pins.get(name, name))
            if not name.startswith(".") and not os.path.exists(path):
                syscall.obj_pin(self.map_fd(name), path)
                done.append(name)
        return done

    def map_fd(self, name: str) -> int:
        """Descriptor of a map; the object's, so duplicate it to keep it. LoadError before load."""
        return self._fd("map", name, int(self._lib.bpf_map__fd(self._map(name))))

    def prog_fd(self, name: str) -> int:
        """Descriptor of a program; the object's. LoadError before load."""
        return self._fd("program", name, int(self._lib.bpf_program__fd(self._prog(name))))

    def verified_insns(self) -> dict[str, int]:
        """Instructions that the verifier walked, per loaded program: a complexity budget.
        The kernel's limit is 1,000,000."""
        return {
            name: syscall.prog_info(fd).verified_insns
            for name, handle in self._progs.items()
            if (fd := int(self._lib.bpf_program__fd(handle))) >= 0
        }

    # ---- Inside -----------------------------------------------------------------------

    def _fd(self, kind: str, name: str, fd: int) -> int:
        if fd < 0:
            raise LoadError(f"{self.path}: {kind} {name} is not loaded")
        return fd

    def _each(self, function: str) -> Iterator[int]:
        handle = getattr(self._lib, function)(self._handle, None)
        while handle:
            yield handle
            handle = getattr(self._lib, function)(self._handle, handle)

    def _name(self, function: str, handle: int) -> str:
        name: bytes = getattr(self._lib, function)(handle)
        return name.decode()

    def _map_name(self, handle: int) -> str:
        name = self._name("bpf_map__name", handle)
        # libbpf calls a section's map "<object>.rodata"; the object's name has no dot.
        return name[name.index(".") :] if self._lib.bpf_map__is_internal(handle) else name

    def _map(self, name: str) -> int:
        if name not in self._maps:
            raise LoadError(f"{self.path}: no map {name}; there are {', '.join(self._maps)}")
        return self._maps[name]

    def _prog(self, name: str) -> int:
        if name not in self._progs:
            raise LoadError(f"{self.path}: no program {name}; there are {', '.join(self._progs)}")
        return self._progs[name]

    def _must_not_be_loaded(self, what: str) -> None:
        if self._handle is None:
            raise LoadError(f"{self.path}: cannot {what}: the object is closed")
        if self._loaded:
            raise LoadError(f"{self.path}: cannot {what} after loading")

    def _check(self, result: int, what: str) -> None:
        if result:
            raise LoadError(f"{self.path}: cannot {what}: {os.strerror(abs(result))}")


def _last_lines(text: str, count: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " / ".join(lines[-count:]) or "libbpf said nothing"


def _explain(text: str) -> str:
    """One sentence out of libbpf's log: the program and the verifier's last lines."""
    program, lines, inside = "", list[str](), False
    for line in text.splitlines():
        if "BEGIN PROG LOAD LOG" in line:
            program, lines, inside = line.split("'")[1] if "'" in line else "", [], True
        elif "END PROG LOAD LOG" in line:
            inside = False
        elif inside and line.strip():
            lines.append(line.strip())
    if not lines:
        return _last_lines(text, 3)
    # The statistics come last and explain nothing.
    while lines and lines[-1].startswith(("processed ", "verification time", "stack depth")):
        lines.pop()
    return f"the verifier refused {program}: {' / '.join(lines[-4:])}"
