"""Second half of `bench.proxy`: from a slice's change to its effect, and starts from nothing."""

from __future__ import annotations

import asyncio
import random
import statistics
import subprocess
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench.proxies import (
    BACKEND_PORT,
    KINDS,
    PATIENCE,
    PLACES,
    PORT,
    RR,
    Node,
    address,
    cpu,
    resident,
    service,
    slice_of,
)
from bench.setups import Namespaces, run

__all__ = ["changes", "starts"]

ENDPOINTS = 5
Row = dict[str, Any]


# ---- Changes -------------------------------------------------------------------------


class Watch:
    """A client that connects again and again: what answered it from when on (ns, byte)."""

    def __init__(self, client: list[str], to: str) -> None:
        self._process = subprocess.Popen(
            [*client, str(RR), "watch", to, str(PORT)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.seen: list[tuple[int, str]] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            when, answer = line.split()
            self.seen.append((int(when), answer))

    @property
    def last(self) -> str:
        return self.seen[-1][1] if self.seen else "-"

    async def until(self, answer: str, node: Node) -> int:
        """When it was answered so first; TimeoutError."""
        late = time.monotonic() + PATIENCE
        while True:
            for when, one in self.seen:
                if one == answer:
                    return when
            node.check()
            if time.monotonic() > late:
                raise TimeoutError(f"{node.name}: no answer {answer}")
            await asyncio.sleep(0.005)

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()


class Changer:
    """Moves the first service from backend to backend, others' endpoints to other addresses."""

    def __init__(self, node: Node, count: int) -> None:
        self.node, self._count, self._place = node, count, 0
        self._random = random.Random(1)
        #: When what was written (ns, byte).
        self.written: list[tuple[int, str]] = []
        for number in range(1, count):
            ips = [self._elsewhere() for _ in range(ENDPOINTS)]
            node.api.put(service(number), slice_of(number, ips))

    def begin(self) -> None:
        """Once the server's address is known."""
        self.node.api.put(service(0), slice_of(0, [self.node.ip], BACKEND_PORT))

    def _elsewhere(self) -> str:
        pick = self._random.randrange
        return f"10.{pick(1, 99)}.{pick(256)}.{pick(1, 255)}"

    def move(self) -> None:
        self._place = (self._place + 1) % PLACES
        item = slice_of(0, [self.node.ip], BACKEND_PORT + self._place)
        self.written.append((time.monotonic_ns(), chr(ord("a") + self._place)))
        self.node.api.put(item)

    def other(self) -> None:
        number = self._random.randrange(1, self._count)
        self.node.api.put(slice_of(number, [self._elsewhere() for _ in range(ENDPOINTS)]))

    def delays(self, seen: list[tuple[int, str]]) -> list[float]:
        """ms from each write to the first answer of what was written then, or after it. Writes
        that nothing was seen of by the end count as nothing: the caller waits for the last."""
        found, at = [], 0
        for when, answer in seen:
            upto = next(
                (
                    number
                    for number in range(len(self.written) - 1, at - 1, -1)
                    if self.written[number][1] == answer and self.written[number][0] < when
                ),
                -1,
            )
            found += [(when - written) / 1e6 for written, _ in self.written[at : upto + 1]]
            at = max(at, upto + 1)
        self.written.clear()
        return found


async def apart(changer: Changer, seconds: float, pause: float) -> list[float]:
    """One at a time, each after `pause` seconds in which the one before was in force."""
    watch = Watch(changer.node.client, address(0))
    until = time.monotonic() + seconds
    while time.monotonic() < until or len(changer.written) < 3:
        await asyncio.sleep(pause * random.uniform(1, 1.2))
        changer.move()
        await _arrived(changer, watch)
    watch.stop()
    return changer.delays(watch.seen)


async def _arrived(changer: Changer, watch: Watch) -> None:
    """TimeoutError if what was written last does not come in force."""
    late = time.monotonic() + PATIENCE
    while watch.last != changer.written[-1][1]:
        changer.node.check()
        if time.monotonic() > late:
            raise TimeoutError(f"{changer.node.name}: the last change is not in force")
        await asyncio.sleep(0.01)


async def often(
    changer: Changer, seconds: float, rate: float
) -> tuple[list[float], dict[str, Row]]:
    """Every fourth change is of the service that is watched."""
    watch = Watch(changer.node.client, address(0))
    await asyncio.sleep(1)
    usage = Usage(changer.node)
    first = time.monotonic()
    for number in range(int(seconds * rate)):
        await asyncio.sleep(max(0.0, first + number / rate - time.monotonic()))
        changer.other() if number % 4 else changer.move()
    await asyncio.sleep(max(0.0, first + seconds - time.monotonic()))
    used = usage.end()
    await _arrived(changer, watch)
    watch.stop()
    return changer.delays(watch.seen), used


class Usage:
    """What a node's processes use from here on: processor time and memory."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._most: dict[str, float] = {}
        self._stop = threading.Event()
        self._before = {called: cpu(one.pid) for called, one in node.processes.items()}
        self._began = time.monotonic()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._stop.wait(0.02):
            for called, process in list(self._node.processes.items()):
                self._most[called] = max(self._most.get(called, 0.0), resident(process.pid))

    def end(self) -> dict[str, Row]:
        """By process: seconds, per cent of a processor, MB resident now and at most; each with
        the children that it ran, such as nft."""
        took = time.monotonic() - self._began
        self._stop.set()
        self._thread.join()
        rows: dict[str, Row] = {}
        for called, process in self._node.processes.items():
            seconds = cpu(process.pid) - self._before.get(called, 0.0)
            now = resident(process.pid)
            most = max(now, self._most.get(called, 0.0))
            rows[called] = {"%": seconds / took * 100, "MB": now, "most MB": most}
        return rows


async def changes(
    folder: Path, stack: ExitStack, count: int, seconds: float, rate: float = 10
) -> list[Row]:
    """All three at rest at once; then one after the other, so that none disturbs another."""
    spaces = Namespaces(stack)
    changers: list[Changer] = []
    try:
        for kind in KINDS:
            node = kind(f"{kind.kind}-changes-{count}", spaces, stack, folder)
            changers.append(Changer(node, count))
            await node.start()
            await node.wire()
            changers[-1].begin()
        for changer in changers:
            watch = Watch(changer.node.client, address(0))
            await watch.until("a", changer.node)
            watch.stop()
        await asyncio.sleep(5)
        usages = [Usage(changer.node) for changer in changers]
        await asyncio.sleep(seconds)
        rest = [usage.end() for usage in usages]
        rows = []
        for changer, idle in zip(changers, rest, strict=True):
            alone = await apart(changer, seconds, 1.2)
            busy, used = await often(changer, seconds, rate)
            for called in used:
                row: Row = {"process": called}
                if called == "kube-proxy":
                    row["process"] = f"kube-proxy {changer.node.kind}"
                row |= {"rest %": idle[called]["%"], "MB": idle[called]["MB"]}
                row |= {"10/s %": used[called]["%"], "most MB": used[called]["most MB"]}
                if called != "observer":
                    row |= _cuts("apart", alone) | _cuts("10/s", busy)
                rows.append(row)
        return rows
    finally:
        for changer in changers:
            await changer.node.stop()


def _cuts(name: str, values: list[float]) -> Row:
    cuts = statistics.quantiles(values, n=100, method="inclusive")
    return {f"{name} p50": cuts[49], f"{name} p99": cuts[98]}


# ---- Start ---------------------------------------------------------------------------


async def start(folder: Path, kind: type[Node], count: int, number: int) -> list[Row]:
    """From nothing until the last service answers, and every tenth of them besides; memory also
    of the five seconds after."""
    with ExitStack() as stack:
        spaces = Namespaces(stack)
        node = kind(f"{kind.kind}-start-{number}", spaces, stack, folder)
        try:
            node.serve(node.host)
            Changer(node, count)
            watched = sorted({0, *range(count // 10 - 1, count, count // 10)})
            for one in watched:
                node.api.put(service(one), slice_of(one, [node.ip], BACKEND_PORT))
            for events in node.api.history.values():
                events.clear()
            watch = Watch(node.host, address(watched[-1]))
            stack.callback(watch.stop)
            await asyncio.sleep(0.5)
            usage = Usage(node)
            await node.start()
            took = (await watch.until("a", node) - node.began) / 1e9
            # Not the last again: what was sent to it in vain has left entries in conntrack, by
            # which a connection from the same port goes nowhere.
            for one in watched[:-1]:
                run(*node.host, str(RR), "crr", address(one), str(PORT), "0.01")
            seconds = {called: cpu(one.pid) for called, one in node.processes.items()}
            await asyncio.sleep(5)
            used = usage.end()
            kernel = node.kernel_memory()
        finally:
            await node.stop()
    rows = []
    for called, row in used.items():
        name = f"kube-proxy {kind.kind}" if called == "kube-proxy" else called
        rows.append(
            {
                "process": name,
                "start s": took if called != "observer" else None,
                "CPU s": seconds[called],
                "MB": row["MB"],
                "most MB": row["most MB"],
                "kernel MB": kernel if called != "observer" else None,
            }
        )
    return rows


async def starts(folder: Path, count: int, rounds: int) -> list[Row]:
    """Medians by process."""
    found: dict[str, list[Row]] = {}
    for number in range(rounds):
        for kind in KINDS:
            for row in await start(folder, kind, count, number):
                found.setdefault(row["process"], []).append(row)
    rows = []
    for rows_ in found.values():
        row = dict(rows_[0])
        for key in row:
            values = [one[key] for one in rows_ if one[key] is not None]
            if key != "process" and values:
                row[key] = statistics.median(values)
        rows.append(row)
    return rows
