"""Real pods: namespaces, order of start, answering ports, restarts, the end."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from lockgate.standalone import runtime
from lockgate.standalone.runtime import (
    Container,
    PodProcess,
    PodSpec,
    ProbeResult,
    RuntimeFailure,
    Status,
    Target,
)
from tests.compilers import clang

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: namespaces and cgroups")


@pytest.fixture(scope="session", autouse=True)
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The runtime of this tree, whatever build/ holds."""
    binary = tmp_path_factory.mktemp("runtime") / "lockgate-pod"
    subprocess.run(
        [clang(), "-O2", "-Wall", "-Wextra", "-Werror", ROOT / "runtime/pod.c", "-o", binary],
        check=True,
    )
    before = os.environ.get("LOCKGATE_POD")
    os.environ["LOCKGATE_POD"] = str(binary)
    yield
    del os.environ["LOCKGATE_POD"]
    if before is not None:
        os.environ["LOCKGATE_POD"] = before


@pytest.fixture
def cgroup() -> Iterator[Path]:
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mounted, kind, *_ = line.split()
        if kind == "cgroup2":
            break
    path = Path(mounted) / f"lockgate-test-{os.getpid()}"
    path.mkdir()
    yield path
    (path / "cgroup.kill").write_text("1")
    asyncio.run(until(lambda: "populated 0" in (path / "cgroup.events").read_text()))
    path.rmdir()


async def until(condition: Callable[[], bool], seconds: float = 5) -> None:
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)


@asynccontextmanager
async def running(spec: PodSpec, **paths: Any) -> AsyncIterator[PodProcess]:
    pod = await PodProcess.start(spec, **paths)
    try:
        await pod.go()
        yield pod
    finally:
        await pod.kill()


