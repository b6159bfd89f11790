"""Attaching programs: pinned links, replaced in place, attached anew when severed.

A pinned link outlives its process, so packets are judged while the agent restarts. Links
know their place by the pin's path; whoever attaches again at a path gets the link that
is there with the new program (no gap), unless what it was attached to is gone.
Only links that are pinned in our directory are ever detached.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from . import syscall
from .syscall import AttachType, LinkInfo

__all__ = [
    "CGROUP_HOOKS",
    "Direction",
    "Link",
    "XdpMode",
    "attach_cgroup",
    "attach_tcx",
    "attach_xdp",
    "links_in",
    "open_link",
    "program_name",
    "remove",
    "tcx_programs",
]

Direction = Literal["ingress", "egress"]
XdpMode = Literal["native", "generic"]
_Fits = Callable[[LinkInfo], bool]

_TCX = {"ingress": AttachType.TCX_INGRESS, "egress": AttachType.TCX_EGRESS}

# XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE of linux/if_link.h
_XDP: dict[XdpMode, int] = {"native": 1 << 2, "generic": 1 << 1}

CGROUP_HOOKS = {
    "cgroup/connect4": AttachType.CGROUP_INET4_CONNECT,
    "cgroup/connect6": AttachType.CGROUP_INET6_CONNECT,
    "cgroup/sendmsg4": AttachType.CGROUP_UDP4_SENDMSG,
    "cgroup/sendmsg6": AttachType.CGROUP_UDP6_SENDMSG,
    "cgroup/recvmsg4": AttachType.CGROUP_UDP4_RECVMSG,
    "cgroup/recvmsg6": AttachType.CGROUP_UDP6_RECVMSG,
    "cgroup/getpeername4": AttachType.CGROUP_INET4_GETPEERNAME,
    "cgroup/getpeername6": AttachType.CGROUP_INET6_GETPEERNAME,
}
"""Section of a program (`Object.programs`) → where it attaches."""


@dataclass(slots=True)
class Link:
    """A pinned link. Owns its descriptor; closing it does not detach, the pin holds."""

    fd: int
    path: str

    @property
    def info(self) -> LinkInfo:
        """The kernel's info, now."""
        return syscall.link_info(self.fd)

    @property
    def severed(self) -> bool:
        """Is the interface or cgroup that it was attached to gone?"""
        info = self.info
        return info.ifindex == 0 and info.cgroup_id == 0

    def update(self, prog_fd: int) -> None:
        """Replace the program in place. OSError(ENOLINK) if severed."""
        syscall.link_update(self.fd, prog_fd, f"link {self.path}")

    def close(self) -> None:
        """Close the descriptor. May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def attach_tcx(
    prog_fd: int, ifindex: int, direction: Direction, path: str, *, first: bool = False
) -> Link:
    """Attach a tc program to an interface of the calling thread's network namespace; `first`:
    before the programs that are there, else after them.

    If a link is pinned at `path` and still attached to that interface and direction, it gets
    the program in place; otherwise it is removed and a new one made. OSError(ENODEV) if the
    interface does not exist. An index says nothing about its namespace: use a directory of
    pins per namespace.
    """
    attach_type = _TCX[direction]
    kept = _update_pinned(
        prog_fd, path, lambda info: info.ifindex == ifindex and info.attach_type == attach_type
    )
    if kept is not None:
        return kept
    return _pin(
        syscall.link_create(
            prog_fd, ifindex, attach_type, f"{path} to interface {ifindex}", first=first
        ),
        path,
    )


def attach_xdp(prog_fd: int, ifindex: int, mode: XdpMode, path: str, *, anew: bool = False) -> Link:
    """Attach an XDP program to an interface of the calling thread's network namespace. Pins as
    `attach_tcx`, but a link that is there keeps its mode: with `anew` it is removed first, and
    frames go by for a moment. OSError(EOPNOTSUPP): the driver has no XDP of this mode, or not
    with the interface's settings (EINVAL, ENOMEM, ERANGE: by driver); (EBUSY): another program
    is there; (EEXIST): one of the other mode; (ENODEV): there is no interface."""
    if anew:
        remove(path)
    kept = _update_pinned(
        prog_fd, path, lambda info: info.ifindex == ifindex and info.attach_type == AttachType.XDP
    )
    if kept is not None:
        return kept
    fd = syscall.link_create(
        prog_fd, ifindex, AttachType.XDP, f"{path} to interface {ifindex}", flags=_XDP[mode]
    )
    return _pin(fd, path)


def tcx_programs(ifindex: int, direction: Direction) -> list[int]:
    """Ids of the tcx programs of an interface of the calling thread's network namespace, in
    the order that they run, whosever they are. OSError(ENODEV) if there is none."""
    return syscall.prog_query(ifindex, _TCX[direction])


def attach_cgroup(prog_fd: int, cgroup: str, section: str, path: str) -> Link:
    """Attach a program to a cgroup v2 directory and all below it. `section` is the program's
    section in C ("cgroup/connect4"). Pins as `attach_tcx`. OSError(ENOENT) if the directory
    does not exist, (EBADF) if it is no cgroup v2."""
    attach_type = CGROUP_HOOKS[section]
    target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        # A cgroup's id is the inode number of its directory (kernfs, 64-bit).
        inode = os.fstat(target).st_ino
        kept = _update_pinned(
            prog_fd,
            path,
            lambda info: info.cgroup_id == inode and info.attach_type == attach_type,
        )
        if kept is not None:
            return kept
        return _pin(syscall.link_create(prog_fd, target, attach_type, f"{path} to {cgroup}"), path)
    finally:
        os.close(target)


def open_link(path: str) -> Link | None:
    """The link pinned at `path`, or None if nothing is there."""
    try:
        return Link(syscall.obj_get(path), path)
    except FileNotFoundError:
        return None


def program_name(program: int) -> str:
    """Of a program by its id; "a program" when that may not be known."""
    try:
        fd = syscall.prog_fd_by_id(program)
    except OSError as error:
        if error.errno in (errno.EPERM, errno.ENOENT):
            return "a program"
        raise
    try:
        return syscall.prog_info(fd).name or "a program"
    finally:
        os.close(fd)


def links_in(directory: str) -> dict[str, LinkInfo]:
    """Pins in `directory` → their links' info; what is no link is left out."""
    found: dict[str, LinkInfo] = {}
    with contextlib.suppress(FileNotFoundError):
        for name in sorted(os.listdir(directory)):
            with contextlib.suppress(OSError):
                link = open_link(os.path.join(directory, name))
                if link is not None:
                    with link:
                        found[name] = link.info
    return found


def remove(path: str) -> bool:
    """Detach the link pinned at `path` and unpin it; False if nothing was there."""
    link = open_link(path)
    if link is None:
        return False
    with link:
        # Severed links have nothing to detach from.
        with contextlib.suppress(OSError):
            syscall.link_detach(link.fd, path)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
    return True


# ---- Inside --------------------------------------------------------------------


def _update_pinned(prog_fd: int, path: str, fits: _Fits) -> Link | None:
    link = open_link(path)
    if link is None:
        return None
    try:
        if fits(link.info):
            link.update(prog_fd)
            return link
    except OSError as error:
        if error.errno != errno.ENOLINK:
            link.close()
            raise
    link.close()
    remove(path)
    return None


def _pin(fd: int, path: str) -> Link:
    try:
        syscall.obj_pin(fd, path)
    except OSError:
        os.close(fd)
        raise
    return Link(fd, path)
