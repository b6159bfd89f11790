"""Reading BPF ring buffers of fixed-size records in bulk.

The kernel writes records of one size, so a stretch of the ring is a two-dimensional
array and one look at its headers tells which records to take: no Python per record.
Layout: kernel/bpf/ringbuf.c. The consumer's position is a word shared with the kernel,
so a reader that is started anew continues where the last one stopped; there must be
only one reader at a time.

Ordering: the kernel releases a record by storing its header without BUSY. We read
headers first and bodies afterwards; x86-64 keeps the order of loads. Other machines
may not, so there a read is followed by a barrier (membarrier) before bodies are copied.
"""

from __future__ import annotations

import mmap
import os
import platform
import select
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from . import syscall
from .grace import memory_barrier
from .maps import Map, round_up
from .object import Object
from .syscall import MapType

__all__ = ["Ring"]

_BUSY = np.uint32(1 << 31)
_DISCARD = np.uint32(1 << 30)
_LENGTH = np.uint32((1 << 30) - 1)
_HEADER = 8


class Ring(Map):
    """Reader of one ring. `record` is the dtype of its records."""

    types = (MapType.RINGBUF,)

    def __init__(self, fd: int, record: npt.DTypeLike, name: str = "") -> None:
        """Takes over `fd`. OSError(EPERM) if the ring is mapped for writing elsewhere."""
        super().__init__(fd, name)
        self.record_dtype = np.dtype(record)
        self._stride = round_up(self.record_dtype.itemsize + _HEADER, 8)
        self._size = self.max_entries
        page = mmap.PAGESIZE
        consumer = mmap.mmap(fd, page, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
        # The data is mapped twice in a row: a record that wraps is contiguous for us.
        producer = mmap.mmap(
            fd, page + 2 * self._size, mmap.MAP_SHARED, mmap.PROT_READ, offset=page
        )
        self._consumer = np.frombuffer(consumer, "<u8", 1)
        self._producer = np.frombuffer(producer, "<u8", 1)
        self._data = np.frombuffer(producer, np.uint8, 2 * self._size, page)
        self._fence = platform.machine() != "x86_64"
        self._epoll = select.epoll()
        self._epoll.register(fd, select.EPOLLIN)

    @classmethod
    def open(cls, path: str, record: npt.DTypeLike) -> Self:
        """The ring pinned at `path`."""
        return cls(syscall.obj_get(path), record, os.path.basename(path))

    @classmethod
    def of(cls, obj: Object, name: str, record: npt.DTypeLike) -> Self:
        """Ring `name` of a loaded object; the descriptor is a duplicate."""
        return cls(os.dup(obj.map_fd(name)), record, name)

    @property
    def written(self) -> int:
        """Bytes that programs wrote since the ring was made, headers included."""
        return int(self._producer[0])

    @property
    def taken(self) -> int:
        """Bytes of these that were read."""
        return int(self._consumer[0])

    @property
    def pending(self) -> int:
        """Bytes written and not yet read."""
        return self.written - self.taken

    def read(self, max_records: int = 65536) -> npt.NDArray[Any]:
        """Up to `max_records` finished records, oldest first, as a copy; perhaps none.

        Stops before the first record that a program is still writing. ValueError if a record
        has another size than `record`: the ring was written by another version.
        """
        start = int(self._consumer[0])
        count = min((int(self._producer[0]) - start) // self._stride, max_records)
        if count <= 0:
            return np.empty(0, self.record_dtype)
        if self._fence:
            memory_barrier()
        # A stretch never exceeds the ring, so twice the ring holds it from anywhere.
        at = start % self._size
        cells = self._data[at : at + count * self._stride].reshape(count, self._stride)
        headers = np.ascontiguousarray(cells[:, :4]).view("<u4").reshape(count)
        if self._fence:
            memory_barrier()
        busy = headers & _BUSY != 0
        if busy.any():
            count = int(busy.argmax())
            headers, cells = headers[:count], cells[:count]
        wrong = headers & _LENGTH != self.record_dtype.itemsize
        if wrong.any():
            size = int(headers[wrong.argmax()] & _LENGTH)
            raise ValueError(
                f"ring {self.name} has a record of {size} bytes, "
                f"not {self.record_dtype.itemsize}: its writer is of another version"
            )
        bodies = cells[:, _HEADER : _HEADER + self.record_dtype.itemsize]
        keep = headers & _DISCARD == 0
        raw = np.ascontiguousarray(bodies) if keep.all() else bodies[keep]
        if self._fence:
            memory_barrier()
        self._consumer[0] = start + count * self._stride
        records: npt.NDArray[Any] = (
            np.frombuffer(raw.data, self.record_dtype)
            if len(raw)
            else (np.empty(0, self.record_dtype))
        )
        return records

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until there is something to read, at most `timeout` seconds (None: forever).
        True if there may be: a record still being written also ends the wait."""
        return bool(self._epoll.poll(timeout))

    def fileno(self) -> int:
        """Descriptor that is readable when there are records, for an event loop."""
        return self._epoll.fileno()

    def close(self) -> None:
        """Close the descriptors. Records that were read are copies and stay."""
        self._epoll.close()
        super().close()
