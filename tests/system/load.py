"""Traffic between pods of a bed that accounts for every connection and every verdict.

A `Server` answers in a pod and writes down who reached it. A `Client` in another pod asks
without pause, by TCP and UDP, while others look after what is long-lived. What must not
happen is collected in `wrong`, one sentence each, and in `begun` what must have a flow record.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from lockgate.net import namespaces

__all__ = ["BELL", "SERVED", "Client", "Connection", "Server", "Stream", "Way", "Worker"]

PORT, BELL = 8080, 8081
SERVED = 8082  # what PORT is, for services
_BLOCK = 16384
_TRIES = 5  # of a datagram: nobody sends it again for us


class Connection(NamedTuple):
    """As flow records tell it: from the pod's own address to the one that answers."""

    protocol: str
    source: str
    sport: int
    destination: str
    dport: int


@dataclass(frozen=True)
class Way:
    """Where a client goes. `open` makes a socket there, of a family and a type; `served` is who
    answers behind a service's address: an address and a port."""

    open: Callable[[int, int], socket.socket]
    address: str
    port: int = PORT
    served: tuple[str, int] | None = None

    def socket(self, kind: int, patience: float) -> socket.socket:
        """A socket, not connected yet."""
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        sock = self.open(family, kind)
        sock.settimeout(patience)
        return sock

    def connection(self, sock: socket.socket) -> Connection:
        """What a socket that was connected began."""
        protocol = "TCP" if sock.type == socket.SOCK_STREAM else "UDP"
        source, sport = sock.getsockname()[:2]
        return Connection(protocol, source, sport, *(self.served or (self.address, self.port)))


class Worker(threading.Thread):
    """Runs `turn` until `end`; the first exception is what went wrong. `allowed`: True = all that
    it begins is, False = nothing, None = it changes."""

    allowed: bool | None = True

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._over = threading.Event()
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()
        self.begun: Counter[Connection] = Counter()

    def run(self) -> None:
        try:
            while not self._over.is_set() and not self.wrong:
                self.turn()
            self.last()
        except Exception as error:
            self.wrong.append(f"{self.name}: {type(error).__name__}: {error}")

    def turn(self) -> None:
        raise NotImplementedError

    def last(self) -> None:
        """What is to be checked when all is over."""

    def cancel(self) -> None:
        """Have it end, without waiting for it."""
        self._over.set()

    def end(self) -> list[str]:
        self.cancel()
        if self.ident is not None:
            self.join(30)
        if self.is_alive():
            self.wrong.append(f"{self.name}: does not end")
        return self.wrong


class Server:
    """Echo by TCP and UDP, over both families; `seen` has the addresses that anything came from.
    Who connects to BELL hears nothing until `ring`."""

    def __init__(self, netns: Path) -> None:
        self.seen: Counter[str] = Counter()
        self._waiting: list[socket.socket] = []
        with namespaces.inside(netns):
            self._tcp = [_listen(port) for port in (PORT, SERVED)]
            self._bell = _listen(BELL)
            self._udp = [_bound(port) for port in (PORT, SERVED)]
        for work, socks in ((self._accept, self._tcp), (self._answer, self._udp)):
            for sock in socks:
                threading.Thread(target=work, args=(sock,), daemon=True).start()

    def expect(self, count: int) -> None:
        """Take `count` connections to BELL."""
        for _ in range(count):
            self._waiting.append(self._bell.accept()[0])

    def ring(self) -> None:
        """The first word on connections that were silent for long is the server's."""
        for sock in self._waiting:
            sock.sendall(b"!")

    def close(self) -> None:
        for sock in self._waiting:
            sock.close()
        for sock in (*self._tcp, *self._udp, self._bell):
            # Wakes who waits in it.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                near, sender = listener.accept()
            except OSError:
                return
            self._saw(sender[0])
            threading.Thread(target=self._echo, args=(near,), daemon=True).start()

    def _saw(self, address: str) -> None:
        self.seen[address.removeprefix("::ffff:")] += 1

    @staticmethod
    def _echo(near: socket.socket) -> None:
        with near:
            try:
                while data := near.recv(_BLOCK):
                    near.sendall(data)
            except OSError:
                return

    def _answer(self, sock: socket.socket) -> None:
        while True:
            try:
                data, sender = sock.recvfrom(2048)
                if not data:
                    return
                self._saw(sender[0])
                sock.sendto(data, sender)
            except OSError:
                return


