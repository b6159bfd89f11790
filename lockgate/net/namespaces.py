"""Named network namespaces, and short visits to others.

A named namespace is a bind mount of its nsfs file in /run/netns, as iproute2 has it. A
namespace belongs to a thread: `inside` moves only the calling thread, so never await there.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import threading
from collections.abc import Iterator
from pathlib import Path

__all__ = ["create", "delete", "enter", "inside", "path_of"]

_RUN = Path("/run/netns")
_CLONE_NEWNET = 0x40000000
_MS_BIND = 4096
_MNT_DETACH = 2
_libc = ctypes.CDLL(None, use_errno=True)


def path_of(name: str) -> Path:
    """Where the namespace `name` is mounted."""
    return _RUN / name


def create(name: str) -> Path:
    """Make the namespace `name` and return its path; what is there already is left alone."""
    path = path_of(name)
    _RUN.mkdir(parents=True, exist_ok=True)
    if path.exists() and _is_namespace(path):
        return path
    path.touch()
    failure: list[OSError] = []

    # A thread of its own: its namespace ends with it, so the caller's never changes.
    def make() -> None:
        try:
            _call("make a network namespace", _libc.unshare(_CLONE_NEWNET))
            _mount("/proc/thread-self/ns/net", path, _MS_BIND)
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    if failure:
        path.unlink(missing_ok=True)
        raise failure[0]
    return path


def delete(name: str) -> bool:
    """Remove the name; the namespace goes with its last process. False if there was none."""
    path = path_of(name)
    if not path.exists():
        return False
    while _libc.umount2(os.fsencode(path), _MNT_DETACH) == 0:
        pass
    path.unlink(missing_ok=True)
    return True


def enter(path: str | os.PathLike[str]) -> None:
    """Move the calling thread, and threads that it makes later, for good."""
    target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call(f"enter the network namespace {path}", _libc.setns(target, _CLONE_NEWNET))
    finally:
        os.close(target)


@contextlib.contextmanager
def inside(path: str | os.PathLike[str]) -> Iterator[None]:
    """Run a block in the namespace at `path`. OSError if it is gone; then nothing moved."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(path)
        try:
            yield
        finally:
            _call("return to the network namespace", _libc.setns(home, _CLONE_NEWNET))
    finally:
        os.close(home)


def _is_namespace(path: Path) -> bool:
    # Mounted files are on nsfs, a file system of their own.
    return path.stat().st_dev != _RUN.stat().st_dev


def _mount(source: str, target: Path, flags: int) -> None:
    result = _libc.mount(source.encode(), os.fsencode(target), b"none", flags, None)
    _call(f"mount {source} at {target}", result)


def _call(what: str, result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"cannot {what}: {os.strerror(number)}")
