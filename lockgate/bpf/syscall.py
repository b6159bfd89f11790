"""bpf(2), one function per command, with errors that name the object.

Every function raises OSError with the kernel's errno and a message of the form
"cannot COMMAND NAME: reason". File descriptors are plain ints, close-on-exec
(the kernel sets that for bpf objects); the caller owns those it gets back.
Buffers are passed by address, so keep them alive for the call, which is all the
kernel needs. Numbers and layouts: include/uapi/linux/bpf.h.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from dataclasses import dataclass
from enum import IntEnum

__all__ = [
    "BPF_EXIST",
    "BPF_F_INNER_MAP",
    "BPF_F_LOCK",
    "BPF_F_MMAPABLE",
    "BPF_F_NO_PREALLOC",
    "BPF_NOEXIST",
    "SKB_CB",
    "SKB_MARK",
    "SKB_SIZE",
    "AttachType",
    "LinkInfo",
    "MapInfo",
    "MapType",
    "ProgInfo",
    "TestRun",
    "batch",
    "btf_by_id",
    "link_create",
    "link_detach",
    "link_fd_by_id",
    "link_info",
    "link_update",
    "map_create",
    "map_delete",
    "map_fd_by_id",
    "map_info",
    "map_lookup",
    "map_next_key",
    "map_update",
    "obj_get",
    "obj_pin",
    "prog_fd_by_id",
    "prog_info",
    "prog_load",
    "prog_query",
    "prog_test_run",
    "skb_context",
    "xdp_context",
]

_NUMBERS = {"x86_64": (321, 324), "aarch64": (280, 283), "riscv64": (280, 283)}
"""System call numbers of bpf and membarrier, by machine (asm/unistd.h)."""

_libc = ctypes.CDLL(None, use_errno=True)

BPF_NOEXIST = 1
BPF_EXIST = 2
#: Write the value where it is, under its `struct bpf_spin_lock` (since Linux 5.1, batches 5.6).
BPF_F_LOCK = 4

BPF_F_NO_PREALLOC = 1 << 0
BPF_F_MMAPABLE = 1 << 10
BPF_F_INNER_MAP = 1 << 12

_MAP_CREATE = 0
_MAP_LOOKUP = 1
_MAP_UPDATE = 2
_MAP_DELETE = 3
_MAP_NEXT_KEY = 4
_PROG_LOAD = 5
_OBJ_PIN = 6
_OBJ_GET = 7
_PROG_TEST_RUN = 10
_PROG_FD_BY_ID = 13
_MAP_FD_BY_ID = 14
_OBJ_INFO = 15
_PROG_QUERY = 16
_BTF_FD_BY_ID = 19
_LINK_CREATE = 28
_LINK_UPDATE = 29
_LINK_FD_BY_ID = 30
_LINK_DETACH = 34
#: As many programs as a tcx hook takes (BPF_MPROG_MAX).
_QUERIED = 64
_F_BEFORE = 1 << 3


class MapType(IntEnum):
    """enum bpf_map_type, the types we use."""

    HASH = 1
    ARRAY = 2
    PERCPU_HASH = 5
    PERCPU_ARRAY = 6
    LRU_HASH = 9
    LPM_TRIE = 11
    ARRAY_OF_MAPS = 12
    RINGBUF = 27


class AttachType(IntEnum):
    """enum bpf_attach_type, the types we use."""

    CGROUP_INET4_CONNECT = 10
    CGROUP_INET6_CONNECT = 11
    CGROUP_UDP4_SENDMSG = 14
    CGROUP_UDP6_SENDMSG = 15
    CGROUP_UDP4_RECVMSG = 19
    CGROUP_UDP6_RECVMSG = 20
    CGROUP_INET4_GETPEERNAME = 29
    CGROUP_INET6_GETPEERNAME = 30
    XDP = 37
    TCX_INGRESS = 46
    TCX_EGRESS = 47


class BatchCommand(IntEnum):
    """The batch commands of enum bpf_cmd."""

    LOOKUP = 24
    LOOKUP_AND_DELETE = 25
    UPDATE = 26
    DELETE = 27


def syscall_numbers() -> tuple[int, int]:
    """Numbers of (bpf, membarrier) on this machine. OSError(ENOSYS) if we do not know it."""
    machine = platform.machine()
    if machine not in _NUMBERS:
        raise OSError(errno.ENOSYS, f"the system call number of bpf on {machine} is not known")
    return _NUMBERS[machine]


_SYS_BPF = syscall_numbers()[0]


def _fail(number: int, what: str) -> OSError:
    return OSError(number, f"cannot {what}: {os.strerror(number)}")


def _call(command: int, attr: ctypes.Array[ctypes.c_char]) -> tuple[int, int]:
    """Returns (result, errno); errno is 0 on success. Repeats EINTR."""
    while True:
        result: int = _libc.syscall(_SYS_BPF, command, attr, len(attr))
        if result >= 0:
            return result, 0
        number = ctypes.get_errno()
        if number != errno.EINTR:
            return result, number


def _bpf(command: int, attr: bytes, what: str) -> int:
    result, number = _call(command, ctypes.create_string_buffer(attr, len(attr)))
    if number:
        raise _fail(number, what)
    return result


def _address(data: bytes | ctypes.Array[ctypes.c_char]) -> int:
    if isinstance(data, bytes):
        return ctypes.cast(ctypes.c_char_p(data), ctypes.c_void_p).value or 0
    return ctypes.addressof(data)


# ---- Maps --------------------------------------------------------------------


def map_create(
    type_: int,
    key_size: int,
    value_size: int,
    max_entries: int,
    flags: int = 0,
    name: str = "",
    inner_map_fd: int = 0,
) -> int:
    """Create a map and return its descriptor. Sizes are in bytes; names over 15 bytes are cut."""
    attr = struct.pack(
        "<7I16s",
        type_,
        key_size,
        value_size,
        max_entries,
        flags,
        inner_map_fd,
        0,
        name.encode()[:15],
    )
    return _bpf(_MAP_CREATE, attr, f"create map {name or MapType(type_).name.lower()}")


def map_lookup(fd: int, key: bytes, value_size: int, name: str = "map") -> bytes | None:
    """The value at `key`, or None if there is none. `value_size` is in bytes; for per-CPU maps
    it is round_up(value size, 8) times the number of possible CPUs."""
    value = ctypes.create_string_buffer(value_size)
    attr = struct.pack("<IxxxxQQQ", fd, _address(key), ctypes.addressof(value), 0)
    _, number = _call(_MAP_LOOKUP, ctypes.create_string_buffer(attr, len(attr)))
    if number == errno.ENOENT:
        return None
    if number:
        raise _fail(number, f"look up in map {name}")
    return value.raw


def map_update(fd: int, key: bytes, value: bytes, flags: int = 0, name: str = "map") -> None:
    """Store `value` at `key`. E2BIG: the map is full; EEXIST, ENOENT: by BPF_NOEXIST, BPF_EXIST."""
    attr = struct.pack("<IxxxxQQQ", fd, _address(key), _address(value), flags)
    _bpf(_MAP_UPDATE, attr, f"update map {name}")


def map_delete(fd: int, key: bytes, name: str = "map") -> bool:
    """Delete `key`; False if it was not there."""
    attr = struct.pack("<IxxxxQQQ", fd, _address(key), 0, 0)
    _, number = _call(_MAP_DELETE, ctypes.create_string_buffer(attr, len(attr)))
    if number == errno.ENOENT:
        return False
    if number:
        raise _fail(number, f"delete from map {name}")
    return True


def map_next_key(fd: int, key: bytes | None, key_size: int, name: str = "map") -> bytes | None:
    """The key after `key` (None: the first), or None at the end. If `key` is gone, the first."""
    following = ctypes.create_string_buffer(key_size)
    attr = struct.pack(
        "<IxxxxQQQ", fd, 0 if key is None else _address(key), ctypes.addressof(following), 0
    )
    _, number = _call(_MAP_NEXT_KEY, ctypes.create_string_buffer(attr, len(attr)))
    if number == errno.ENOENT:
        return None
    if number:
        raise _fail(number, f"walk map {name}")
    return following.raw


def batch(
    command: BatchCommand,
    fd: int,
    count: int,
    keys: int = 0,
    values: int = 0,
    in_batch: int = 0,
    out_batch: int = 0,
    elem_flags: int = 0,
) -> tuple[int, int]:
    """One batch command. Addresses are of buffers for `count` elements; 0 means none.

    Returns (elements done, errno); errno 0 is success. It does not raise, because a
    batch that stops half-way is the ordinary case: ENOENT at the end of a look-up,
    ENOSPC when a hash bucket holds more than `count`, E2BIG when the map is full.
    """
    attr = ctypes.create_string_buffer(
        struct.pack("<4QIIQQ", in_batch, out_batch, keys, values, count, fd, elem_flags, 0), 56
    )
    _, number = _call(command, attr)
    done: int = struct.unpack_from("<I", attr, 32)[0]
    # These are refused before the kernel has set the count.
    if number in (errno.EINVAL, errno.EPERM, errno.EBADF, errno.EOPNOTSUPP, 524):
        done = 0
    return done, number


# ---- Pins and identities -------------------------------------------------------


def obj_pin(fd: int, path: str) -> None:
    """Pin a map, program or link at `path` in a bpffs. EEXIST if the path is taken."""
    name = path.encode() + b"\0"
    _bpf(_OBJ_PIN, struct.pack("<QII", _address(name), fd, 0), f"pin {path}")


def obj_get(path: str) -> int:
    """Open what is pinned at `path`. ENOENT if nothing is."""
    name = path.encode() + b"\0"
    return _bpf(_OBJ_GET, struct.pack("<QII", _address(name), 0, 0), f"open pin {path}")


def prog_fd_by_id(id_: int) -> int:
    """Descriptor of the program with this id. ENOENT if it is gone."""
    return _bpf(_PROG_FD_BY_ID, struct.pack("<III", id_, 0, 0), f"open program {id_}")


def map_fd_by_id(id_: int) -> int:
    """Descriptor of the map with this id. ENOENT if it is gone."""
    return _bpf(_MAP_FD_BY_ID, struct.pack("<III", id_, 0, 0), f"open map {id_}")


def link_fd_by_id(id_: int) -> int:
    """Descriptor of the link with this id. ENOENT if it is gone."""
    return _bpf(_LINK_FD_BY_ID, struct.pack("<III", id_, 0, 0), f"open link {id_}")


def _info(fd: int, size: int, what: str) -> bytes:
    buffer = ctypes.create_string_buffer(size)
    attr = struct.pack("<IIQ", fd, size, ctypes.addressof(buffer))
    _bpf(_OBJ_INFO, attr, f"read the info of {what} {fd}")
    return buffer.raw


@dataclass(frozen=True, slots=True)
class MapInfo:
    """struct bpf_map_info; sizes in bytes."""

    type: int
    id: int
    key_size: int
    value_size: int
    max_entries: int
    flags: int
    name: str
    btf_id: int  # of the types that its maker knew; 0 = none


@dataclass(frozen=True, slots=True)
class ProgInfo:
    """struct bpf_prog_info; sizes in bytes, `run_time` in ns (0 unless statistics are on)."""

    type: int
    id: int
    tag: str
    jited_size: int
    translated_size: int
    name: str
    run_time: int
    run_count: int
    verified_insns: int


@dataclass(frozen=True, slots=True)
class LinkInfo:
    """struct bpf_link_info. `ifindex` is 0 for links to cgroups and for those whose interface is
    gone; `cgroup_id` is 0 for links to interfaces and when the cgroup is gone. Of XDP the kernel
    does not tell `attach_type`: it is always `AttachType.XDP`."""

    type: int
    id: int
    prog_id: int
    ifindex: int
    cgroup_id: int
    attach_type: int


_LINK_TYPE_CGROUP = 3
_LINK_TYPE_XDP = 6
_LINK_TYPE_TCX = 11


def map_info(fd: int) -> MapInfo:
    """What the kernel knows of a map. EINVAL if `fd` is no bpf object."""
    raw = _info(fd, 88, "map")
    type_, id_, key_size, value_size, max_entries, flags, name = struct.unpack_from("<6I16s", raw)
    (btf_id,) = struct.unpack_from("<I", raw, 64)
    return MapInfo(
        type_, id_, key_size, value_size, max_entries, flags, name.rstrip(b"\0").decode(), btf_id
    )


def btf_by_id(id_: int) -> bytes:
    """The types behind `MapInfo.btf_id`, as in a .BTF section. ENOENT if they are gone."""
    fd = _bpf(_BTF_FD_BY_ID, struct.pack("<III", id_, 0, 0), f"open BTF {id_}")
    try:
        # struct bpf_btf_info: address and size of a buffer that the kernel fills; first its size.
        (size,) = struct.unpack_from("<8xI", _btf_info(fd, b""))
        buffer = ctypes.create_string_buffer(size)
        _btf_info(fd, buffer)
        return buffer.raw
    finally:
        os.close(fd)


def _btf_info(fd: int, into: bytes | ctypes.Array[ctypes.c_char]) -> bytes:
    size = len(into)
    asked = struct.pack("<QII", _address(into) if size else 0, size, 0).ljust(32, b"\0")
    info = ctypes.create_string_buffer(asked, len(asked))
    attr = struct.pack("<IIQ", fd, len(info), ctypes.addressof(info))
    _bpf(_OBJ_INFO, attr, f"read the info of BTF {fd}")
    return info.raw


def prog_info(fd: int) -> ProgInfo:
    """What the kernel knows of a program. EINVAL if `fd` is no bpf object."""
    raw = _info(fd, 232, "program")
    type_, id_, tag, jited, translated = struct.unpack_from("<II8sII", raw)
    name = raw[64:80].rstrip(b"\0").decode()
    run_time, run_count, _missed, verified = struct.unpack_from("<QQQI", raw, 192)
    return ProgInfo(type_, id_, tag.hex(), jited, translated, name, run_time, run_count, verified)


def link_info(fd: int) -> LinkInfo:
    """What the kernel knows of a link. EINVAL if `fd` is no bpf object."""
    raw = _info(fd, 64, "link")
    type_, id_, prog_id = struct.unpack_from("<III", raw)
    ifindex = cgroup_id = attach_type = 0
    if type_ == _LINK_TYPE_TCX:
        ifindex, attach_type = struct.unpack_from("<II", raw, 16)
    elif type_ == _LINK_TYPE_XDP:
        (ifindex,), attach_type = struct.unpack_from("<I", raw, 16), AttachType.XDP
    elif type_ == _LINK_TYPE_CGROUP:
        cgroup_id, attach_type = struct.unpack_from("<QI", raw, 16)
    return LinkInfo(type_, id_, prog_id, ifindex, cgroup_id, attach_type)


# ---- Links ---------------------------------------------------------------------


def link_create(
    prog_fd: int,
    target: int,
    attach_type: int,
    name: str = "program",
    *,
    first: bool = False,
    flags: int = 0,
) -> int:
    """Attach a program; the link lives as long as its descriptor or a pin.

    `target` is an interface index of the calling thread's network namespace for tcx and XDP
    (ENODEV if there is none), a descriptor of a cgroup v2 directory for cgroup hooks.
    `first` (tcx): before the programs that are there, else after them. `flags`: the hook's own.
    """
    flags |= _F_BEFORE if first else 0
    attr = struct.pack("<IIII32x", prog_fd, target, attach_type, flags)
    try:
        kind = AttachType(attach_type).name.lower()
    except ValueError:
        kind = str(attach_type)
    return _bpf(_LINK_CREATE, attr, f"attach {name} as {kind}")


def prog_query(target: int, attach_type: int) -> list[int]:
    """Ids of the programs at a tcx hook, in the order that they run; `target` as for
    `link_create`."""
    ids = (ctypes.c_uint32 * _QUERIED)()
    attr = ctypes.create_string_buffer(
        struct.pack("<IIIIQI36x", target, attach_type, 0, 0, ctypes.addressof(ids), _QUERIED), 64
    )
    _, number = _call(_PROG_QUERY, attr)
    if number == errno.ENOENT:  # nothing was ever attached; before Linux 6.8
        return []
    if number:
        raise _fail(number, f"query programs of interface {target}")
    (count,) = struct.unpack_from("<I", attr, 24)
    return list(ids[:count])


def link_update(link_fd: int, prog_fd: int, name: str = "link") -> None:
    """Replace the program of a link without a gap. ENOLINK: what it was attached to is gone."""
    _bpf(_LINK_UPDATE, struct.pack("<IIII", link_fd, prog_fd, 0, 0), f"update {name}")


def link_detach(link_fd: int, name: str = "link") -> None:
    """Detach, whoever else holds the link."""
    _bpf(_LINK_DETACH, struct.pack("<I", link_fd), f"detach {name}")


# ---- Programs ------------------------------------------------------------------


def prog_load(type_: int, insns: bytes, name: str = "probe", license_: str = "GPL") -> int:
    """Load raw instructions (8 bytes each). For probes; real programs come from an object."""
    text = license_.encode() + b"\0"
    attr = struct.pack(
        "<IIQQIIQII16s",
        type_,
        len(insns) // 8,
        _address(insns),
        _address(text),
        0,
        0,
        0,
        0,
        0,
        name.encode()[:15],
    )
    return _bpf(_PROG_LOAD, attr, f"load program {name}")


SKB_SIZE = 192
"""sizeof(struct __sk_buff) as test runs know it."""
SKB_MARK = 8
"""Byte offset of __sk_buff.mark."""
SKB_CB = 48
"""Byte offset of __sk_buff.cb, five __u32."""
_SKB_INGRESS_IFINDEX = 36
_SKB_IFINDEX = 40


def skb_context(
    *, mark: int = 0, cb: tuple[int, ...] = (), ifindex: int = 0, ingress_ifindex: int = 0
) -> bytes:
    """A struct __sk_buff to run a tc program with. The kernel refuses (ENODEV) an ifindex
    that is not in the calling thread's network namespace, and other fields set (EINVAL)."""
    context = bytearray(SKB_SIZE)
    struct.pack_into("<I", context, SKB_MARK, mark)
    struct.pack_into(f"<{len(cb)}I", context, SKB_CB, *cb)
    struct.pack_into("<I", context, _SKB_INGRESS_IFINDEX, ingress_ifindex)
    struct.pack_into("<I", context, _SKB_IFINDEX, ifindex)
    return bytes(context)