def _listen(port: int) -> socket.socket:
    return socket.create_server(
        ("::", port), family=socket.AF_INET6, dualstack_ipv6=True, backlog=512
    )


def _bound(port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind(("::", port))
    return sock


class Client(Worker):
    """New connections and datagrams, one after the other, by each way in turn. `allowed`: True =
    each must be answered, False = none may be, None = either, but nothing else."""

    def __init__(self, name: str, ways: Sequence[Way], allowed: bool | None) -> None:
        super().__init__(name)
        self.allowed = allowed
        self._ways, self._turns = ways, 0
        # A lost SYN is sent again after 1, 3 and 7 s; nothing is waited for that is not to come.
        self._patience = 10.0 if allowed else 0.3

    def turn(self) -> None:
        way = self._ways[self._turns % len(self._ways)]
        self._turns += 1
        try:
            self._account("tcp", way, self.connects(way))
            self._account("udp", way, self.asks(way))
        except OSError as error:
            self.wrong.append(f"{self.name} → {way.address} port {way.port}: {error}")
        self._over.wait(0.01)

    def connects(self, way: Way) -> bool:
        """Is a new connection answered?"""
        with way.socket(socket.SOCK_STREAM, self._patience) as sock:
            try:
                sock.connect((way.address, way.port))
            except TimeoutError:
                return False
            finally:
                self.begun[way.connection(sock)] += 1
            if self.allowed is None:
                return True  # and what comes then may be cut off: the verdict may change
            sock.sendall(b"hello")
            return sock.recv(16) == b"hello"

    def asks(self, way: Way) -> bool:
        """Is a datagram answered, sent again a few times if it may be?"""
        with way.socket(socket.SOCK_DGRAM, min(self._patience, 1)) as sock:
            sock.connect((way.address, way.port))
            self.begun[way.connection(sock)] += 1
            word = os.urandom(8)
            for number in range(_TRIES if self.allowed else 1):
                self.counts["sent again"] += number > 0
                sock.send(word)
                try:
                    if sock.recv(16) == word:
                        return True
                except TimeoutError:
                    continue
            return False

    def _account(self, what: str, way: Way, answered: bool) -> None:
        self.counts[f"{what} {'answered' if answered else 'silent'}"] += 1
        if self.allowed is not None and answered != self.allowed:
            verdict = "allowed" if self.allowed else "denied"
            self.wrong.append(
                f"{self.name}: {what} to {way.address} is {verdict} but was"
                f" {'' if answered else 'not '}answered ({dict(self.counts)})"
            )


class Stream(Worker):
    """One TCP connection for all the time: what comes back is what was sent, byte for byte."""

    def __init__(self, name: str, way: Way) -> None:
        super().__init__(name)
        self._sock = way.socket(socket.SOCK_STREAM, 20)
        self._sock.connect((way.address, way.port))
        self.begun[way.connection(self._sock)] += 1
        self._sent, self._back = hashlib.sha256(), hashlib.sha256()

    def turn(self) -> None:
        block = os.urandom(_BLOCK)
        self._sent.update(block)
        self._sock.sendall(block)
        left = len(block)
        while left:
            data = self._sock.recv(left)
            if not data:
                raise ConnectionError("the other side hung up")
            self._back.update(data)
            left -= len(data)
        self.counts["bytes"] += len(block)
        self._over.wait(0.005)

    def last(self) -> None:
        self._sock.close()
        if self._sent.digest() != self._back.digest():
            self.wrong.append(f"{self.name}: other bytes came back")
