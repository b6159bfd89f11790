"""bpf/sock.h on a real cgroup: what programs that use services see.

The client runs in a pod of its own and plays the backends as well. Backends are
on loopback, so no packet leaves the pod and no other program is needed.
"""

from __future__ import annotations

import asyncio
import ctypes
import ipaddress
import os
import socket
import struct
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from lockgate.standalone import runtime
from lockgate.standalone.runtime import Container, PodProcess, PodSpec
from tests.compilers import clang

ROOT = Path(__file__).parents[2]
ENTRY = 'char _license[] SEC("license") = "Dual BSD/GPL";\n'
HOOKS = [
    f"sock_{what}{family}"
    for family in "46"
    for what in ("connect", "sendmsg", "recvmsg", "getpeername")
]

TCP, UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
Frontend = tuple[str, int, int]  # address, protocol, port
Backends = list[tuple[str, int]]

SERVICES: dict[Frontend, Backends] = {
    ("10.96.0.1", TCP, 80): [("127.0.0.2", 8080), ("127.0.0.3", 8080)],
    ("10.96.0.1", UDP, 53): [("127.0.0.2", 5353), ("127.0.0.3", 5353)],
    ("10.96.0.3", UDP, 53): [("127.0.0.2", 5353)],
    ("10.96.0.4", UDP, 53): [("127.0.0.2", 5353)],
    ("10.96.0.2", TCP, 80): [],
    ("10.96.0.2", UDP, 53): [],
    ("fd00:96::1", TCP, 80): [("::1", 8080)],
    ("fd00:96::1", UDP, 53): [("::1", 5353)],
}

# Backends answer with the address they were reached at.
PRELUDE = """
import os, socket, threading
from socket import AF_INET, AF_INET6, SOCK_DGRAM, SOCK_STREAM

def datagrams(address):
    s = socket.socket(AF_INET6 if ":" in address else AF_INET, SOCK_DGRAM)
    s.bind((address, 5353))
    while True:
        _, source = s.recvfrom(100)
        s.sendto(address.encode(), source)

def streams(address):
    s = socket.create_server((address, 8080), family=AF_INET6 if ":" in address else AF_INET)
    def answer():
        while True:
            c, _ = s.accept()
            c.sendall(address.encode())
            c.close()
    threading.Thread(target=answer, daemon=True).start()

for address in ("127.0.0.2", "127.0.0.3", "::1"):
    streams(address)
    threading.Thread(target=datagrams, args=(address,), daemon=True).start()

def udp(family=AF_INET):
    s = socket.socket(family, SOCK_DGRAM)
    s.settimeout(2)
    return s

def ask(s, *name):
    # once more, should the backend not be bound yet
    for _ in range(50):
        try:
            s.sendto(b"?", name)
            answer, source = s.recvfrom(100)
            return answer.decode(), source[:2]
        except (ConnectionRefusedError, TimeoutError):
            pass

def connect(family, *name):
    with socket.socket(family, SOCK_STREAM) as s:
        s.settimeout(2)
        s.connect(name)
        peer = s.getpeername()[:2]
        return s.recv(100).decode(), peer
"""


class Libbpf:
    """The few calls that this test needs."""

    def __init__(self, object_file: Path) -> None:
        self.lib = ctypes.CDLL("libbpf.so.1", use_errno=True)
        for name in (
            "bpf_object__open_file",
            "bpf_object__find_program_by_name",
            "bpf_program__attach_cgroup",
        ):
            getattr(self.lib, name).restype = ctypes.c_void_p
        self.object = ctypes.c_void_p(
            self.lib.bpf_object__open_file(str(object_file).encode(), None)
        )
        self.check(self.lib.bpf_object__load(self.object))
        self.links: list[ctypes.c_void_p] = []

    def check(self, result: int) -> int:
        if result < 0:
            raise OSError(-result, os.strerror(-result))
        return result

    def attach(self, program: str, cgroup: Path) -> None:
        found = self.lib.bpf_object__find_program_by_name(self.object, program.encode())
        fd = os.open(cgroup, os.O_RDONLY)
        link = self.lib.bpf_program__attach_cgroup(ctypes.c_void_p(found), fd)
        os.close(fd)
        assert link, program
        self.links.append(ctypes.c_void_p(link))

    def update(self, name: str, key: bytes, value: bytes) -> None:
        fd = self.check(self.lib.bpf_object__find_map_fd_by_name(self.object, name.encode()))
        self.check(self.lib.bpf_map_update_elem(fd, key, value, ctypes.c_ulong(0)))

    def put_image(self, view: int, words: bytes) -> None:
        # struct bpf_map_create_opts of libbpf 1.x: map_flags at byte 28.
        flags = 1 << 10 | 1 << 12  # BPF_F_MMAPABLE | BPF_F_INNER_MAP
        options = struct.pack("=Q5IIQII", 48, 0, 0, 0, 0, 0, flags, 0, 0, 0)
        size = len(words) // 8
        fd = self.check(self.lib.bpf_map_create(2, b"image", 4, 8, size, options))
        for index in range(size):
            value = words[index * 8 : index * 8 + 8]
            self.check(
                self.lib.bpf_map_update_elem(fd, struct.pack("=I", index), value, ctypes.c_ulong(0))
            )
        self.update("images", struct.pack("=I", view), struct.pack("=I", fd))
        os.close(fd)

    def close(self) -> None:
        for link in self.links:
            self.lib.bpf_link__destroy(link)
        self.lib.bpf_object__close(self.object)


