"""Traffic between pods of a bed that accounts for every connection and every verdict.

A `Server` answers in a pod and writes down who reached it. A `Client` in another pod asks
without pause, by TCP and UDP, while others look after what is long-lived. What must not
happen is collected in `wrong`, one sentence each.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import threading
from collections import Counter
from pathlib import Path

from lockgate.net import namespaces

__all__ = ["BELL", "Client", "Server", "Stream", "Worker"]

PORT, BELL = 8080, 8081
_BLOCK = 16384
_TRIES = 5  # of a datagram: nobody sends it again for us


class Worker(threading.Thread):
    """Runs `turn` until `end`; the first exception is what went wrong."""

    def __init__(self, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self._over = threading.Event()
        self.wrong: list[str] = []
        self.counts: Counter[str] = Counter()

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

    def end(self) -> list[str]:
        self._over.set()
        self.join(30)
        if self.is_alive():
            self.wrong.append(f"{self.name}: does not end")
        return self.wrong


class Server:
    """Echo by TCP and UDP; `seen` has the addresses that anything came from. Who connects to
    BELL hears nothing until `ring`."""

    def __init__(self, netns: Path) -> None:
        self.seen: Counter[str] = Counter()
        with namespaces.inside(netns):
            self._tcp = socket.create_server(("0.0.0.0", PORT), backlog=512)
            self._bell = socket.create_server(("0.0.0.0", BELL))
            self._udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            self._udp.bind(("0.0.0.0", PORT))
        threading.Thread(target=self._accept, daemon=True).start()
        threading.Thread(target=self._answer, daemon=True).start()
        self._waiting: list[socket.socket] = []

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
        for sock in (self._tcp, self._udp, self._bell):
            # Wakes who waits in it.
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, (address, _) = self._tcp.accept()
            except OSError:
                return
            self.seen[address] += 1
            threading.Thread(target=self._echo, args=(near,), daemon=True).start()

    @staticmethod
    def _echo(near: socket.socket) -> None:
        with near:
            try:
                while data := near.recv(_BLOCK):
                    near.sendall(data)
            except OSError:
                return

    def _answer(self) -> None:
        while True:
            try:
                data, sender = self._udp.recvfrom(2048)
                if not data:
                    return
                self.seen[sender[0]] += 1
                self._udp.sendto(data, sender)
            except OSError:
                return


class Client(Worker):
    """New connections and datagrams, one after the other. `allowed`: True = each must be
    answered, False = none may be, None = either, but nothing else."""

    def __init__(self, name: str, netns: Path, server: str, allowed: bool | None) -> None:
        super().__init__(name)
        self._netns, self._server, self._allowed = netns, server, allowed
        # A lost SYN is sent again after 1, 3 and 7 s; nothing is waited for that is not to come.
        self._patience = 10.0 if allowed else 0.3

    def turn(self) -> None:
        self._account("tcp", self.connects())
        self._account("udp", self.asks())
        self._over.wait(0.01)

    def connects(self) -> bool:
        """Is a new connection answered?"""
        with self._socket(socket.SOCK_STREAM) as sock:
            try:
                sock.connect((self._server, PORT))
            except TimeoutError:
                return False
            if self._allowed is None:
                return True  # and what comes then may be cut off: the verdict may change
            sock.sendall(b"hello")
            return sock.recv(16) == b"hello"

    def asks(self) -> bool:
        """Is a datagram answered, sent again a few times if it may be?"""
        with self._socket(socket.SOCK_DGRAM) as sock:
            sock.settimeout(min(self._patience, 1))
            sock.connect((self._server, PORT))
            word = os.urandom(8)
            for number in range(_TRIES if self._allowed else 1):
                self.counts["sent again"] += number > 0
                sock.send(word)
                try:
                    if sock.recv(16) == word:
                        return True
                except TimeoutError:
                    continue
            return False

    def _socket(self, kind: int) -> socket.socket:
        with namespaces.inside(self._netns):
            sock = socket.socket(socket.AF_INET, kind)
        sock.settimeout(self._patience)
        return sock

    def _account(self, what: str, answered: bool) -> None:
        self.counts[f"{what} {'answered' if answered else 'silent'}"] += 1
        if self._allowed is not None and answered != self._allowed:
            verdict = "allowed" if self._allowed else "denied"
            self.wrong.append(
                f"{self.name}: {what} is {verdict} but was {'' if answered else 'not '}answered"
                f" ({dict(self.counts)})"
            )


class Stream(Worker):
    """One TCP connection for all the time: what comes back is what was sent, byte for byte."""

    def __init__(self, name: str, netns: Path, server: str) -> None:
        super().__init__(name)
        with namespaces.inside(netns):
            self._sock = socket.socket()
        self._sock.settimeout(20)
        self._sock.connect((server, PORT))
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
