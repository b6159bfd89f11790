"""One loaded object for all tests of packets; connections and events are cleared in between."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

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


@pytest.fixture(scope="module")
def configured() -> Iterator[Callable[..., Any]]:
    """Worlds by name, with constants of their own; nothing remembered, and nothing but the base
    scene in force. Go `inside`."""
    from tests.bytecode.goldens import base
    from tests.bytecode.world import World

    made: dict[str, World] = {}

    def get(name: str, **constants: int) -> World:
        if name not in made:
            made[name] = World(constants=constants, name=name)
        made[name].clear()
        made[name].publish(base())
        return made[name]

    yield get
    for one in made.values():
        one.close()
