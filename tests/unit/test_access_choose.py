"""Which cluster a command is about."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from lockgate.access.choose import Choice, Wrong, choose


def kubeconfig(path: Path, current: str, *contexts: str) -> str:
    document = {"current-context": current, "contexts": [{"name": c} for c in contexts]}
    path.write_text(yaml.safe_dump(document))
    return str(path)


@pytest.fixture
def files(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "home/.kube").mkdir(parents=True)
    return {
        "HOME": str(tmp_path / "home"),
        "home": kubeconfig(tmp_path / "home/.kube/config", "laptop", "laptop"),
        "one": kubeconfig(tmp_path / "one", "a", "a", "b"),
        "two": kubeconfig(tmp_path / "two", "c", "c", "d"),
        "none": kubeconfig(tmp_path / "none", ""),
        "empty": str(tmp_path),
        "gone": str(tmp_path / "gone"),
    }


CASES = {
    "a cluster's name": (["shop", "", ""], {}, False, ("cluster", "shop")),
    "its name in the environment": (["shop", "", ""], {"LOCKGATE_CLUSTER": "shop"}, True, "shop"),
    "nothing, and the default cluster runs": (["", "", ""], {"KUBECONFIG": "one"}, True, "default"),
    "nothing, and it does not run": (["", "", ""], {"KUBECONFIG": "one"}, False, ("one", "a")),
    "nothing but a home": (["", "", ""], {}, False, ("home", "laptop")),
    "a file": (["", "one", ""], {"KUBECONFIG": "two"}, True, ("one", "a")),
    "a file and a context": (["", "one", "b"], {}, False, ("one", "b")),
    "a context": (["", "", "b"], {"KUBECONFIG": "one"}, True, ("one", "b")),
    "a context of the second file": (
        ["", "", "d"],
        {"KUBECONFIG": "one:two"},
        False,
        ("one:two", "d"),
    ),
    "files that are not there are left out": (
        ["", "", ""],
        {"KUBECONFIG": "gone:one"},
        False,
        ("one", "a"),
    ),
    "the current one of the first file that has one": (
        ["", "", ""],
        {"KUBECONFIG": "none:two:one"},
        False,
        ("none:two:one", "c"),
    ),
    "a file beats a name that is only in the environment": (
        ["shop", "one", ""],
        {"LOCKGATE_CLUSTER": "shop"},
        True,
        ("one", "a"),
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_cluster_that_is_meant(case: tuple, files: dict[str, str]) -> None:  # type: ignore[type-arg]
    (cluster, file, context), environment, default_runs, expected = case
    found = choose(
        cluster,
        files.get(file, ""),
        context,
        real(environment, files),
        lambda name: default_runs and name == "default",
    )
    if isinstance(expected, str):
        assert found == Choice(cluster=expected)
    elif expected[0] == "cluster":
        assert found == Choice(cluster=expected[1])
    else:
        assert found == Choice(
            kubeconfig=tuple(files[one] for one in expected[0].split(":")), context=expected[1]
        )


def real(environment: dict[str, str], files: dict[str, str]) -> dict[str, str]:
    """With the names of files replaced by their paths."""
    listed = environment.get("KUBECONFIG", "")
    paths = {"KUBECONFIG": ":".join(files[part] for part in listed.split(":"))} if listed else {}
    return {"HOME": files["HOME"], **environment, **paths}


def test_kubectl_lockgate_never_takes_a_standalone_cluster_by_itself(
    files: dict[str, str],
) -> None:
    found = choose("", "", "", {"HOME": files["HOME"]}, lambda _: True, plugin=True)
    assert found == Choice(kubeconfig=(files["home"],), context="laptop")
    assert choose("shop", "", "", {}, lambda _: True, plugin=True) == Choice(cluster="shop")


WRONG = {
    "neither a cluster nor a kubeconfig": (["", "", ""], "", "start one with `lockgate up DIR`"),
    "a file that is not there": (["", "/nowhere", ""], "", "there is no kubeconfig /nowhere"),
    "a context that is not there": (["", "one", "x"], "", "there is no context 'x'"),
    "no current context": (["", "none", ""], "", "no current context is named: give --context"),
    "a standalone cluster of a kubeconfig": (["shop", "one", ""], "", "does not go with"),
    "a folder": (["", "empty", ""], "", "Is a directory"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_what_cannot_be_meant(case: tuple, files: dict[str, str]) -> None:  # type: ignore[type-arg]
    (cluster, file, context), listed, complaint = case
    environment = {"HOME": "/nowhere", "KUBECONFIG": listed}
    with pytest.raises(Wrong, match=complaint.replace("(", r"\(")):
        choose(cluster, files.get(file, file), context, environment, lambda _: False)
