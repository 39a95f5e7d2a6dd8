"""The kernel for groups that fit a register tile; see kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import pointer, tile_offsets
from .kernels import (
    frozen,
    group_stats,
    keep_zeros,
    load_freeze,
    load_thresholds,
    solve_shrinkage,
    store_states,
    store_weights,
    update_tile,
)
from .tables import (
    ELEMENTWISE,
    ITEM_COLUMNS,
    ITEM_GROUP,
    ITEM_TENSOR,
    ITEM_VARIANT,
    MAX_SWEEPS,
    SHAPE_COLUMNS,
    SKIPPED,
    TENSOR_COLUMNS,
    TENSOR_PHASE,
    TENSOR_W,
    VARIANT_KEEP,
    VARIANT_KIND,
    VARIANT_PARTS,
    VARIANT_RED,
    VARIANT_VEC,
    VARIANT_WIDE,
)
from .updates import hyper_row


@triton.jit
def whole_tile(
    item, tensor, shape, hyper, grad_scale,
    KIND: tl.constexpr, PARTS: tl.constexpr, RED: tl.constexpr, KEEP: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, EPS: tl.constexpr, EXACT: tl.constexpr,
    FREEZE: tl.constexpr, LOAD: tl.constexpr, UPDATE: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """KEEP whole groups: load, reduce, solve and apply without z leaving the registers.

    The parts are loaded one after another, so that of all of them only z is held.
    """
    row, g0 = hyper_row(hyper, shape), tl.load(item + ITEM_GROUP)
    alive = tl.zeros([KEEP], tl.int32) + (KIND == ELEMENTWISE)
    if FREEZE and KIND != ELEMENTWISE:
        for p in tl.static_range(PARTS):
            base, offsets, mask = tile_offsets(shape, g0, p * RED, KIND, RED, KEEP, VEC, WIDE)
            w = tl.load(pointer(tensor, TENSOR_W, base, STORED, VEC) + offsets, mask, other=0.0).to(COMPUTE)
            alive |= tl.max((w != 0).to(tl.int32), axis=0)
    zs, scalars = (), LOAD(tensor, row, grad_scale)
    for p in tl.static_range(PARTS):
        base, offsets, mask = tile_offsets(shape, g0, p * RED, KIND, RED, KEEP, VEC, WIDE)
        w, z, states = update_tile(tensor, base, offsets, mask, scalars, UPDATE, STATES, STORED, COMPUTE, VEC)
        if FREEZE:
            dead = frozen(w, alive, load_freeze(row))
            z, states = keep_zeros(dead, z, states)
        store_states(tensor, base, offsets, mask, states, STORED, VEC)
        zs = zs + (z,)  # type: ignore[assignment]  # Triton unrolls the loop: the tuple may grow
    a, b, c, exact = load_thresholds(row)
    if KIND == ELEMENTWISE:
        a, b = a * 0, b * 0
    zeros = tl.zeros([KEEP], COMPUTE)
    s, t, low, high, done = zeros + 1, zeros + c, zeros + c, zeros, zeros != 0
    if KIND != ELEMENTWISE:
        if (a != 0) | (b != 0):
            thresholds = a, b, c, exact
            s, t, low, high, done = solve_shrinkage(
                (s, t, low, high, done), group_stats(zs, t, PARTS), thresholds, 0, EXACT, EPS
            )
            if EXACT:
                sweep = 1
                while (tl.min(done.to(tl.int32), axis=0) == 0) & (sweep < MAX_SWEEPS):
                    s, t, low, high, done = solve_shrinkage(
                        (s, t, low, high, done), group_stats(zs, t, PARTS), thresholds, sweep, EXACT, EPS
                    )
                    sweep += 1
    shrinks = (a != 0) | (b != 0) | (c != 0)
    for p in tl.static_range(PARTS):
        base, offsets, mask = tile_offsets(shape, g0, p * RED, KIND, RED, KEEP, VEC, WIDE)
        store_weights(tensor, base, offsets, mask, zs[p], s, t, shrinks, STORED, VEC)


@triton.jit(do_not_specialize_on_alignment=["grad_scale", "found_inf"])
def whole_groups(
    items, tensors, shapes, hyper, grad_scale, found_inf,
    VARIANTS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, EPS: tl.constexpr,
    EXACT: tl.constexpr, FREEZE: tl.constexpr,
    LOAD: tl.constexpr, UPDATE: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """One program per item: a tile of whole groups of one tensor."""
    if tl.load(found_inf) != 0:
        return
    item = items + tl.program_id(0).to(tl.int64) * ITEM_COLUMNS
    variant, index = tl.load(item + ITEM_VARIANT), tl.load(item + ITEM_TENSOR)
    tensor, shape = tensors + index * TENSOR_COLUMNS, shapes + index * SHAPE_COLUMNS
    if tl.load(tensor + TENSOR_PHASE) > SKIPPED:
        for i in tl.static_range(len(VARIANTS)):
            if variant == i:
                whole_tile(
                    item, tensor, shape, hyper, grad_scale,
                    VARIANTS[i][VARIANT_KIND], VARIANTS[i][VARIANT_PARTS], VARIANTS[i][VARIANT_RED],
                    VARIANTS[i][VARIANT_KEEP], VARIANTS[i][VARIANT_VEC], VARIANTS[i][VARIANT_WIDE],
                    STORED, COMPUTE, EPS, EXACT, FREEZE, LOAD, UPDATE, STATES,
                )  # fmt: skip
