import pytest

from cges_kernels.backends import unplanned


@pytest.fixture
def launches(monkeypatch):
    from helpers.triton_launches import (  # where there is no Triton the test is skipped here
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
    """Groups of up to 32 fit a tile; longer ones come in chunks of 32."""
    from helpers.triton_launches import tiles

    unplanned.forget()  # what is kept was cut otherwise
    for kind in (tiles.COLUMNS, tiles.ROWS, tiles.GENERAL):
        monkeypatch.setitem(tiles.TILES, kind.value, (tiles.Tile(32, 32, 16), tiles.Tile(0, 32, 16)))
    yield
    unplanned.forget()
