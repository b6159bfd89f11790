"""One real cluster for the whole tier: it takes ten seconds, so tests share it and keep to
namespaces of their own. `make test-cluster` builds Kubernetes before, so that no test waits for
that."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from cluster import Cluster


@pytest.fixture(scope="session")
def bare() -> Iterator[Cluster]:
    """Two nodes with the distribution's bridge plugin: Kubernetes itself, without Lockgate."""
    if os.geteuid() != 0:
        pytest.fail("needs root")
    with Cluster.up(f"b{os.getpid()}", cni="bridge") as cluster:
        yield cluster
