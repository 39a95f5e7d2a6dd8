"""Fixtures for tests of the Triton executor."""

import pytest

from cges_kernels.backends import unplanned


@pytest.fixture
def launches(monkeypatch):
    """The log of all launches of the two kernels."""
    from helpers.triton_launches import (  # this import skips the test where there is no Triton
        SPLIT,
        WHOLE,
        Noted,
        executor,
    )

    log = []
    for name in (WHOLE, SPLIT):
        monkeypatch.setattr(executor, name, Noted(name, log))
    return log


@pytest.fixture
def small_tiles(monkeypatch):
    """Makes tiles so small that only groups of up to 32 elements fit; longer ones go in chunks of 32."""
    from helpers.triton_launches import tiles

    unplanned.forget()  # plans that are kept were cut for other tiles
    for kind in (tiles.COLUMNS, tiles.ROWS, tiles.GENERAL):
        monkeypatch.setitem(tiles.TILES, kind.value, (tiles.Tile(32, 32, 16), tiles.Tile(0, 32, 16)))
    yield
    unplanned.forget()
