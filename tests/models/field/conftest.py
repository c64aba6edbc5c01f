"""Two processes for the issues that need them."""

from __future__ import annotations

import pytest

from distributed.world import World


@pytest.fixture
def world(worlds: dict[int, World]) -> World:
    return worlds.setdefault(2, World(2))
