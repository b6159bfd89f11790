"""Connections between pods of a real cluster while something is done to it, every one accounted
for: those that stay open, those that begin, and those that a policy forbids."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType

from cluster.commands import Failed, until
from lockgate.net.namespaces import inside

__all__ = ["Traffic"]

PORT, FORBIDDEN = 9999, 7777
_PATIENCE = 5.0
_REFUSED = 0.2
_SETTLED = 1.0
_IN_A_ROW = 8


class Traffic:
    """Echoes between namespaces from `with` to its end. `ways`: (client's namespace, address,
    port) to servers; `denied`: the same, where no connection may come about. `settling`: seconds
    that a service has to find its pods before any of it counts."""

    def __init__(
        self,
        servers: list[tuple[Path, int]],
        ways: list[tuple[Path, str, int]],
        denied: list[tuple[Path, str, int]],
        settling: float = 0,
    ) -> None:
        self._servers, self._ways, self._denied = servers, ways, denied
        self._settling = settling
        self._over = threading.Event()
        self._threads: list[threading.Thread] = []
        self._wires: list[socket.socket] = []
        self._lock = threading.Lock()
        self.errors: list[str] = []
        #: Echoes on connections that stay, connections that began, and that were denied.
        self.echoes = self.begun = self.refused = 0

    def __enter__(self) -> Traffic:
        for netns, port in self._servers:
            with inside(netns):
                listener = socket.create_server(
                    ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128
                )
            self._wires.append(listener)
            self._start(lambda wire=listener: self._serve(wire))
        try:
            if self._settling:
                until("connections each way", self._settled, self._settling)
        except BaseException:
            self._stop()
            raise
        for way in self._ways:
            self._start(lambda way=way: self._stay(*way))
            self._start(lambda way=way: self._begin(*way))
        for way in self._denied:
            self._start(lambda way=way: self._try_denied(*way))
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        self._over.set()
        for wire in self._wires:
            with contextlib.suppress(OSError):
                wire.shutdown(socket.SHUT_RDWR)
            wire.close()
        for thread in self._threads:
            thread.join()

    def more(self, count: int = 20, deadline: float = 30) -> None:
        """Until each kind happened `count` times more for each way; errors end it early."""
        ways = max(1, len(self._ways))
        goal = self.echoes + count * ways, self.begun + count * ways
        refused = self.refused + min(count, 3) * len(self._denied)
        end = time.monotonic() + deadline
        while self.echoes < goal[0] or self.begun < goal[1] or self.refused < refused:
            assert not self.errors, self.errors[:5]
            assert time.monotonic() < end, (
                f"traffic stalls: {self.echoes} of {goal[0]} echoes, {self.begun} of {goal[1]}"
                f" connections, {self.refused} of {refused} denied"
            )
            time.sleep(0.02)

    def _settled(self) -> bool:
        """Does every way work several times in a row: a service has more backends than one."""
        try:
            for netns, address, port in self._ways * _IN_A_ROW:
                with _connect(netns, address, port, _SETTLED) as wire:
                    _exchange(wire)
        except OSError as error:
            raise Failed(f"{address} port {port}: {error}") from None
        return True

    # ---- Threads -----------------------------------------------------------------

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _serve(self, listener: socket.socket) -> None:
        while not self._over.is_set():
            try:
                wire, _ = listener.accept()
            except OSError:
                return
            self._wires.append(wire)
            threading.Thread(target=_echo, args=(wire,), daemon=True).start()

    def _stay(self, netns: Path, address: str, port: int) -> None:
        with self._told(f"the connection to {address} that stays"):
            with _connect(netns, address, port, _PATIENCE) as wire:
                while not self._over.wait(0.005):
                    _exchange(wire)
                    with self._lock:
                        self.echoes += 1

    def _begin(self, netns: Path, address: str, port: int) -> None:
        while not self._over.wait(0.02):
            with self._told(f"a new connection to {address}"):
                with _connect(netns, address, port, _PATIENCE) as wire:
                    _exchange(wire)
                with self._lock:
                    self.begun += 1

    def _try_denied(self, netns: Path, address: str, port: int) -> None:
        while not self._over.wait(0.05):
            try:
                _connect(netns, address, port, _REFUSED).close()
            except OSError:
                with self._lock:
                    self.refused += 1
            else:
                self.errors.append(f"a denied connection to {address} port {port} came about")

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._over.is_set():
                self.errors.append(f"{what}: {error}")


def _connect(netns: Path, address: str, port: int, timeout: float) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with inside(netns):
        wire = socket.socket(family, socket.SOCK_STREAM)
    try:
        wire.settimeout(timeout)
        wire.connect((address, port))
    except BaseException:
        wire.close()
        raise
    return wire


def _exchange(wire: socket.socket) -> None:
    sent = os.urandom(64)
    wire.sendall(sent)
    found = b""
    while len(found) < len(sent):
        part = wire.recv(len(sent) - len(found))
        if not part:
            raise ConnectionError("closed by the other side")
        found += part
    if found != sent:
        raise ConnectionError("other bytes came back")


def _echo(wire: socket.socket) -> None:
    with wire, contextlib.suppress(OSError):
        while data := wire.recv(4096):
            wire.sendall(data)
