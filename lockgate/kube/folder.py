"""A folder of manifests as a source of objects, watched for changes.

All files together are one state: a change is passed on when the whole folder is right, else its
errors are, and the objects stay those of the last good state. That the folder is gone or empty is
an error too: nobody means to end everything by moving it away. Only files that changed are read
again, so a saved file is parsed a millisecond or two after it was closed.
"""

from __future__ import annotations

import asyncio
import errno
import os
import stat
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
from asyncinotify import Event, Inotify, Mask

from lockgate.objects.model import Object
from lockgate.objects.parse import ManifestError, Parsed, merge, parse

__all__ = ["Folder", "Update"]

SUFFIXES = (".yaml", ".yml", ".json")
#: Editors move a file away before they write it anew: a file is gone when it stays away.
GONE_AFTER = 0.1

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
        if self._single:
            self._watch(self.path.parent)
        else:
            self._inotify.add_watch(self.path.parent, _WATCHED_ABOVE)
            self._watch(self.path)
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
        if event.mask & Mask.ISDIR:
            if self._single or path.name.startswith("."):
                return False
            if event.mask & (Mask.CREATE | Mask.MOVED_TO):
                self._watch(path)
                self.refresh()
            else:
                self._away |= {known for known in self._parsed if path in known.parents}
            return False
        if not self._wanted(path):
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
        self._away.discard(path)
        return self._read(path)

    def _take_itself(self, event: Event) -> None:
        if event.path != self.path:
            return
        if event.mask & (Mask.CREATE | Mask.MOVED_TO):
            self._watch(self.path)
            self.refresh()
        else:
            self._away.add(self.path)

    def _settle(self) -> None:
        away, self._away = self._away, set()
        changed = False
        if not self._single and self.path in away:
            away = set()
            self.refresh()
        for path in away:
            if path.exists():
                changed |= self._changed(path) and self._read(path)
            else:
                changed |= self._forget(path)
        if changed:
            self._publish()

    def _watch(self, folder: Path) -> None:
        try:
            self._inotify.add_watch(folder, _WATCHED)
        except OSError:
            return  # it has gone already
        if not self._single:
            for entry in os.scandir(folder):
                if entry.is_dir(follow_symlinks=False) and not entry.name.startswith("."):
                    self._watch(folder / entry.name)

    # ---- Files ----------------------------------------------------------------

    def _wanted(self, path: Path) -> bool:
        if self._single:
            return path == self.path
        return path.suffix in SUFFIXES and not path.name.startswith(".")

    def _files(self) -> list[Path]:
        if self._single:
            return [self.path] if self.path.exists() else []
        result = []
        for root, folders, names in os.walk(self.path):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            result += [path for name in names if self._wanted(path := Path(root, name))]
        return sorted(result)

    def _changed(self, path: Path) -> bool:
        try:
            return self._versions.get(path) != _version(os.stat(path))
        except OSError:
            return True

    def _read(self, path: Path) -> bool:
        source = path.name if self._single else str(path.relative_to(self.path))
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
        return _version(status), file.read()


def _version(status: os.stat_result) -> Version:
    return status.st_ino, status.st_size, status.st_mtime_ns
