"""Named network namespaces, and short visits to others.

A named namespace is a bind mount of its nsfs file in /run/netns, as iproute2 has it. That folder
is a mount of its own, shared with other mount namespaces: iproute2 makes it one when it is not,
which would hide what was mounted there before. A namespace belongs to a thread: `inside` moves
only the calling thread, so never await there.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

__all__ = ["cookie", "create", "delete", "enter", "in_a_new_one", "inside", "path_of"]

_RUN = Path("/run/netns")
_CLONE_NEWNS = 0x00020000
_CLONE_NEWNET = 0x40000000
_MS_BIND = 4096
_MS_REC = 16384
_MS_PRIVATE = 1 << 18
_MS_SHARED = 1 << 20
_MNT_DETACH = 2
_SO_NETNS_COOKIE = 71  # Linux 5.14
_libc = ctypes.CDLL(None, use_errno=True)


def path_of(name: str) -> Path:
    """Where the namespace `name` is mounted."""
    return _RUN / name


def create(name: str) -> Path:
    """Make the namespace `name` and return its path; what is there already is left alone."""
    path = path_of(name)
    _RUN.mkdir(parents=True, exist_ok=True)
    _share_run()
    if path.exists() and _is_namespace(path):
        return path
    path.touch()

    def make() -> None:
        _call("make a network namespace", _libc.unshare(_CLONE_NEWNET))
        _mount("/proc/thread-self/ns/net", path, _MS_BIND)

    try:
        _in_a_thread(make)
    except OSError:
        path.unlink(missing_ok=True)
        raise
    return path


def delete(name: str) -> bool:
    """Remove the name; the namespace goes with its last process. False if there was none."""
    path = path_of(name)
    if not path.exists():
        return False
    _unmount(path)
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        _in_a_thread(lambda: _delete_hidden(path))
    return True


def enter(path: str | os.PathLike[str]) -> None:
    """Move the calling thread, and threads that it makes later, for good."""
    target = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call(f"enter the network namespace {path}", _libc.setns(target, _CLONE_NEWNET))
    finally:
        os.close(target)


def cookie() -> int:
    """The kernel's number for the calling thread's namespace, never used again."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_one:
        raw = any_one.getsockopt(socket.SOL_SOCKET, _SO_NETNS_COOKIE, 8)
    return int.from_bytes(raw, "little")


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


def in_a_new_one(work: Callable[[], None]) -> None:
    """Run `work` in a network namespace that ends with it, and has nothing but lo (index 1)."""

    def there() -> None:
        _call("make a network namespace", _libc.unshare(_CLONE_NEWNET))
        work()

    _in_a_thread(there)


def _share_run() -> None:
    """As `ip netns add` does first; it fails only where the folder is no mount yet."""
    if _libc.mount(b"none", os.fsencode(_RUN), b"none", _MS_SHARED | _MS_REC, None) != 0:
        _mount(str(_RUN), _RUN, _MS_BIND | _MS_REC)
        _mount("none", _RUN, _MS_SHARED | _MS_REC)


def _delete_hidden(path: Path) -> None:
    """Remove a name whose mount lies under a later mount of the folder, where no path leads.

    In a mount namespace of its own the calling thread lays it bare. Where a file is a mount point
    in other namespaces only, unlink(2) takes those mounts away (Linux 3.18)."""
    _call("make a mount namespace", _libc.unshare(_CLONE_NEWNS))
    _mount("none", Path("/"), _MS_PRIVATE | _MS_REC)
    while True:
        _unmount(path)
        try:
            path.unlink(missing_ok=True)
            return
        except OSError:
            if _libc.umount2(os.fsencode(_RUN), _MNT_DETACH) != 0:
                raise


def _unmount(path: Path) -> None:
    while _libc.umount2(os.fsencode(path), _MNT_DETACH) == 0:
        pass


def _in_a_thread(work: Callable[[], None]) -> None:
    """Run `work` in a thread of its own: its namespaces end with it, the caller's never change."""
    failure: list[OSError] = []

    def run() -> None:
        try:
            work()
        except OSError as error:
            failure.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if failure:
        raise failure[0]


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