def packed(address: str) -> bytes:
    value = ipaddress.ip_address(address)
    return value.packed if value.version == 6 else b"\0" * 10 + b"\xff\xff" + value.packed


#: struct bpf_spin_lock, behind the two views of a value.
LOCK = bytes(4)


def publish(bpf: Libbpf, epoch: int, services: dict[Frontend, Backends]) -> None:
    """Both views get these services; what SERVICES has beyond them is absent."""
    words, live = b"", dict[bytes, bool]()
    for number, (frontend, known) in enumerate(SERVICES.items(), 1):
        address, protocol, port = frontend
        backends = services.get(frontend, [])
        view = struct.pack(
            "=IIHHI16x", number, len(words) // 8, len(backends), frontend in services, 0
        )
        key = packed(address) + struct.pack("!HBx", port, protocol)
        bpf.update("services", key, view * 2 + LOCK)
        for one in {*known, *backends}:
            backend = (
                packed(one[0]) + struct.pack("=I", number) + struct.pack("!HBx", one[1], protocol)
            )
            live[backend] = one in backends
        for ip, target in backends:
            words += packed(ip) + struct.pack("!H", target) + struct.pack("=HI", 0, 0)
    for backend, is_live in live.items():
        bpf.update("service_backends", backend, bytes([is_live, is_live, 0, 0]) + LOCK)
    bpf.put_image(epoch & 1, words + b"\0" * 8)
    bpf.update("state", struct.pack("=I", 0), struct.pack("=4I32x", epoch, 0, 0, 0))


@pytest.fixture(scope="module")
def cgroup() -> Iterator[Path]:
    if os.geteuid():
        pytest.skip("needs root: cgroups and eBPF")
    mounts = [line.split() for line in Path("/proc/mounts").read_text().splitlines()]
    path = Path(
        next(one[1] for one in mounts if one[2] == "cgroup2"), f"lockgate-sock-{os.getpid()}"
    )
    path.mkdir()
    yield path
    (path / "cgroup.kill").write_text("1")
    while "populated 1" in (path / "cgroup.events").read_text():
        os.sched_yield()
    path.rmdir()


@pytest.fixture(scope="module")
def bpf(cgroup: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Libbpf]:
    folder = tmp_path_factory.mktemp("sock")
    (folder / "sock.bpf.c").write_text('#include "sock.h"\n' + ENTRY)
    triplet = sysconfig.get_config_var("MULTIARCH") or ""
    subprocess.run(
        [
            clang(),
            "-O2",
            "-g",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-target",
            "bpf",
            "-mcpu=v3",
            f"-I{ROOT}/bpf",
            f"-I/usr/include/{triplet}",
            "-c",
            folder / "sock.bpf.c",
            "-o",
            folder / "sock.bpf.o",
        ],
        check=True,
    )
    loaded = Libbpf(folder / "sock.bpf.o")
    for hook in HOOKS:
        loaded.attach(hook, cgroup)
    yield loaded
    loaded.close()


@pytest.fixture(scope="module")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runtime") / "lockgate-pod"
    subprocess.run([clang(), "-O2", ROOT / "runtime/pod.c", "-o", path], check=True)
    return path


