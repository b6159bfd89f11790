"""What lockgate-pod is told about a pod; no process is started here."""

from __future__ import annotations

from pathlib import Path

import pytest

from lockgate.objects import model
from lockgate.standalone.runtime import Container, PodSpec, RuntimeFailure, pod_spec


def records(spec: PodSpec, **paths: Path) -> list[str]:
    text = spec.encode(paths.get("cgroup"), paths.get("hosts"), paths.get("log"))
    assert text.endswith(b"\0\0")
    return text[:-2].decode().split("\0")


def test_records_of_a_container_follow_its_name() -> None:
    spec = PodSpec(
        name="web-0",
        init_containers=[Container(name="first", command=["true"])],
        containers=[
            Container(
                name="web",
                command=["sh", "-c", "echo 1\necho 2"],
                environment={"A": "b c"},
                directory="/srv",
                ports=[("tcp", 80), ("udp", 53)],
            )
        ],
        grace=1.5,
        backoff=0.1,
    )
    assert records(spec, log=Path("/tmp/log")) == [
        "name web-0",
        "hostname web-0",
        "restart Always",
        "grace 1500",
        "backoff 100",
        "log /tmp/log",
        "init first",
        "arg true",
        "container web",
        "arg sh",
        "arg -c",
        "arg echo 1\necho 2",
        "env A=b c",
        "tcp 80",
        "udp 53",
        "cwd /srv",
    ]


def test_a_zero_byte_is_refused() -> None:
    with pytest.raises(RuntimeFailure, match="zero byte"):
        records(PodSpec(name="a", containers=[Container(name="b", command=["x\0"])]))


def test_pod_object_becomes_a_spec() -> None:
    pod = model.Pod(
        metadata=model.ObjectMeta(name="web-0"),
        spec=model.PodSpec(
            restart_policy="OnFailure",
            containers=[
                model.Container(
                    name="web",
                    args=["ignored"],
                    ports=[
                        model.ContainerPort(container_port=80),
                        model.ContainerPort(container_port=53, protocol="UDP"),
                        model.ContainerPort(container_port=9, protocol="SCTP"),
                    ],
                ),
                model.Container(
                    name="job",
                    command=["sleep"],
                    args=["1"],
                    env=[model.EnvVar(name="HOME", value="/root")],
                ),
            ],
        ),
    )
    spec = pod_spec(pod, environment={"DB_SERVICE_HOST": "10.96.0.9"})
    web, job = spec.containers
    assert spec.restart_policy == "OnFailure"
    assert (web.command, web.ports) == ([], [("tcp", 80), ("udp", 53)])
    assert job.command == ["sleep", "1"]
    assert job.environment["HOME"] == "/root"
    assert job.environment["HOSTNAME"] == "web-0"
    assert job.environment["DB_SERVICE_HOST"] == "10.96.0.9"


@pytest.mark.parametrize(
    ("name", "hostname"),
    [("a.b", "a.b"), ("n" * 70, "n" * 63), ("n" * 62 + "-.-.x", "n" * 62)],
)
def test_a_long_name_is_cut_to_a_hostname(name: str, hostname: str) -> None:
    pod = model.Pod(
        metadata=model.ObjectMeta(name=name),
        spec=model.PodSpec(containers=[model.Container(name="c")]),
    )
    assert pod_spec(pod).hostname == hostname
