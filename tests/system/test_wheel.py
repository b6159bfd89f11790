"""The wheel on a machine that has libbpf1 and no compiler: the same programs."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

import lockgate
from tests.system.harness import ROOT

BUILT = {
    "bpf_object": "lockgate.bpf.o",
    "xdp_object": "lockgate-xdp.bpf.o",
    "cni_plugin": "lockgate-cni",
    "pod_binary": "lockgate-pod",
}


@pytest.fixture(scope="module")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel in it. What Lockgate depends on is seen from ours; our
    own editable install is not, since .pth files are not followed twice."""
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv/bin/python"
    wheel = next(iter(folder.glob("*.whl")))
    pip = [python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True)
    site = next(iter((folder / "venv/lib").glob("python*/site-packages")))
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "venv"


def run(*command: str | Path) -> str:
    return subprocess.run(command, cwd="/", check=True, capture_output=True, text=True).stdout


def test_the_command_is_there(venv: Path) -> None:
    assert run(venv / "bin/lockgate", "--version").strip().endswith(lockgate.__version__)


@pytest.mark.parametrize("function", sorted(BUILT))
def test_what_was_compiled_is_inside(venv: Path, function: str) -> None:
    program = f"from lockgate import paths; print(paths.{function}())"
    path = Path(run(venv / "bin/python", "-c", program).strip())
    assert path.is_relative_to(venv)
    assert path.read_bytes() == (ROOT / "build" / BUILT[function]).read_bytes()


def test_programs_stay_programs(venv: Path) -> None:
    program = "from lockgate import paths; print(paths.cni_plugin()); print(paths.pod_binary())"
    for line in run(venv / "bin/python", "-c", program).splitlines():
        assert Path(line).stat().st_mode & 0o111, line


@pytest.mark.parametrize("module", ["lockgate.agent", "lockgate.observer"])
def test_the_processes_start(venv: Path, module: str) -> None:
    assert "--config" in run(venv / "bin/python", "-m", module, "--help")
