"""python -m tests.system.seccomp SYSCALL[:FIRST] ERRNO COMMAND…: runs a command on a kernel that
answers one system call (with that first argument) with an error, as one that lacks it would."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys

_NUMBERS = {
    "x86_64": {"bpf": 321, "unshare": 272, "sendto": 44},
    "aarch64": {"bpf": 280, "unshare": 97, "sendto": 206},
}
_NO_NEW_PRIVILEGES, _SECCOMP, _FILTER = 38, 22, 2  # prctl(2)
_LOAD, _EQUAL, _RETURN = 0x20, 0x15, 0x06  # linux/bpf_common.h
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000  # linux/seccomp.h
_NUMBER, _FIRST = 0, 16  # in struct seccomp_data


def refuse(name: str, first: int | None, number: int) -> None:
    """From now on, in this process and its children."""
    wanted = [(_NUMBER, _NUMBERS[platform.machine()][name])]
    if first is not None:
        wanted.append((_FIRST, first))
    code = b""
    for left, (offset, value) in zip(range(len(wanted) - 1, -1, -1), wanted, strict=True):
        code += struct.pack("=HBBI", _LOAD, 0, 0, offset)
        code += struct.pack("=HBBI", _EQUAL, 0, 2 * left + 1, value)
    code += struct.pack("=HBBI", _RETURN, 0, 0, _ERRNO | number)
    code += struct.pack("=HBBI", _RETURN, 0, 0, _ALLOW)
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(buffer))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((_NO_NEW_PRIVILEGES, 1, 0, 0, 0), (_SECCOMP, _FILTER, program, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    call, _, argument = sys.argv[1].partition(":")
    refuse(call, int(argument) if argument else None, getattr(errno, sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])
