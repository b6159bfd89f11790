"""A folder of manifests as a source of objects, watched for changes.

All files together are one state: a change is passed on when the whole folder is right, else its
errors are, and the objects stay those of the last good state. That the folder is gone or empty is
an error too: nobody means to end everything by moving it away. Only files that changed are read
again, so a saved file is parsed a millisecond or two after it was closed.

Links are followed, and the folders that they lead through are watched as well: what a link means
changes with them (a mounted ConfigMap is saved by moving a link in the folder itself).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec
from asyncinotify import Event, Inotify, Mask

from lockgate.objects.model import Object
from lockgate.objects.parse import ManifestError, Parsed, merge, parse

__all__ = ["Folder", "Update"]

SUFFIXES = (".yaml", ".yml", ".json")
#: Editors move a file away before they write it anew: a file is gone when it stays away.
GONE_AFTER = 0.1
#: Bytes of one file; ten thousand pods take five million.
LARGEST = 32 << 20
#: As many links one after the other as the kernel follows.
LINKS = 40

_WATCHED = (
    Mask.CLOSE_WRITE
    | Mask.MOVED_TO
    | Mask.MOVED_FROM
    | Mask.CREATE
    | Mask.DELETE
    | Mask.DELETE_SELF
    | Mask.ONLYDIR
)
# Of the folder above: whether ours went, or came back.
_WATCHED_ABOVE = Mask.CREATE | Mask.MOVED_TO | Mask.MOVED_FROM | Mask.DELETE | Mask.ONLYDIR

# What tells a version of a file from another: inode, size, mtime.
Version = tuple[int, int, int]


class Update(msgspec.Struct, frozen=True):
    """The state of the folder. With errors, `objects` are those of the last good state."""

    objects: list[Object]
    warnings: list[str] = []
    errors: list[str] = []
    #: Counts updates; the first is 1.
    number: int = 0


class Folder:
    """One file, or all *.yaml, *.yml and *.json below a folder; hidden ones are left out.

    ::

        with Folder(path) as folder:
            async for update in folder: ...     # the first at once

    `refresh` looks for changes without waiting for the kernel to tell them.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path).absolute()
        if not self.path.exists():
            raise FileNotFoundError(f"{path}: no such file or folder")
        self._single = not self.path.is_dir()
        self._parsed: dict[Path, Parsed | str] = {}
        self._versions: dict[Path, Version] = {}
        self._good: list[Object] = []
        self._warnings: list[str] = []
        self._number = 0
        self._is_gone = False
        self._inotify = Inotify()
        #: Folders that are watched, and what changes the meaning of links: they, and their targets.
        self._watched: set[tuple[int, int]] = set()
        self._on_the_way: set[Path] = set()
        self._away: set[Path] = set()
        self._fresh = asyncio.Event()
        self.current = Update(objects=[])

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._inotify.close()

    async def __aiter__(self) -> AsyncIterator[Update]:
        if not self._single:
            self._inotify.add_watch(self.path.parent, _WATCHED_ABOVE)
        self._watch()
        self.refresh(first=True)
        seen = 0
        events = asyncio.create_task(self._follow())
        try:
            while True:
                if self.current.number != seen:
                    seen = self.current.number
                    yield self.current
                    continue
                self._fresh.clear()
                woken = asyncio.create_task(self._fresh.wait())
                await asyncio.wait({woken, events}, return_when=asyncio.FIRST_COMPLETED)
                woken.cancel()
                if events.done():
                    events.result()
                    return
        finally:
            events.cancel()

    def refresh(self, *, first: bool = False) -> Update:
        """Compares every file with what was read, reads what differs; the state as of now."""
        found = self._files()
        changed = [self._read(path) for path in found if self._changed(path)]
        changed += [self._forget(path) for path in set(self._parsed).difference(found)]
        if any(changed) or first or self._is_gone != (not self.path.exists()):
            self._publish()
        return self.current

    # ---- Events ---------------------------------------------------------------

    async def _follow(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            event = await self._inotify.get()
            if event.mask & Mask.Q_OVERFLOW:
                self.refresh()
            elif self._take(event):
                self._publish()
            if self._away:
                loop.call_later(GONE_AFTER, self._settle)

    def _take(self, event: Event) -> bool:
        """Whether an event changed what was parsed."""
        path = event.path
        if path is None or event.mask & (Mask.IGNORED | Mask.DELETE_SELF):
            return False
        if not self._single and path.parent == self.path.parent:
            self._take_itself(event)
            return False
        if not self._wanted(path) and self._concerns_folder(path, event):
            if event.mask & (Mask.CREATE | Mask.MOVED_TO):
                self._watch()
                self.refresh()
            else:
                self._away |= {known for known in self._parsed if path in known.parents}
            return False
        on_the_way = path in self._on_the_way
        if not self._wanted(path) and not on_the_way:
            return False
        if event.mask & (Mask.DELETE | Mask.MOVED_FROM):
            self._away.add(path)
            return False
        if event.mask & Mask.CREATE:
            # A file just made is read when its writer closes it; links come complete.
            try:
                status = path.lstat()
            except FileNotFoundError:
                return False
            if not stat.S_ISLNK(status.st_mode) and status.st_nlink < 2:
                return False
        if on_the_way:
            self.refresh()
            return False
        self._away.discard(path)
        return self._read(path)

    def _concerns_folder(self, path: Path, event: Event) -> bool:
        """Whether an event of a name that is no manifest's is about a folder, or a link to one."""
        if self._single or path.name.startswith(".") or self.path not in path.parents:
            return False
        if event.mask & Mask.ISDIR:
            return True
        if event.mask & (Mask.DELETE | Mask.MOVED_FROM):
            return any(path in known.parents for known in self._parsed)
        return path.is_symlink() and path.is_dir()

    def _take_itself(self, event: Event) -> None:
        if event.path != self.path:
            return
        if event.mask & (Mask.CREATE | Mask.MOVED_TO):
            self._watch()
            self.refresh()
        else:
            self._away.add(self.path)

    def _settle(self) -> None:
        away, self._away = self._away, set()
        changed = False
        refreshing = self._on_the_way | (set() if self._single else {self.path})
        if away & refreshing:
            self.refresh()
            away -= refreshing
        if any(not path.parent.exists() for path in away):
            self._watch()  # a link may lead elsewhere by another name
        for path in away:
            if path.exists():
                changed |= self._changed(path) and self._read(path)
            else:
                changed |= self._forget(path)
        if changed:
            self._publish()

    def _watch(self) -> None:
        """Watches every folder; right again when some are watched already."""
        self._watched.clear()
        for folder in [self.path.parent] if self._single else self._folders():
            self._watch_one(folder)
        for path in self._parsed:
            if path.is_symlink():
                self._follow_link(path)

    def _follow_link(self, link: Path) -> None:
        """Watches what decides where a link leads, beyond the folders that are watched."""
        self._on_the_way |= (steps := _steps(link) - {link})
        for folder in {step.parent for step in steps}:
            with contextlib.suppress(OSError):
                if _identity(folder) not in self._watched:
                    self._watch_one(folder)

    def _watch_one(self, folder: Path) -> None:
        with contextlib.suppress(OSError):  # it has gone already
            watch = self._inotify.add_watch(folder, _WATCHED)
            if watch.path != folder:  # it was watched by another name
                self._inotify.rm_watch(watch)
                self._inotify.add_watch(folder, _WATCHED)
            self._watched.add(_identity(folder))

    # ---- Files ----------------------------------------------------------------

    def _wanted(self, path: Path) -> bool:
        if self._single:
            return path == self.path
        return path.suffix in SUFFIXES and not path.name.startswith(".")

    def _files(self) -> list[Path]:
        if self._single:
            return [self.path] if self.path.exists() else []
        result = []
        for folder in self._folders():
            with contextlib.suppress(OSError), os.scandir(folder) as entries:
                found = [Path(entry) for entry in entries if not os.path.isdir(entry.path)]
                result += [path for path in found if self._wanted(path)]
        return sorted(result)

    def _folders(self) -> Iterator[Path]:
        """The folder and those below, each once whatever links lead there, in a ring, too."""
        seen = set()
        for root, folders, _ in os.walk(self.path, followlinks=True):
            place = Path(root)
            try:
                identity = _identity(place)
            except OSError:
                continue
            if identity in seen:
                folders.clear()
                continue
            seen.add(identity)
            # Real ones first: a link to a folder beside it adds nothing.
            folders[:] = sorted(
                (name for name in folders if not name.startswith(".")),
                key=lambda name: (os.path.islink(os.path.join(root, name)), name),
            )
            for name in folders:
                if (place / name).is_symlink():
                    self._follow_link(place / name)
            yield place

    def _changed(self, path: Path) -> bool:
        try:
            return self._versions.get(path) != _version(os.stat(path))
        except OSError:
            return True

    def _read(self, path: Path) -> bool:
        source = path.name if self._single else str(path.relative_to(self.path))
        if path.is_symlink():
            self._follow_link(path)
        try:
            version, data = _content(path)
        except FileNotFoundError:
            return self._forget(path)
        except OSError as error:
            complaint = f"{source}: {error.strerror}"
            self._versions.pop(path, None)
            changed = self._parsed.get(path) != complaint
            self._parsed[path] = complaint
            return changed
        self._versions[path] = version
        try:
            self._parsed[path] = parse(data, source)
        except ManifestError as error:
            self._parsed[path] = str(error)
        return True

    def _forget(self, path: Path) -> bool:
        self._versions.pop(path, None)
        return self._parsed.pop(path, None) is not None

    def _publish(self) -> None:
        in_order = [self._parsed[path] for path in sorted(self._parsed)]
        errors = [item for item in in_order if isinstance(item, str)]
        self._is_gone = not self.path.exists()
        if self._is_gone:
            errors = [f"{self.path}: no such file or folder any more"]
        elif not in_order:
            errors = [f"{self.path}: no manifests (*.yaml, *.yml or *.json)"]
        if not errors:
            try:
                merged = merge(item for item in in_order if isinstance(item, Parsed))
                self._good, self._warnings = merged.objects, merged.warnings
            except ManifestError as error:
                errors = [str(error)]
        self._number += 1
        self.current = Update(self._good, self._warnings, errors, self._number)
        self._fresh.set()


def _content(path: Path) -> tuple[Version, bytes]:
    """Raises OSError, also for what is no file: a pipe has no end, nor has /dev/zero."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    with os.fdopen(fd, "rb") as file:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "expected a regular file")
        if status.st_size > LARGEST:
            size = f"{status.st_size >> 20} MiB"
            raise OSError(errno.EFBIG, f"expected at most {LARGEST >> 20} MiB, got {size}")
        return _version(status), file.read()


def _identity(folder: Path) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino


def _steps(link: Path) -> set[Path]:
    """Every link on the way from a link to its target, and the target."""
    found: set[Path] = set()
    at, left = Path("/"), list(link.parts[1:])
    links = 0
    while left and links < LINKS:
        part = left.pop(0)
        if part == "..":
            at = at.parent
            continue
        entry = at / part
        if not entry.is_symlink():
            at = entry
            continue
        links += 1
        found.add(entry)
        target = Path(os.readlink(entry))
        if target.is_absolute():
            at = Path("/")
        left[:0] = [part for part in target.parts if part != target.anchor]
    return found | {at}


def _version(status: os.stat_result) -> Version:
    return status.st_ino, status.st_size, status.st_mtime_ns