def xdp_context(length: int, ifindex: int) -> bytes:
    """A struct xdp_md to run an XDP program with, on a frame of `length` bytes. The interface is
    one of the calling thread's network namespace with XDP in use (else EINVAL); 0: loopback."""
    return struct.pack("<6I", 0, length, 0, ifindex, 0, 0)


@dataclass(frozen=True, slots=True)
class TestRun:
    """Outcome of a test run: the program's return value, the packet and the context as it
    left them, and the time it took in ns (a single run: includes warm-up)."""

    __test__ = False

    retval: int
    data: bytes
    context: bytes
    duration: int

    @property
    def mark(self) -> int:
        """__sk_buff.mark afterwards."""
        mark: int = struct.unpack_from("<I", self.context, SKB_MARK)[0]
        return mark

    @property
    def cb(self) -> tuple[int, ...]:
        """__sk_buff.cb afterwards, five values."""
        return struct.unpack_from("<5I", self.context, SKB_CB)


_F_TEST_XDP_LIVE_FRAMES = 1 << 1
_HEADROOM = 512
"""Bytes that a program may add to a packet before the run is refused with ENOSPC."""


def prog_test_run(
    prog_fd: int,
    data: bytes,
    context: bytes = b"",
    *,
    repeat: int = 1,
    live: bool = False,
    name: str = "program",
) -> TestRun:
    """Run a loaded program on `data` (at least 14 bytes: an Ethernet header) once.

    `context` is a struct __sk_buff (see `skb_context`), a struct xdp_md (`xdp_context`) or empty.
    `repeat` above 1 does not restore the packet between runs: only for programs that leave it
    alone. `live` (XDP): frames really go where the program sends them, and the kernel begins with
    as many as it takes at once; their pointers are restored between runs, what was written not.
    """
    out = ctypes.create_string_buffer(len(data) + _HEADROOM)
    context_out = ctypes.create_string_buffer(len(context) or 1)
    attr = ctypes.create_string_buffer(
        struct.pack(
            "<4I2Q4I2Q4I",
            prog_fd,
            0,
            len(data),
            0 if live else len(out),
            _address(data),
            0 if live else ctypes.addressof(out),
            repeat,
            0,
            len(context),
            0 if live else len(context),
            _address(context) if context else 0,
            ctypes.addressof(context_out) if context and not live else 0,
            _F_TEST_XDP_LIVE_FRAMES if live else 0,
            0,
            0,
            0,
        ),
        80,
    )
    _, number = _call(_PROG_TEST_RUN, attr)
    if number:
        raise _fail(number, f"test-run {name}")
    retval, _, size_out = struct.unpack_from("<III", attr, 4)
    duration, _, context_size = struct.unpack_from("<III", attr, 36)
    return TestRun(
        ctypes.c_int32(retval).value, out.raw[:size_out], context_out.raw[:context_size], duration
    )
