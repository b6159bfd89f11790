"""The pinned rings and counters of one node, opened when they are there.

The rings outlive agents. When their pins are not there yet, or were made anew, the source
waits and opens them again; a ring has one reader at a time, the observer. During an upgrade
there may be rings of another version: they are read until their pins go, and a last time then.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

import numpy as np

from lockgate.bpf.btf import Schema
from lockgate.bpf.maps import Map, PerCpuArray
from lockgate.bpf.pins import OtherPin, convert, other_pins, pin_names, ring_record
from lockgate.bpf.ring import Ring
from lockgate.bpf.syscall import map_info, obj_get
from lockgate.observer.flows import FlowLog
from lockgate.observer.records import events_of
from lockgate.observer.tally import Tally

__all__ = ["Source"]

_BATCH = 65536


class Source:
    """Moves events from the kernel into a FlowLog, and counts them."""

    def __init__(self, pins: Path, schema: Schema, log: FlowLog, tally: Tally) -> None:
        self._pins, self._log, self._tally = pins, log, tally
        self._names = pin_names(schema)
        self._event, self._raw = schema.dtype("event"), schema.dtype("event_raw")
        counters = schema.enum("counter")
        self._written, self._lost = counters["COUNT_EVENTS"], counters["COUNT_EVENTS_LOST"]
        self._cut = counters["COUNT_EVENTS_CUT"]
        self._rings: list[Ring] = []
        self._others: dict[Path, Ring] = {}
        self._counters: PerCpuArray | None = None
        self.decoded = 0
        self.error = "waiting for the agent to pin its rings"

    @property
    def ready(self) -> bool:
        return bool(self._rings)

    def filenos(self) -> list[int]:
        """Descriptors that are readable when there are events."""
        return [ring.fileno() for ring in (*self._rings, *self._others.values())]

    def open(self) -> bool:
        """Opens what is pinned, if it is not what is open already; True if anything changed."""
        changed = self._open_others()
        return self._open_own() or changed

    def _open_own(self) -> bool:
        if self._rings and all(self._current(ring) for ring in self._rings):
            return False
        was = self.ready
        if was:
            with suppress(OSError, ValueError):
                self.read()  # the last words of rings that were replaced
        self._close_own()
        opened: list[Map] = []
        try:
            events = Ring.open(self._pin("events"), self._event)
            opened.append(events)
            raw = Ring.open(self._pin("events_raw"), self._raw)
            opened.append(raw)
            self._counters = PerCpuArray.open(self._pin("counters"), "<u8")
        except (OSError, TypeError) as error:
            for one in opened:
                one.close()
            self.error = f"waiting for the agent to pin its rings ({error})"
            return was
        self._rings, self.error = [events, raw], ""
        return True

    def read(self, limit: int = 16) -> bool:
        """Takes what is there, at most `limit` batches; True if there may be more.

        What is written meanwhile stays for the next time: whoever writes the first record after
        the last one read wakes the reader, and pays for that (13 µs on a virtual machine)."""
        more = False
        for ring in (*self._others.values(), *self._rings):
            end = ring.written
            for _ in range(limit):
                records = ring.read(_BATCH)
                if not len(records):
                    break
                # Ids are journalled before they go live: now every one can be resolved.
                self._log.journal.refresh()
                if "head" in (records.dtype.names or ()):
                    raw = convert(records, self._raw)
                    events, heads = events_of(raw["event"], raw["head"])
                else:
                    events, heads = events_of(convert(records, self._event))
                self._log.add(events, heads)
                self._tally.add(events)
                self.decoded += len(events)
                if ring.taken >= end:
                    break
            else:
                more = True
        return more

    def counts(self) -> dict[str, int]:
        """Exact, by the kernel's own counters: events written, events lost for want of room or
        because there were too many about one pod; and bytes that wait in the rings."""
        if self._counters is None:
            return {"events": 0, "lost": 0, "cut": 0, "pending": 0}
        totals = np.asarray(self._counters.values()).sum(axis=1)
        return {
            "events": int(totals[self._written]),
            "lost": int(totals[self._lost]),
            "cut": int(totals[self._cut]),
            "pending": sum(ring.pending for ring in self._rings),
        }

    def close(self) -> None:
        for ring in self._others.values():
            ring.close()
        self._others.clear()
        self._close_own()

    def _close_own(self) -> None:
        for ring in self._rings:
            ring.close()
        self._rings = []
        if self._counters is not None:
            self._counters.close()
            self._counters = None

    def _open_others(self) -> bool:
        """Open and let go of rings of other versions; True if anything changed."""
        with suppress(FileNotFoundError):
            found = {
                pin.path: pin
                for pin in other_pins(self._pins, self._names)
                if pin.name in ("events", "events_raw")
            }
            gone, new = set(self._others) - set(found), set(found) - set(self._others)
            if gone:
                with suppress(OSError, ValueError):
                    self.read()
            for path in gone:
                self._others.pop(path).close()
            opened = [self._open_other(found[path]) for path in sorted(new)]
            return any(opened) or bool(gone)
        return False

    def _open_other(self, pin: OtherPin) -> bool:
        with suppress(OSError, TypeError):
            record = ring_record(pin)
            if record is not None:
                self._others[pin.path] = Ring.open(str(pin.path), record)
                return True
        return False

    def _pin(self, name: str) -> str:
        return str(self._pins / self._names[name])

    def _current(self, ring: Ring) -> bool:
        try:
            fd = obj_get(str(self._pins / ring.name))
        except OSError:
            return True  # unpinned, but what we hold may still be written to
        try:
            return map_info(fd).id == ring.info.id
        finally:
            os.close(fd)
