"""lockgate-node-call agent|observer METHOD PATH [LENGTH]: one request to a node's socket.

Runs in the DaemonSet's containers, started by `pods/exec`: the answer's body goes to standard
output as it comes. LENGTH bytes of body are read from standard input, whose end, then, ends
the call: so one that follows flows goes when who asked has gone. Exit status: 0, 1 with the
other side's sentence on standard error, 2 when nobody answers.

Imports only what starts at once: a command asks every node.
"""

import _socket
import os
import select
import sys

__all__ = ["main"]

_PIECE = 1 << 16
_ATOM = select.PIPE_BUF  # bytes that a pipe with room takes without waiting (pipe(7))


class _Gone(Exception):
    """Who asked: standard input is at its end."""


def main() -> int:
    if len(sys.argv) not in (4, 5) or sys.argv[1] not in ("agent", "observer"):
        sys.stderr.write(f"usage: {(__doc__ or '').partition(': ')[0]}\n")
        return 2
    role, method, path = sys.argv[1:4]
    length = int(sys.argv[4]) if len(sys.argv) == 5 else None
    wire = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    try:
        wire.connect(os.environ.get("LOCKGATE_RUN", "/run/lockgate") + f"/{role}.sock")
        return _ask(wire, method, path, length)
    except (BrokenPipeError, _Gone):
        return 2
    except OSError as error:
        sys.stderr.write(f"the {role} does not answer: {error.strerror}\n")
        return 2


def _ask(wire: "_socket.socket", method: str, path: str, length: int | None) -> int:
    # HTTP/1.0: the answer's end is the connection's, and no part of it is encoded.
    head = f"{method} {path} HTTP/1.0\r\nHost: node\r\nContent-Type: application/json\r\n"
    wire.sendall(f"{head}Content-Length: {length or 0}\r\n\r\n".encode())
    left = length or 0
    while left:
        piece = os.read(0, min(left, _PIECE))
        if not piece:
            return 2
        wire.sendall(piece)
        left -= len(piece)
    out = _Out(listens=length is not None)
    answer, status = b"", 0
    while True:
        out.wait(wire.fileno(), select.POLLIN)
        piece = wire.recv(_PIECE)
        if not piece:
            return _end(status, answer)
        if status:
            out.write(1 if status < 400 else 2, piece)
            continue
        answer += piece
        head_, found, rest = answer.partition(b"\r\n\r\n")
        if found:
            status = int(head_.split(b" ", 2)[1])
            out.write(1 if status < 400 else 2, rest)


def _end(status: int, answer: bytes) -> int:
    if not status:
        sys.stderr.write(f"it ended in the middle of an answer ({len(answer)} bytes)\n")
        return 2
    return 0 if status < 400 else 1


class _Out:
    def __init__(self, *, listens: bool) -> None:
        """`listens`: whether the end of standard input ends the call."""
        self._listens = listens

    def wait(self, fd: int, event: int) -> None:
        """Until `fd` is ready. Raises `_Gone`, also while nobody takes what is written: a runtime
        whose reader has gone may leave the pipe open and full."""
        ready = select.poll()
        ready.register(fd, event)
        if self._listens:
            ready.register(0, select.POLLIN)
        while True:
            found = dict(ready.poll())
            if 0 in found and not os.read(0, _PIECE):
                raise _Gone
            if fd in found:
                return

    def write(self, fd: int, data: bytes) -> None:
        while data:
            self.wait(fd, select.POLLOUT)
            data = data[os.write(fd, data[:_ATOM]) :]


if __name__ == "__main__":
    sys.exit(main())
