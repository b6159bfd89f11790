"""One loaded object for all tests of packets; connections and events are cleared in between."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def _world() -> Iterator[object]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    from tests.bytecode.world import World

    world = World()
    yield world
    world.close()


@pytest.fixture
def world(_world):
    """The world, with this thread inside its namespace and nothing remembered."""
    with _world.inside():
        _world.clear()
        yield _world
