"""What the data plane needs from the kernel, found by trying, never by version."""

from __future__ import annotations

import contextlib
import errno
import os
import struct
from collections.abc import Callable
from typing import NamedTuple

from . import grace, syscall
from .syscall import AttachType, MapType

__all__ = [
    "Feature",
    "MissingFeature",
    "cgroup2_mount",
    "mount_point",
    "passing_program",
    "probe",
    "require",
]


class Feature(NamedTuple):
    """One need. `advice` says what to do when it is not `ok`."""

    name: str
    ok: bool
    advice: str


class MissingFeature(Exception):
    """The machine lacks something; the message is one sentence that says what to do."""


def mount_point(kind: str, mounts: str = "/proc/mounts") -> str | None:
    """Where the first file system of type `kind` ("cgroup2", "bpf") is mounted, or None."""
    with open(mounts) as file:
        for line in file:
            _device, where, type_, *_rest = line.split(" ")
            if type_ == kind:
                # The kernel writes blanks and backslashes as octal escapes.
                return where.encode().decode("unicode_escape")
    return None


def cgroup2_mount() -> str | None:
    """The cgroup v2 hierarchy, on its own or beside v1 controllers, or None."""
    return mount_point("cgroup2")


def probe() -> list[Feature]:
    """Try everything. Leaves nothing behind and attaches nothing."""
    return [Feature(name, _try(test), advice) for name, test, advice in _PROBES]


def require() -> list[Feature]:
    """What `probe` found. Raises MissingFeature for the first need that is not met."""
    found = probe()
    for feature in found:
        if not feature.ok:
            raise MissingFeature(f"This machine has no {feature.name}: {feature.advice}.")
    return found


# ---- Probes ---------------------------------------------------------------------


def _try(test: Callable[[], bool]) -> bool:
    try:
        return test()
    except OSError:
        return False


def _permitted() -> bool:
    if not _capabilities():
        return False
    try:
        os.close(passing_program())
    except OSError as error:
        # In a user namespace of its own a process has all capabilities, and they are good for
        # nothing here.
        return error.errno != errno.EPERM
    return True


def _capabilities() -> bool:
    net_admin, sys_admin, bpf = 12, 21, 39
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith("CapEff:"):
                held = int(line.split()[1], 16)
                may = held >> sys_admin & 1 or held >> bpf & 1
                return bool(may and held >> net_admin & 1)
    return False


def passing_program() -> int:
    """Descriptor of a program for tc that returns TCX_NEXT (-1), to be tried somewhere."""
    sched_cls = 3
    insns = struct.pack("<BBhi", 0xB7, 0, 0, -1) + struct.pack("<BBhi", 0x95, 0, 0, 0)
    return syscall.prog_load(sched_cls, insns, "probe")


def _tcx() -> bool:
    # Asked to attach to an interface that cannot be: a kernel with tcx looks for the interface,
    # one without refuses the attach type.
    fd = passing_program()
    try:
        os.close(syscall.link_create(fd, 0x7FFFFFFF, AttachType.TCX_INGRESS))
    except OSError as error:
        return error.errno == errno.ENODEV
    finally:
        os.close(fd)
    return True


def _map(type_: MapType, key: int, value: int, entries: int, flags: int = 0) -> bool:
    os.close(syscall.map_create(type_, key, value, entries, flags, "probe"))
    return True


def _inner_maps() -> bool:
    flags = syscall.BPF_F_MMAPABLE | syscall.BPF_F_INNER_MAP
    with contextlib.ExitStack() as stack:
        fds = []
        for entries in (1, 2):
            fd = syscall.map_create(MapType.ARRAY, 4, 8, entries, flags, "probe")
            stack.callback(os.close, fd)
            fds.append(fd)
        outer = syscall.map_create(MapType.ARRAY_OF_MAPS, 4, 4, 1, 0, "probe", fds[0])
        stack.callback(os.close, outer)
        syscall.map_update(outer, bytes(4), fds[1].to_bytes(4, "little"))
    return True


def _grace() -> bool:
    grace.wait_grace()
    return True


_PROBES: list[tuple[str, Callable[[], bool], str]] = [
    (
        "permission to use BPF",
        _permitted,
        "run as root, or with CAP_BPF and CAP_NET_ADMIN, outside of user namespaces",
    ),
    (
        "bpf file system",
        lambda: mount_point("bpf") is not None,
        "mount it with: mount -t bpf bpf /sys/fs/bpf",
    ),
    (
        "cgroup v2 hierarchy",
        lambda: cgroup2_mount() is not None,
        "mount it with: mount -t cgroup2 none /sys/fs/cgroup",
    ),
    ("tcx links", _tcx, "they came with Linux 6.6 and need CONFIG_NET_XGRESS"),
    (
        "BPF ring buffers",
        lambda: _map(MapType.RINGBUF, 0, 0, 4096 * 16),
        "they came with Linux 5.8",
    ),
    (
        "mappable BPF arrays",
        lambda: _map(MapType.ARRAY, 4, 8, 1, syscall.BPF_F_MMAPABLE),
        "they came with Linux 5.5",
    ),
    (
        "BPF maps of maps with inner maps of any size",
        _inner_maps,
        "they came with Linux 5.10",
    ),
    (
        "way to wait for a grace period",
        _grace,
        "the kernel needs CONFIG_MEMBARRIER, or BPF maps of maps",
    ),
]
