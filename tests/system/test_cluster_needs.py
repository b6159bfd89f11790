"""A machine that lacks something: `lockgate up` and the agent say so in one sentence, and have
made nothing. Each need is taken away for real: mounts, capabilities, or what the kernel answers."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lockgate.cli.common import NO_FEATURE
from lockgate.standalone.state import State, bpffs, cgroup2
from tests.system.harness import ROOT, manifest, unique_name

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")

LINK_CREATE = 28  # enum bpf_cmd


def without_mounts(kind: str) -> tuple[str, ...]:
    script = (
        f'while m=$(awk \'$3 == "{kind}" {{ print $2; exit }}\' /proc/mounts) && [ "$m" ]; '
        'do umount -l "$m" || exit 9; done; exec "$@"'
    )
    return ("unshare", "--mount", "--propagation", "private", "bash", "-c", script, "hidden")


def without(capabilities: str) -> tuple[str, ...]:
    return ("setpriv", f"--bounding-set={capabilities}", f"--inh-caps={capabilities}")


def on_a_kernel_with(call: str, error: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "tests.system.seccomp", call, error)


NEEDS = [
    pytest.param(
        without_mounts("bpf"),
        "no bpf file system: mount it with: mount -t bpf bpf /sys/fs/bpf",
        id="bpf file system",
    ),
    pytest.param(
        without_mounts("cgroup2"),
        "no cgroup v2 hierarchy: mount it with: mount -t cgroup2",
        id="cgroup v2",
    ),
    pytest.param(
        without("-net_admin"), "no permission to use BPF: run as root", id="CAP_NET_ADMIN"
    ),
    pytest.param(without("-bpf,-sys_admin"), "no permission to use BPF: run as root", id="CAP_BPF"),
    pytest.param(
        ("unshare", "--user", "--map-root-user"),
        "no permission to use BPF: run as root, or with CAP_BPF and CAP_NET_ADMIN, outside of",
        id="user namespace",
    ),
    pytest.param(
        on_a_kernel_with("bpf", "EPERM"), "no permission to use BPF", id="bpf(2) is forbidden"
    ),
    pytest.param(
        on_a_kernel_with(f"bpf:{LINK_CREATE}", "EINVAL"),
        "no tcx links: they came with Linux 6.6 and need CONFIG_NET_XGRESS",
        id="tcx links",
    ),
    pytest.param(
        on_a_kernel_with("sendto", "ENOENT"),
        "the kernel needs CONFIG_NET_SCH_INGRESS and CONFIG_NET_CLS_BPF",
        id="clsact filters",
    ),
    pytest.param(
        on_a_kernel_with("unshare", "EPERM"),
        "no permission for clsact filters",
        id="a network namespace to try filters in",
    ),
]


def told(*command: str) -> tuple[int, str]:
    """Exit code and the one line that a command says."""
    done = subprocess.run(
        command,
        cwd=ROOT,
        text=True,
        capture_output=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    return done.returncode, line


@pytest.mark.parametrize(("prefix", "words"), NEEDS)
def test_up_names_what_is_missing_and_makes_nothing(
    tmp_path: Path, prefix: tuple[str, ...], words: str
) -> None:
    name = unique_name("tm")
    (tmp_path / "pod.yaml").write_text(manifest("Pod", "default", "p", {"containers": []}))
    up = ("-m", "lockgate.cli.main", "up", str(tmp_path), "--cluster", name)
    code, line = told(*prefix, sys.executable, *up)
    assert (code, line.partition(": ")[0]) == (NO_FEATURE, "lockgate")
    assert words in line
    state = State(name)
    for place in (state.root, cgroup2() / "lockgate" / name, bpffs() / "lockgate" / name):
        assert not place.exists()
    assert list(Path("/run/netns").glob(f"lg-{name}-*")) == []


PROGRAMS = {"ip": "iproute2", "bash": "bash", "nsenter": "util-linux"}


@pytest.mark.parametrize("missing", PROGRAMS)
def test_up_names_the_package_of_a_missing_program(tmp_path: Path, missing: str) -> None:
    path = tmp_path / "path"
    path.mkdir()
    for program in PROGRAMS.keys() - {missing}:
        found = shutil.which(program)
        assert found
        (path / program).symlink_to(found)
    (tmp_path / "pod.yaml").write_text(manifest("Pod", "default", "p", {"containers": []}))
    up = ("-m", "lockgate.cli.main", "up", str(tmp_path), "--cluster", unique_name("tm"))
    code, line = told("/usr/bin/env", f"PATH={path}", sys.executable, *up)
    assert code == NO_FEATURE
    wanted = f"This machine has no program {missing}: install {PROGRAMS[missing]}."
    assert line == f"lockgate: {wanted}"


@pytest.mark.parametrize(("prefix", "words"), NEEDS)
def test_an_agent_says_the_same(tmp_path: Path, prefix: tuple[str, ...], words: str) -> None:
    config = tmp_path / "agent.json"
    state = tmp_path / "state"
    settings = {"node": "n", "control": str(tmp_path / "none.sock"), "stateDir": str(state)}
    config.write_text(json.dumps(settings | {"cluster": unique_name("tm")}))
    agent = ("-m", "lockgate.agent", "--config", str(config))
    code, line = told(*prefix, sys.executable, *agent)
    assert (code, line.partition(": ")[0]) == (1, "agent")
    assert words in line
    assert not state.exists()
