"""Computes where the entries of a tile lie in memory. Only this part of the kernels depends on the layout."""

from __future__ import annotations

import triton
import triton.language as tl

from .tables import GENERAL, ROWS, SHAPE_GROUPS, SHAPE_K2, SHAPE_R1, SHAPE_R2


@triton.jit
def tile_offsets(
    shape,
    g0,
    r0,
    KIND: tl.constexpr,
    RED: tl.constexpr,
    KEEP: tl.constexpr,
    VEC: tl.constexpr,
    WIDE: tl.constexpr,
):
    """(base, offsets [RED, KEEP] from it, mask) of the entries from r0 on of the groups from g0 on.

    groups.Layout has the formula. VEC is the number of elements in 16 bytes where every row begins on a
    multiple of 16 bytes, else 1. It is a promise to the compiler, which then loads 16 bytes at once. WIDE
    says that 32-bit offsets from the base would overflow.
    """
    R1, K2 = tl.load(shape + SHAPE_R1), tl.load(shape + SHAPE_K2)
    R2, groups = tl.load(shape + SHAPE_R2), tl.load(shape + SHAPE_GROUPS)
    r, g = tl.arange(0, RED)[:, None], tl.arange(0, KEEP)[None, :]
    if KIND == GENERAL:
        base = tl.zeros([], tl.int64)
        r, g = r0 + r, g0 + g
        if not WIDE:  # 32-bit divisions are several times faster
            r, g = r.to(tl.int32), g.to(tl.int32)
            R1, K2, R2 = R1.to(tl.int32), K2.to(tl.int32), R2.to(tl.int32)
        offsets = ((g // K2 * R1 + r // R2) * K2 + g % K2) * R2 + r % R2
        mask = (r < R1 * R2) & (g < groups)
    else:
        k1 = g0 // K2  # a panel of columns lies within one k1; rows have only one
        pitch = R2 if KIND == ROWS else K2
        red_left = tl.minimum(R1 * R2 - r0, RED).to(tl.int32)
        keep_left = tl.minimum((k1 + 1) * K2 - g0, KEEP).to(tl.int32)
        if not WIDE:
            pitch = pitch.to(tl.int32)
        pitch = tl.multiple_of(pitch, VEC)
        if KIND == ROWS:
            base = g0 * R2 + r0
            offsets = g * pitch + r
            red_left = tl.multiple_of(red_left, VEC)
        else:
            base = (k1 * R1 + r0) * K2 + (g0 - k1 * K2)
            offsets = r * pitch + g
            keep_left = tl.multiple_of(keep_left, VEC)
        mask = (r < red_left) & (g < keep_left)
    return base, offsets, mask


@triton.jit
def pointer(tensor, column: tl.constexpr, base, STORED: tl.constexpr, VEC: tl.constexpr):
    """A pointer to the element at offset `base` of w, gradient or a state, by their column of `tensors`."""
    p = tl.load(tensor + column).to(tl.pointer_type(STORED)) + base
    return tl.multiple_of(p, 16 if VEC > 1 else 1)