def within(seconds: float, work: Coroutine[Any, Any, None]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(seconds):
            await work

    asyncio.run(bounded())


def sh(name: str, script: str) -> Container:
    return Container(
        name=name,
        command=["sh", "-c", script],
        environment={"PATH": runtime.DEFAULT_PATH, "GREETING": "hello\nthere"},
    )


def test_ports_answer_with_the_pods_name_over_both_families(cgroup: Path) -> None:
    async def scenario() -> None:
        spec = PodSpec("web-0", [Container("web", ports=[("tcp", 80), ("udp", 53)])])
        async with running(spec, cgroup=cgroup) as pod:
            assert await pod.wait_for("running") == "running"
            cases = [
                (Target("tcp", "127.0.0.1", 80), ProbeResult("ok", "web-0")),
                (Target("tcp", "::1", 80), ProbeResult("ok", "web-0")),
                (Target("udp", "127.0.0.1", 53), ProbeResult("ok", "web-0")),
                (Target("udp", "127.0.0.9", 53), ProbeResult("ok", "web-0")),
                (Target("udp", "::1", 53), ProbeResult("ok", "web-0")),
                (Target("tcp", "127.0.0.1", 81), ProbeResult("refused")),
                (Target("udp", "127.0.0.1", 54), ProbeResult("refused")),
                (Target("tcp", "10.9.9.9", 80), ProbeResult("unreachable")),
            ]
            found = await runtime.probe(
                [target for target, _ in cases], netns=pod.netns_path, cgroup=cgroup
            )
            assert found == [expected for _, expected in cases]

    within(10, scenario())


def test_a_silent_server_is_a_timeout_not_ok() -> None:
    async def scenario() -> None:
        listen = "import socket,signal; s=socket.create_server(('',80)); signal.pause()"
        silent = Container(
            "c",
            command=["/usr/bin/env", "python3", "-c", listen],
            environment={"PATH": os.environ["PATH"]},
        )
        async with running(PodSpec("p", [silent])) as pod:
            target = Target("tcp", "127.0.0.1", 80, timeout=0.2)
            async with asyncio.timeout(5):
                while True:
                    [found] = await runtime.probe([target], netns=pod.netns_path)
                    if found.result != "refused":
                        break
            assert found == ProbeResult("timeout", "connected")

    within(10, scenario())


def test_silence_gets_the_name_and_http_gets_a_page(cgroup: Path) -> None:
    client = (
        "import socket\n"
        "def ask(text):\n"
        "    with socket.create_connection(('127.0.0.1', 80)) as s:\n"
        "        s.sendall(text)\n"
        "        return s.makefile('rb').readline() if not text else s.makefile('rb').read()\n"
        "print(ask(b''), ask(b'GET /x HTTP/1.1\\r\\nHost: a\\r\\n\\r\\n').splitlines()[0::4])\n"
    )

    async def scenario() -> None:
        async with running(PodSpec("web-0", [Container("web", ports=[("tcp", 80)])])) as pod:
            await pod.wait_for("running")
            process = await runtime.exec_command(
                pod.pid, cgroup, ["python3", "-c", client], stdout=subprocess.PIPE
            )
            output, _ = await process.communicate()
            assert output.decode().split() == ["b'web-0\\n'", "[b'HTTP/1.1", "200", "OK',", "b'']"]

    within(10, scenario())


def test_ten_thousand_connections_at_once_all_answered() -> None:
    async def scenario() -> None:
        async with running(PodSpec("web-0", [Container("web", ports=[("tcp", 80)])])) as pod:
            await pod.wait_for("running")
            targets = [Target("tcp", "127.0.0.1", 80, timeout=10)] * 10_000
            found = await runtime.probe(targets, netns=pod.netns_path, concurrency=2000)
            assert set(found) == {ProbeResult("ok", "web-0")}

    within(30, scenario())


def test_nothing_runs_before_go_and_init_containers_run_in_order(tmp_path: Path) -> None:
    async def scenario() -> None:
        log, seen = tmp_path / "log", list[Status]()
        spec = PodSpec(
            "job",
            [sh("main", 'echo main "$GREETING" $(hostname) $(cat /etc/hosts); exit 0')],
            init_containers=[sh("one", "echo one"), sh("two", "echo two")],
            restart_policy="Never",
            hostname="the-host",
        )
        (tmp_path / "hosts").write_text("10.0.0.1 db\n")
        pod = await PodProcess.start(spec, hosts=tmp_path / "hosts", log=log, on_status=seen.append)
        assert pod.netns_path.stat().st_ino != Path("/proc/self/ns/net").stat().st_ino
        assert not log.exists() and pod.phase == "pending"
        await pod.go()
        assert await pod.wait() == 0
        assert log.read_text() == "one\ntwo\nmain hello\nthere the-host 10.0.0.1 db\n"
        assert [(one.event, one.container) for one in seen] == [
            ("started", "one"),
            ("exited", "one"),
            ("started", "two"),
            ("exited", "two"),
            ("started", "main"),
            ("running", ""),
            ("exited", "main"),
            ("succeeded", ""),
            ("ended", ""),
        ]

    within(10, scenario())


@pytest.mark.parametrize(
    ("policy", "code", "ends"),
    [
        ("Always", 0, None),
        ("OnFailure", 3, None),
        ("OnFailure", 0, "succeeded"),
        ("Never", 3, "failed"),
    ],
)
def test_restart_policy(policy: runtime.RestartPolicy, code: int, ends: str | None) -> None:
    async def scenario() -> None:
        seen = list[Status]()
        spec = PodSpec("p", [sh("c", f"exit {code}")], restart_policy=policy, backoff=0.01)
        async with running(spec, on_status=seen.append) as pod:
            if ends:
                await pod.wait()
                assert Status("exited", "c", code) in seen and Status(ends) in seen
                assert pod.restarts == {}
            else:
                await until(lambda: pod.restarts.get("c", 0) >= 3)
                waits = [one.value for one in seen if one.event == "backoff"]
                assert waits[:3] == [10, 20, 40]

    within(10, scenario())


def test_terminate_lets_containers_finish_and_then_kills(tmp_path: Path, cgroup: Path) -> None:
    async def scenario() -> None:
        log, seen = tmp_path / "log", list[Status]()
        spec = PodSpec(
            "p",
            [
                sh("good", "trap 'echo bye; exit 0' TERM; echo up; while :; do sleep 0.01; done"),
                sh("bad", "trap '' TERM; echo up; while :; do sleep 0.01; done"),
            ],
        )
        pod = await PodProcess.start(spec, cgroup=cgroup, log=log, on_status=seen.append)
        await pod.go()
        await until(lambda: log.exists() and log.read_text().count("up") == 2)
        assert await pod.terminate(0.3) == 0
        assert "bye" in log.read_text()
        assert Status("exited", "good", 0) in seen
        assert not Path(f"/proc/{pod.pid}").exists()
        assert await pod.terminate(1) == 0
        await until(lambda: "populated 0" in (cgroup / "cgroup.events").read_text())

    within(10, scenario())


def test_exec_sees_the_pod_and_passes_the_exit_code(cgroup: Path) -> None:
    async def scenario() -> None:
        async with running(PodSpec("web-0", [Container("web", ports=[("tcp", 80)])])) as pod:
            process = await runtime.exec_command(
                pod.pid,
                cgroup,
                ["sh", "-c", "hostname; cat /proc/1/comm; cat /proc/self/cgroup; exit 7"],
                stdout=subprocess.PIPE,
            )
            output, _ = await process.communicate()
            assert process.returncode == 7
            assert output.decode().splitlines()[:2] == ["web-0", "lockgate-pod"]
            assert f"0::/{cgroup.name}\n" in output.decode()

    within(10, scenario())


def test_a_pod_that_cannot_be_made_says_why(tmp_path: Path) -> None:
    async def scenario() -> None:
        with pytest.raises(RuntimeFailure, match=r"pod p: cannot bind .*/missing over /etc/hosts"):
            await PodProcess.start(PodSpec("p", []), hosts=tmp_path / "missing")
        with pytest.raises(RuntimeFailure, match="cannot join cgroup"):
            await PodProcess.start(PodSpec("p", []), cgroup=tmp_path)

    within(10, scenario())
