"""How tensors are cut for the Triton kernels: the table of launch choices, and which one a layout takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .groups import Layout
from .triton_kernels import COLUMNS, GENERAL, ROWS

VECTOR_BYTES = 16
WARP_ELEMENTS = 1024  # 32 per thread: w, gradient and buffer in flight, and z, without a spill


class Tile(NamedTuple):
    """A register tile: ``red`` entries of each of ``keep`` groups; groups up to ``longest`` fit whole."""

    longest: int
    red: int
    keep: int


# The launch choices, by kind of layout: the first tile whose `longest` covers the group; the last one cuts
# longer groups into chunks. For 8-byte elements KEEP is halved. `python -m bench.tune` measures them.
TILES: dict[int, tuple[Tile, ...]] = {
    COLUMNS.value: (
        Tile(1, 1, 8192),  # elementwise: as many elements as 8 warps hold
        Tile(8, 8, 1024),
        Tile(32, 32, 256),
        Tile(64, 64, 128),
        Tile(128, 128, 64),
        Tile(256, 256, 32),  # 128 bytes of a row: one full line
        Tile(512, 512, 32),  # 16 warps keep the line full
        Tile(1024, 1024, 16),  # 64 bytes of a row: 32 columns spill at any number of warps
        Tile(0, 128, 64),  # chunks
    ),
    ROWS.value: (
        Tile(16, 16, 512),  # kernel positions, depthwise filters
        Tile(64, 64, 128),
        Tile(256, 256, 32),
        Tile(1024, 1024, 8),
        Tile(4096, 4096, 2),
        Tile(8192, 8192, 1),
        Tile(0, 8192, 1),  # chunks
    ),
    GENERAL.value: (
        Tile(16, 16, 256),
        Tile(64, 64, 64),
        Tile(256, 256, 16),
        Tile(1024, 1024, 4),
        Tile(0, 256, 16),  # chunks
    ),
}


class Variant(NamedTuple):
    """A tile as a kernel is compiled for it; the fields are tile_offsets' constants."""

    kind: int
    red: int
    keep: int
    vec: int
    wide: bool


class Cut(NamedTuple):
    """How one tensor is cut: its variant, whether a group is one tile, and the first group of each panel."""

    variant: Variant
    whole: bool
    panels: np.ndarray


def working_layout(layout: Layout) -> Layout:
    """The same groups with contiguous ones as rows: (K1, R1, 1, 1) is K1 runs of R1."""
    return Layout(1, 1, layout.K1, layout.R1) if layout.K2 == layout.R2 == 1 else layout


def cut(layout: Layout, dtype: torch.dtype, aligned: bool) -> Cut:
    """The tile for a tensor's groups; ``aligned``: its memory begins on multiples of 16 bytes."""
    K1, R1, K2, R2 = layout
    if R1 == 1 and R2 > 1:
        kind, pitch = ROWS.value, R2
    elif R2 == 1 and (K1 == 1 or K2 >= 16):
        kind, pitch = COLUMNS.value, K2
    else:
        kind, pitch = GENERAL.value, 1
    size = layout.group_size
    tile = next((tile for tile in TILES[kind] if size <= tile.longest), TILES[kind][-1])
    keep = max(tile.keep // (2 if dtype == torch.float64 else 1), 1)
    vec = VECTOR_BYTES // dtype.itemsize
    rows = tile.red if kind == COLUMNS.value else keep
    variant = Variant(
        kind, tile.red, keep, vec if aligned and pitch % vec == 0 else 1, (rows + 1) * pitch >= 2**31
    )
    starts = np.arange(0, layout.num_groups, keep)
    if kind == COLUMNS.value:
        starts = (np.arange(K1)[:, None] * K2 + np.arange(0, K2, keep)).ravel()
    return Cut(variant, size <= tile.longest, starts)


def launch_options(variants: Sequence[Variant]) -> dict[str, Any]:
    """A kernel's compile-time options for these variants; the largest tile decides the warps."""
    elements = max((v.red * v.keep for v in variants), default=1)
    return {"VARIANTS": tuple(variants), "num_warps": min(max(elements // WARP_ELEMENTS, 4), 16)}
