"""Two real clusters for the whole tier, each up in seconds, so that tests share them and keep to
namespaces of their own. `make test-cluster` builds Kubernetes and the image before, so that no
test waits for that."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cluster import Cluster, shop
from cluster.install import install


def _need_root() -> None:
    if os.geteuid() != 0:
        pytest.fail("needs root")


@pytest.fixture(scope="session")
def bare() -> Iterator[Cluster]:
    """Two nodes with the distribution's bridge plugin: Kubernetes itself, without Lockgate."""
    _need_root()
    with Cluster.up(f"b{os.getpid()}", cni="bridge") as cluster:
        yield cluster


@pytest.fixture(scope="session")
def real() -> Iterator[Cluster]:
    """Two nodes with Lockgate, installed as users do, and the shop, all of it ready."""
    _need_root()
    with Cluster.up(f"l{os.getpid()}") as cluster:
        install(cluster)
        shop.apply(cluster)
        shop.wait(cluster)
        yield cluster
