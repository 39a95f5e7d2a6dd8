"""The tables `items` of both kernels: which tile each program works on, from how tensors are cut.

tiles.py cuts tensors; executor.py uploads the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from ...core.groups import Layout
from .tables import (
    IDLE,
    ITEM_CHUNK,
    ITEM_CHUNKS,
    ITEM_COLUMNS,
    ITEM_ENTRY,
    ITEM_GROUP,
    ITEM_PANEL,
    ITEM_SCRATCH,
    ITEM_TENSOR,
    ITEM_VARIANT,
    SPLIT_ITEM_COLUMNS,
    STATE_ROWS,
    SUM_ROWS,
    Variant,
)
from .tiles import Tiling


class WholeItems(NamedTuple):
    """The items of the kernel whole_groups, one per program."""

    variants: list[Variant]
    table: np.ndarray


class SplitItems(NamedTuple):
    """The items of the kernel split_groups, in windows of equal length, and the scratch that panels share."""

    variants: list[Variant]
    table: np.ndarray
    windows: int
    panels: int
    scratch: int


def whole_items(tilings: Sequence[Tiling]) -> WholeItems:
    """The items of tensors whose groups fit a tile."""
    variants = sorted({tiling.variant for tiling in tilings if tiling.whole})
    tables = [np.zeros((0, ITEM_COLUMNS), dtype=np.int64)]
    for i, tiling in enumerate(tilings):
        if tiling.whole:
            items = np.zeros((len(tiling.panels), ITEM_COLUMNS), dtype=np.int64)
            items[:, ITEM_VARIANT] = variants.index(tiling.variant)
            items[:, ITEM_TENSOR] = i
            items[:, ITEM_GROUP] = tiling.panels
            tables.append(items)
    return WholeItems(variants, np.concatenate(tables))


def split_items(
    tilings: Sequence[Tiling], layouts: Sequence[Layout], dtype: torch.dtype, window_bytes: int
) -> SplitItems:
    """The items of tensors with longer groups.

    A window holds whole panels, as many as fit `window_bytes`, and idle items up to its length.
    """
    variants = sorted({tiling.variant for tiling in tilings if not tiling.whole})
    panels: list[np.ndarray] = []  # of shape [chunks, SPLIT_ITEM_COLUMNS] each
    scratch = 0
    for i, (tiling, layout) in enumerate(zip(tilings, layouts)):
        if tiling.whole:
            continue
        first = np.arange(0, layout.group_size, tiling.variant.red)  # the first entry of each chunk
        panel = np.arange(len(tiling.panels))[:, None]
        of_panel = (STATE_ROWS.value + SUM_ROWS.value * len(first)) * tiling.variant.keep
        items = np.zeros((len(panel), len(first), SPLIT_ITEM_COLUMNS), dtype=np.int64)
        items[..., ITEM_VARIANT] = variants.index(tiling.variant)
        items[..., ITEM_TENSOR] = i
        items[..., ITEM_GROUP] = tiling.panels[:, None]
        items[..., ITEM_ENTRY] = first
        items[..., ITEM_PANEL] = len(panels) + panel
        items[..., ITEM_CHUNK] = np.arange(len(first))
        items[..., ITEM_CHUNKS] = len(first)
        items[..., ITEM_SCRATCH] = scratch + of_panel * panel
        panels += list(items)
        scratch += of_panel * len(panel)
    tile_bytes = 3 * dtype.itemsize * max((v.red * v.keep for v in variants), default=1)
    windows, length = _windows(panels, window_bytes // tile_bytes)
    table = np.zeros((len(windows), length, SPLIT_ITEM_COLUMNS), dtype=np.int64)
    table[:, :, ITEM_VARIANT] = IDLE
    for row, window in zip(table, windows):
        items = np.concatenate(window)
        row[: len(items)] = items
    return SplitItems(variants, table.reshape(-1, SPLIT_ITEM_COLUMNS), len(windows), len(panels), scratch)


def _windows(panels: list[np.ndarray], most: int) -> tuple[list[list[np.ndarray]], int]:
    """The panels of each window, and the windows' length: `most` items, or more where a panel has more."""
    length = max([most, *map(len, panels)])
    windows: list[list[np.ndarray]] = []
    room = 0
    for panel in panels:
        if len(panel) > room:
            windows.append([])
            room = length
        windows[-1].append(panel)
        room -= len(panel)
    return windows, length - room if len(windows) == 1 else length
