"""Typed views of kernel maps: numpy structured arrays in, numpy structured arrays out.

A map object owns its descriptor: `close` it or use it as a context manager. It is made
from a descriptor (`HashMap(fd, key, value)`), a pin (`HashMap.open(path, …)`) or a loaded
object (`HashMap.of(object, "peers", …)`, which duplicates). Keys and values are numpy
dtypes, usually `Schema.dtype(…)`; a size that differs from the kernel's is a TypeError.
Errors of the kernel are OSErrors that name the map.
"""

from __future__ import annotations

import errno
import mmap
import os
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from . import syscall
from .object import Object
from .syscall import BatchCommand, MapType

__all__ = [
    "ArrayMap",
    "ArrayOfMaps",
    "HashMap",
    "LpmTrie",
    "Map",
    "MappedArray",
    "PerCpuArray",
    "possible_cpus",
    "round_up",
]

Records = npt.NDArray[Any]
_U32 = np.dtype("<u4")
_ENOTSUPP = 524
_BATCH = 16384


def round_up(size: int, unit: int) -> int:
    """`size` rounded up to a multiple of `unit`."""
    return -(-size // unit) * unit


def possible_cpus() -> int:
    """Number of CPUs that per-CPU maps have values for (possible, not online)."""
    with open("/sys/devices/system/cpu/possible") as file:
        last = file.read().strip().split(",")[-1]
    return int(last.split("-")[-1]) + 1


class Map:
    """What all maps share: descriptor, name, the kernel's info."""

    types: tuple[MapType, ...] = ()

    def __init__(self, fd: int, name: str = "") -> None:
        """Takes over `fd`. TypeError if the map is not of the class's type."""
        self.fd = fd
        self.info = syscall.map_info(fd)
        self.name = name or self.info.name
        if self.types and self.info.type not in self.types:
            raise TypeError(
                f"map {self.name} is of type {self.info.type}, "
                f"not {' or '.join(t.name.lower() for t in self.types)}"
            )

    @property
    def max_entries(self) -> int:
        """Capacity in elements."""
        return self.info.max_entries

    def pin(self, path: str) -> None:
        """Pin at `path`, in a bpffs."""
        syscall.obj_pin(self.fd, path)

    def close(self) -> None:
        """Close the descriptor. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check_size(self, what: str, mine: int, theirs: int) -> None:
        if mine != theirs:
            raise TypeError(f"map {self.name} has {what}s of {theirs} bytes, not {mine}")

    def _error(self, number: int, what: str) -> OSError:
        if number == errno.E2BIG:
            said = f"map {self.name} is full: it has room for {self.max_entries:,} elements"
            return OSError(number, said)
        return OSError(number, f"cannot {what} map {self.name}: {os.strerror(number)}")


class _KeyValue(Map):
    """Maps with batch commands over (key, value)."""

    def __init__(self, fd: int, key: npt.DTypeLike, value: npt.DTypeLike, name: str = "") -> None:
        super().__init__(fd, name)
        # numpy splits subarray dtypes into the array's shape; bytes keep elements whole.
        self.key_dtype, self.value_dtype = np.dtype(key), np.dtype(value)
        self._check_size("key", self.key_dtype.itemsize, self.info.key_size)
        self._check_size("value", self.value_dtype.itemsize, self.info.value_size)

    @classmethod
    def open(cls, path: str, key: npt.DTypeLike, value: npt.DTypeLike) -> Self:
        """The map pinned at `path`."""
        return cls(syscall.obj_get(path), key, value, os.path.basename(path))

    @classmethod
    def of(cls, obj: Object, name: str, key: npt.DTypeLike, value: npt.DTypeLike) -> Self:
        """Map `name` of a loaded object; the descriptor is a duplicate."""
        return cls(os.dup(obj.map_fd(name)), key, value, name)

    def get(self, key: npt.ArrayLike) -> Records | None:
        """The value at `key` as a 0-d array (or the subarray), or None."""
        raw = syscall.map_lookup(
            self.fd, self._one(key, self.key_dtype), self.info.value_size, self.name
        )
        return None if raw is None else np.frombuffer(raw, self.value_dtype)[0]

    def set(self, key: npt.ArrayLike, value: npt.ArrayLike, flags: int = 0) -> None:
        """Store one element. OSError(E2BIG) when the map is full."""
        syscall.map_update(
            self.fd,
            self._one(key, self.key_dtype),
            self._one(value, self.value_dtype),
            flags,
            self.name,
        )

    def delete(self, key: npt.ArrayLike) -> bool:
        """Delete one element; False if there was none."""
        return syscall.map_delete(self.fd, self._one(key, self.key_dtype), self.name)

    def items(self) -> tuple[Records, Records]:
        """All (keys, values), in no order. Elements that come or go meanwhile may or may not
        be among them; one that stays is there exactly once in hashes of constant content."""
        keys, values = self._walk_batches()
        return keys, values

    def keys(self) -> Records:
        """All keys."""
        return self.items()[0]

    def __len__(self) -> int:
        return len(self.items()[0])

    def update_many(self, keys: npt.ArrayLike, values: npt.ArrayLike, flags: int = 0) -> None:
        """Store many elements, in order. On OSError those before the refused one are stored."""
        k, v = self._many(keys, self.key_dtype), self._many(values, self.value_dtype)
        if len(k) != len(v):
            raise ValueError(f"map {self.name}: {len(k)} keys but {len(v)} values")
        done = 0
        while done < len(k):
            count, number = syscall.batch(
                BatchCommand.UPDATE,
                self.fd,
                len(k) - done,
                keys=k[done:].ctypes.data,
                values=v[done:].ctypes.data,
                elem_flags=flags,
            )
            if number in (_ENOTSUPP, errno.EINVAL, errno.ENOSPC, errno.ENOMEM) and not count:
                # No batches for this map type, or none of this size: one by one.
                for i in range(done, len(k)):
                    self.set_raw(k[i].tobytes(), v[i].tobytes(), flags)
                return
            if number:
                error = self._error(number, "update")
                error.add_note(f"element {done + count} of {len(k)}")
                raise error
            done += count

    def set_raw(self, key: bytes, value: bytes, flags: int = 0) -> None:
        """Store one element from bytes as they are in the kernel."""
        syscall.map_update(self.fd, key, value, flags, self.name)

    def delete_many(self, keys: npt.ArrayLike) -> int:
        """Delete many; those that are not there are passed over. Returns how many were deleted."""
        k = self._many(keys, self.key_dtype)
        at = deleted = 0
        while at < len(k):
            count, number = syscall.batch(
                BatchCommand.DELETE, self.fd, len(k) - at, keys=k[at:].ctypes.data
            )
            at, deleted = at + count, deleted + count
            if number == errno.ENOENT:
                at += 1
            elif number in (_ENOTSUPP, errno.EINVAL, errno.ENOMEM):
                return deleted + sum(
                    syscall.map_delete(self.fd, k[i].tobytes(), self.name)
                    for i in range(at, len(k))
                )
            elif number:
                raise self._error(number, "delete from")
        return deleted

    # ---- Inside -------------------------------------------------------------------

    @staticmethod
    def _one(value: npt.ArrayLike, dtype: np.dtype[Any]) -> bytes:
        if isinstance(value, bytes) and len(value) == dtype.itemsize:
            return value
        raw = np.array(value, dtype.base if dtype.subdtype else dtype).tobytes()
        if len(raw) != dtype.itemsize:
            raise ValueError(f"{len(raw)} bytes do not make one element of {dtype.itemsize}")
        return raw

    @staticmethod
    def _many(values: npt.ArrayLike, dtype: np.dtype[Any]) -> Records:
        """As a contiguous array of shape (n, itemsize) of bytes."""
        array = np.ascontiguousarray(values, dtype.base if dtype.subdtype else dtype)
        return array.reshape(-1).view(np.uint8).reshape(-1, dtype.itemsize)

    def _typed(self, raw: Records, dtype: np.dtype[Any]) -> Records:
        return np.frombuffer(raw.tobytes(), dtype)

    def _walk_batches(self) -> tuple[Records, Records]:
        key_size, value_size = self.info.key_size, self.info.value_size
        cursor = np.zeros(max(key_size, 8), np.uint8)
        following = np.zeros_like(cursor)
        room = min(self.max_entries, _BATCH)
        keys: list[Records] = []
        values: list[Records] = []
        first = True
        while True:
            k = np.empty((room, key_size), np.uint8)
            v = np.empty((room, value_size), np.uint8)
            count, number = syscall.batch(
                BatchCommand.LOOKUP,
                self.fd,
                room,
                keys=k.ctypes.data,
                values=v.ctypes.data,
                in_batch=0 if first else cursor.ctypes.data,
                out_batch=following.ctypes.data,
            )
            if number == errno.ENOSPC and room < self.max_entries:
                room = min(room * 4, self.max_entries)  # a bucket holds more than that
                if not count:
                    continue
            elif number in (errno.ENOSPC, _ENOTSUPP, errno.EINVAL, errno.ENOMEM, errno.EINTR):
                return self._walk_keys()
            elif number not in (0, errno.ENOENT, errno.ENOSPC):
                raise self._error(number, "read")
            keys.append(k[:count])
            values.append(v[:count])
            if number == errno.ENOENT:
                break
            cursor, following, first = following, cursor, False
        return (
            self._typed(np.concatenate(keys), self.key_dtype),
            self._typed(np.concatenate(values), self.value_dtype),
        )

    def _walk_keys(self) -> tuple[Records, Records]:
        """Element by element: slow, but for any map. Ends even if the map keeps changing."""
        keys, values = bytearray(), bytearray()
        seen: set[bytes] = set()
        key = syscall.map_next_key(self.fd, None, self.info.key_size, self.name)
        for _ in range(2 * self.max_entries + 16):
            if key is None:
                break
            value = syscall.map_lookup(self.fd, key, self.info.value_size, self.name)
            if value is not None and key not in seen:
                seen.add(key)
                keys += key
                values += value
            key = syscall.map_next_key(self.fd, key, self.info.key_size, self.name)
        return (
            np.frombuffer(bytes(keys), self.key_dtype),
            np.frombuffer(bytes(values), self.value_dtype),
        )


class HashMap(_KeyValue):
    """BPF_MAP_TYPE_HASH and LRU_HASH."""

    types = (MapType.HASH, MapType.LRU_HASH)


class LpmTrie(_KeyValue):
    """BPF_MAP_TYPE_LPM_TRIE; keys begin with the prefix length in bits (__u32)."""

    types = (MapType.LPM_TRIE,)


class ArrayMap(Map):
    """BPF_MAP_TYPE_ARRAY by system call: index → value. Elements always exist."""

    types = (MapType.ARRAY,)

    def __init__(self, fd: int, value: npt.DTypeLike, name: str = "") -> None:
        super().__init__(fd, name)
        self.value_dtype = np.dtype(value)
        self._check_size("value", self.value_dtype.itemsize, self.info.value_size)
        self._map = _KeyValue(fd, _U32, self.value_dtype, self.name)

    @classmethod
    def open(cls, path: str, value: npt.DTypeLike) -> Self:
        """The map pinned at `path`."""
        return cls(syscall.obj_get(path), value, os.path.basename(path))

    @classmethod
    def of(cls, obj: Object, name: str, value: npt.DTypeLike) -> Self:
        """Map `name` of a loaded object; the descriptor is a duplicate."""
        return cls(os.dup(obj.map_fd(name)), value, name)

    @classmethod
    def create(cls, value: npt.DTypeLike, count: int, flags: int = 0, name: str = "") -> Self:
        """A new array of `count` elements."""
        size = np.dtype(value).itemsize
        return cls(syscall.map_create(MapType.ARRAY, 4, size, count, flags, name), value, name)

    def __len__(self) -> int:
        return self.max_entries

    def __getitem__(self, index: int) -> Records:
        value = self._map.get(index)
        if value is None:
            raise IndexError(f"map {self.name} has {self.max_entries} elements, no {index}")
        return value

    def __setitem__(self, index: int, value: npt.ArrayLike) -> None:
        self._map.set(index, value)

    def values(self) -> Records:
        """All values, by index."""
        return self._map.items()[1]

    def update_many(self, indices: npt.ArrayLike, values: npt.ArrayLike) -> None:
        """Store many elements."""
        self._map.update_many(indices, values)


class MappedArray(ArrayMap):
    """A BPF_F_MMAPABLE array as memory: `view[i]` is the kernel's element i.

    No system call per access. A store of an aligned field of up to 8 bytes is one store;
    wider changes are seen piecemeal. Views keep the mapping alive, also after `close`.
    """

    def __init__(self, fd: int, value: npt.DTypeLike, name: str = "") -> None:
        super().__init__(fd, value, name)
        if not self.info.flags & syscall.BPF_F_MMAPABLE:
            raise TypeError(f"map {self.name} is not mmapable (BPF_F_MMAPABLE)")
        stride = round_up(self.info.value_size, 8)
        # The kernel maps whole pages; elements lie at multiples of 8 bytes.
        length = round_up(stride * self.max_entries, mmap.PAGESIZE)
        memory = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        base, shape = self.value_dtype, (self.max_entries,)
        self.view: Records
        if base.subdtype is None:
            self.view = np.ndarray(shape, base, memory, strides=(stride,))
        else:
            wrapped = np.dtype({"names": ["v"], "formats": [base], "itemsize": stride})
            self.view = np.ndarray(shape, wrapped, memory)["v"]

    def __getitem__(self, index: int) -> Records:
        item: Records = self.view[index].copy()
        return item

    def values(self) -> Records:
        """A copy of all values, by index."""
        return self.view.copy()


class PerCpuArray(Map):
    """BPF_MAP_TYPE_PERCPU_ARRAY: a value per (index, possible CPU)."""

    types = (MapType.PERCPU_ARRAY,)

    def __init__(self, fd: int, value: npt.DTypeLike, name: str = "") -> None:
        super().__init__(fd, name)
        self.value_dtype = np.dtype(value)
        self._check_size("value", self.value_dtype.itemsize, self.info.value_size)
        self._cpus = possible_cpus()
        self._stride = round_up(self.info.value_size, 8)

    @classmethod
    def open(cls, path: str, value: npt.DTypeLike) -> Self:
        """The map pinned at `path`."""
        return cls(syscall.obj_get(path), value, os.path.basename(path))

    @classmethod
    def of(cls, obj: Object, name: str, value: npt.DTypeLike) -> Self:
        """Map `name` of a loaded object; the descriptor is a duplicate."""
        return cls(os.dup(obj.map_fd(name)), value, name)

    def __len__(self) -> int:
        return self.max_entries

    def values(self) -> Records:
        """Shape (elements, possible CPUs). Sum over axis 1 for totals."""
        width = self._stride * self._cpus
        raw = np.empty((self.max_entries, width), np.uint8)
        for index in range(self.max_entries):
            value = syscall.map_lookup(self.fd, index.to_bytes(4, "little"), width, self.name)
            if value is not None:
                raw[index] = np.frombuffer(value, np.uint8)
        cells = raw.reshape(self.max_entries, self._cpus, self._stride)
        exact = np.ascontiguousarray(cells[:, :, : self.info.value_size])
        return exact.view(self.value_dtype).reshape(self.max_entries, self._cpus)


class ArrayOfMaps(Map):
    """BPF_MAP_TYPE_ARRAY_OF_MAPS whose inner maps are mmapable arrays (BPF_F_INNER_MAP, so
    that their sizes may differ)."""

    types = (MapType.ARRAY_OF_MAPS,)

    def __init__(self, fd: int, value: npt.DTypeLike, name: str = "") -> None:
        """`value` is the dtype of the inner arrays' elements."""
        super().__init__(fd, name)
        self.value_dtype = np.dtype(value)

    @classmethod
    def open(cls, path: str, value: npt.DTypeLike) -> Self:
        """The map pinned at `path`."""
        return cls(syscall.obj_get(path), value, os.path.basename(path))

    @classmethod
    def of(cls, obj: Object, name: str, value: npt.DTypeLike) -> Self:
        """Map `name` of a loaded object; the descriptor is a duplicate."""
        return cls(os.dup(obj.map_fd(name)), value, name)

    def create_inner(self, count: int) -> MappedArray:
        """A new inner array of `count` elements, not yet placed; the caller closes it."""
        return MappedArray.create(
            self.value_dtype,
            count,
            syscall.BPF_F_MMAPABLE | syscall.BPF_F_INNER_MAP,
            f"{self.name[:12]}_in",
        )

    def inner(self, index: int) -> MappedArray | None:
        """The inner array at `index`, opened by its id, or None if the place is empty."""
        raw = syscall.map_lookup(self.fd, index.to_bytes(4, "little"), 4, self.name)
        if raw is None:
            return None
        return MappedArray(syscall.map_fd_by_id(int.from_bytes(raw, "little")), self.value_dtype)

    def replace(self, index: int, inner: Map) -> None:
        """Put `inner` at `index`. Returns after an RCU grace period: programs no longer see the
        map that was there, which goes away unless someone holds it."""
        syscall.map_update(
            self.fd, index.to_bytes(4, "little"), inner.fd.to_bytes(4, "little"), 0, self.name
        )
