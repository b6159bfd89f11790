"""Real clusters and a containerd for the whole tier, each up in seconds, so that tests share them
and keep to namespaces of their own. What they are made of is built beside the tests of the other
tiers, if any test of this one is to run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import Cluster, shop
from cluster.install import install
from tests.cluster.containers import Containerd, containerd
from tests.cluster.preparation import Preparation

_FOLDER = Path(__file__).parent
_PATIENCE = 400  # seconds for a test with all its clusters, on a machine that is busy
_preparation = Preparation()
_prepared = False


def _is_ours(item: pytest.Item) -> bool:
    return item.path.is_relative_to(_FOLDER)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in filter(_is_ours, items):
        if item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(_PATIENCE))


def pytest_collection_finish(session: pytest.Session) -> None:
    if any(map(_is_ours, session.items)) and not session.config.option.collectonly:
        _preparation.begin()


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(
    item: pytest.Item, nextitem: pytest.Item | None
) -> Iterator[None, object, object]:
    """Before the first test of the tier, and outside its time: wait for what it stands on."""
    global _prepared
    if _is_ours(item) and not _prepared:
        _prepared = True
        reporter = item.config.pluginmanager.get_plugin("terminalreporter")
        if _preparation.running and reporter is not None:
            reporter.write_line("")
            reporter.write_line(
                "waiting for what the clusters are made of (build/cluster-tests.log)"
            )
        missing = _preparation.missing()
        if missing:
            pytest.exit(
                "the tests on a real cluster cannot run here (`make test CLUSTER=0` leaves them"
                f" out): {missing}",
                returncode=1,
            )
    return (yield)


def pytest_sessionfinish() -> None:
    _preparation.end()


@pytest.fixture(scope="session", autouse=True)
def _root() -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root")


@pytest.fixture(scope="session")
def bare() -> Iterator[Cluster]:
    """Two nodes with the distribution's bridge plugin: Kubernetes itself, without Lockgate."""
    with Cluster.up(f"b{os.getpid()}", cni="bridge") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def real() -> Iterator[Cluster]:
    """Two nodes with Lockgate, installed as users do, and the shop, all of it ready."""
    with Cluster.up(f"l{os.getpid()}") as cluster:
        install(cluster)
        shop.apply(cluster)
        shop.wait(cluster)
        yield cluster


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Containerd]:
    """A containerd without a kubelet, with Lockgate's image."""
    with containerd(tmp_path_factory.mktemp("containerd")) as one:
        yield one
