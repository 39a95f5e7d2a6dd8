"""Cuts tensors for the Triton kernels: the table of launch choices, and the choice for a layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ...core.groups import Layout
from .tables import COLUMNS, ELEMENTWISE, GENERAL, ROWS, Variant

VECTOR_BYTES = 16


class Tile(NamedTuple):
    """A register tile for groups up to `longest`: parts of `red` entries of each of `keep` groups.

    `longest` 0 means chunks of one part, for groups of any length.
    """

    longest: int
    red: int
    keep: int


# The launch choices for each kind of layout: the first tile whose `longest` covers the group is taken. A part
# of 4096 elements is 16 per thread, so that 12 loads of 16 bytes are in flight, and three programs fit an SM
# where there is one part.
NUM_WARPS = 8
TILES: dict[int, tuple[Tile, ...]] = {
    ELEMENTWISE.value: (Tile(1, 1, 4096),),
    COLUMNS.value: (
        Tile(8, 8, 512),
        Tile(32, 32, 128),
        Tile(64, 64, 64),
        Tile(128, 128, 32),  # 128 bytes of a row: one full line
        Tile(256, 128, 32),  # two parts: z takes 32 registers a thread
        Tile(512, 256, 16),  # 64 bytes of a row; a neighbour takes the rest of the line at the same time
        Tile(1024, 256, 16),  # four parts: z takes 64 registers and its sums 48; more would spill
        Tile(0, 128, 32),  # chunks
    ),
    ROWS.value: (
        Tile(16, 16, 256),  # kernel positions, depthwise filters
        Tile(64, 64, 64),
        Tile(256, 256, 16),
        Tile(1024, 1024, 4),
        Tile(4096, 4096, 1),
        Tile(16384, 4096, 1),  # four parts
        Tile(0, 4096, 1),  # chunks
    ),
    GENERAL.value: (
        Tile(16, 16, 128),  # 8 elements per thread, since single accesses and their addresses take registers
        Tile(64, 64, 32),
        Tile(256, 256, 8),
        Tile(1024, 1024, 4),
        Tile(0, 256, 8),  # chunks
    ),
}


class Tiling(NamedTuple):
    """The cut of one tensor: its variant, whether a tile holds whole groups, and each panel's first group."""

    variant: Variant
    whole: bool
    panels: np.ndarray


def working_layout(layout: Layout) -> Layout:
    """A layout of the same groups, contiguous ones as rows: (K1, R1, 1, 1) becomes (1, 1, K1, R1)."""
    return Layout(1, 1, layout.K1, layout.R1) if layout.K2 == layout.R2 == 1 else layout


def launch_options(
    variants: Sequence[Variant], dtype: torch.dtype, exact: bool, nvidia: bool
) -> dict[str, Any]:
    """The options for compiling a kernel for `variants`.

    With up to 128 registers per thread two programs share an SM; z of four parts, or 64-bit divisions, take
    more. The limit is passed to ptxas, because by itself it may stop at 64 or 128 registers and spill the
    rest.
    """
    options: dict[str, Any] = {"VARIANTS": tuple(variants), "num_warps": NUM_WARPS, "enable_fp_fusion": True}
    if nvidia:
        small = dtype != torch.float64 and not exact and all(v.parts <= 2 and not v.wide for v in variants)
        options["maxnreg"] = 128 if small else 255
    return options


def halved(tile: Tile) -> Tile:
    """A tile of half as many elements: of half as many groups, or of half as long ones where it has one."""
    if tile.keep > 1:
        return tile._replace(keep=tile.keep // 2)
    return Tile(tile.longest // 2, max(tile.red // 2, 1), 1)


def tile_for(kind: int, size: int, dtype: torch.dtype, vec: int) -> Tile:
    """The tile for groups of `size`, half as large where elements take two registers or single accesses."""
    tiles = TILES[kind]
    if dtype == torch.float64:
        tiles = tuple(map(halved, tiles))
    if vec == 1 and kind != GENERAL.value:
        tiles = tuple(map(halved, tiles))
    return next((tile for tile in tiles if size <= tile.longest), tiles[-1])


def cut(layout: Layout, grouped: bool, dtype: torch.dtype, aligned: bool) -> Tiling:
    """Cuts a tensor; `aligned` says whether its memory begins on a multiple of 16 bytes."""
    K1, R1, K2, R2 = layout
    if not grouped:
        kind = ELEMENTWISE.value
    elif R1 == 1 and R2 > 1:
        kind = ROWS.value
    elif R2 == 1 and (K1 == 1 or K2 >= 16):
        kind = COLUMNS.value
    else:
        kind = GENERAL.value
    pitch = {ELEMENTWISE.value: K2, ROWS.value: R2, COLUMNS.value: K2, GENERAL.value: 1}[kind]
    vec = VECTOR_BYTES // dtype.itemsize
    vec = vec if aligned and pitch % vec == 0 else 1
    size = layout.group_size
    longest, red, keep = tile_for(kind, size, dtype, vec)
    span = {  # the largest offset from a tile's first element
        ELEMENTWISE.value: keep,
        ROWS.value: keep * R2 + red,
        COLUMNS.value: red * K2 + keep,
        GENERAL.value: size * layout.num_groups,
    }[kind]
    variant = Variant(kind, max(longest // red, 1), red, keep, vec, span >= 2**31)
    panels = np.arange(0, layout.num_groups, keep)
    if kind == COLUMNS.value:  # a panel lies within one k1
        panels = (np.arange(K1)[:, None] * K2 + np.arange(0, K2, keep)).ravel()
    return Tiling(variant, size <= longest, panels)