async def lines_of(
    script: str, cgroup: Path, after_line: dict[str, object] | None = None
) -> list[str]:
    """Runs the script in a pod; calls `after_line[line]`, then sends it a line."""
    pod = await PodProcess.start(PodSpec("client", [Container("c")]), cgroup=cgroup)
    try:
        process = await runtime.exec_command(
            pod.pid,
            cgroup,
            ["python3", "-c", PRELUDE + script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert process.stdin and process.stdout and process.stderr
        lines = []
        while line := (await process.stdout.readline()).decode().strip():
            lines.append(line)
            action = (after_line or {}).get(line)
            if callable(action):
                action()
                process.stdin.write(b"\n")
        errors = (await process.stderr.read()).decode()
        assert await process.wait() == 0, errors
        return lines
    finally:
        await pod.kill()


CASES = {
    "TCP reaches a backend, and the peer is the service": (
        'a = connect(AF_INET, "10.96.0.1", 80)\nprint(a[0] in ("127.0.0.2", "127.0.0.3"), a[1])',
        ["True ('10.96.0.1', 80)"],
    ),
    "TCP uses every backend": (
        'print(sorted({connect(AF_INET, "10.96.0.1", 80)[0] for _ in range(40)}))',
        ["['127.0.0.2', '127.0.0.3']"],
    ),
    "TCP over IPv6": (
        'print(connect(AF_INET6, "fd00:96::1", 80))',
        ["('::1', ('fd00:96::1', 80))"],
    ),
    "an IPv6 socket that asks for an IPv4-mapped service": (
        'print(connect(AF_INET6, "::ffff:10.96.0.1", 80)[1])',
        ["('::ffff:10.96.0.1', 80)"],
    ),
    "what is no service stays as it is": (
        'print(connect(AF_INET, "127.0.0.2", 8080))',
        ["('127.0.0.2', ('127.0.0.2', 8080))"],
    ),
    "another port of a service's address stays as it is": (
        'try: connect(AF_INET, "10.96.0.1", 81)\nexcept OSError as e: print(e.errno)',
        ["101"],  # ENETUNREACH: the pod has no route
    ),
    "a service without backends refuses connect": (
        'try: connect(AF_INET, "10.96.0.2", 80)\nexcept OSError as e: print(type(e).__name__)',
        ["ConnectionRefusedError"],
    ),
    "a service without backends refuses sendto": (
        'try: udp().sendto(b"", ("10.96.0.2", 53))\nexcept OSError as e: print(type(e).__name__)',
        ["ConnectionRefusedError"],
    ),
    "UDP answers come from the service, always of the same backend": (
        "s = udp()\n"
        'a = [ask(s, "10.96.0.1", 53) for _ in range(20)]\n'
        "print(len({x[0] for x in a}), {x[1] for x in a})",
        ["1 {('10.96.0.1', 53)}"],
    ),
    "UDP to two services with one backend on one socket": (
        's = udp()\nprint([ask(s, f"10.96.0.{n}", 53)[1][0] for n in (3, 4, 3, 4)])',
        ["['10.96.0.3', '10.96.0.4', '10.96.0.3', '10.96.0.4']"],
    ),
    "UDP over IPv6": (
        'print(ask(udp(AF_INET6), "fd00:96::1", 53))',
        ["('::1', ('fd00:96::1', 53))"],
    ),
    "UDP of an IPv6 socket to an IPv4-mapped service": (
        'print(ask(udp(AF_INET6), "::ffff:10.96.0.1", 53)[1])',
        ["('::ffff:10.96.0.1', 53)"],
    ),
    "connected UDP has the service as its peer": (
        's = udp(); s.connect(("10.96.0.1", 53)); print(s.getpeername())',
        ["('10.96.0.1', 53)"],
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_services_at_the_socket(
    name: str, bpf: Libbpf, cgroup: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKGATE_POD", str(binary))
    script, expected = CASES[name]
    publish(bpf, 1, SERVICES)
    assert asyncio.run(lines_of(script, cgroup)) == expected


def test_nothing_is_translated_before_the_first_epoch(
    bpf: Libbpf, cgroup: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKGATE_POD", str(binary))
    publish(bpf, 1, SERVICES)
    bpf.update("state", struct.pack("=I", 0), bytes(48))
    script = 'try: connect(AF_INET, "10.96.0.1", 80)\nexcept OSError as e: print(e.errno)'
    assert asyncio.run(lines_of(script, cgroup)) == ["101"]


def test_udp_moves_to_another_backend_when_its_own_is_gone(
    bpf: Libbpf, cgroup: Path, binary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCKGATE_POD", str(binary))
    frontend = ("10.96.0.1", UDP, 53)
    publish(bpf, 1, {**SERVICES, frontend: [("127.0.0.2", 5353)]})
    script = (
        "s = udp()\n"
        'print(ask(s, "10.96.0.1", 53))\n'
        "print('move', flush=True); input()\n"
        'print(ask(s, "10.96.0.1", 53), flush=True)\n'
    )
    moved = {**SERVICES, frontend: [("127.0.0.3", 5353)]}
    assert asyncio.run(lines_of(script, cgroup, {"move": lambda: publish(bpf, 2, moved)})) == [
        "('127.0.0.2', ('10.96.0.1', 53))",
        "move",
        "('127.0.0.3', ('10.96.0.1', 53))",
    ]
