"""The kernel for groups too long for a register tile: chunks ordered by tickets; see kernels.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import tile_offsets
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
    COUNTER_PANELS,
    COUNTER_TICKETS,
    FREEZE_GROUP,
    ITEM_CHUNK,
    ITEM_CHUNKS,
    ITEM_ENTRY,
    ITEM_GROUP,
    ITEM_PANEL,
    ITEM_SCRATCH,
    ITEM_TENSOR,
    ITEM_VARIANT,
    MAX_SWEEPS,
    PANEL_ARRIVED,
    PANEL_COUNTERS,
    PANEL_SEEN,
    PANEL_SWEPT,
    SHAPE_COLUMNS,
    SKIPPED,
    SPLIT_ITEM_COLUMNS,
    STATE_ALIVE,
    STATE_DONE,
    STATE_HIGH,
    STATE_LOW,
    STATE_ROWS,
    STATE_S,
    STATE_T,
    SUM_ALIVE,
    SUM_COUNT,
    SUM_L1,
    SUM_L2_SQUARED,
    SUM_ROWS,
    TENSOR_COLUMNS,
    TENSOR_PHASE,
    VARIANT_KEEP,
    VARIANT_KIND,
    VARIANT_RED,
    VARIANT_VEC,
    VARIANT_WIDE,
    Constant,
)
from .updates import hyper_row

SUM_BLOCK = Constant(2048)  # the number of partial sums that are added at once


@triton.jit
def load_row(scratch, i, KEEP: tl.constexpr):
    """Row i of a panel's scratch, read from the L2 because another program may just have written it."""
    return tl.load(scratch + i * KEEP + tl.arange(0, KEEP), cache_modifier=".cg")


@triton.jit
def store_row(scratch, i, row, KEEP: tl.constexpr):
    """Write row i of a panel's scratch."""
    tl.store(scratch + i * KEEP + tl.arange(0, KEEP), row)


@triton.jit
def total(partials, row, chunks, KEEP: tl.constexpr):
    """The chunks' sums of one row, added in index order, so that the bits are the same whoever adds."""
    BLOCK: tl.constexpr = SUM_BLOCK // KEEP
    block, keep = tl.arange(0, BLOCK)[:, None], tl.arange(0, KEEP)[None, :]
    sums = tl.zeros([KEEP], partials.dtype.element_ty)
    for start in range(0, chunks, BLOCK):
        at = (start + block).to(tl.int64) * SUM_ROWS + row
        sums += tl.sum(
            tl.load(partials + at * KEEP + keep, start + block < chunks, other=0.0, cache_modifier=".cg"),
            axis=0,
        )
    return sums


@triton.jit
def wait_for(count, at_least):
    """Spin until *count >= at_least, and return it; all writes before that increase are then visible."""
    seen = tl.atomic_add(count, 0, sem="acquire")
    while seen < at_least:
        seen = tl.atomic_add(count, 0, sem="acquire")
    return seen


@triton.jit
def move_search_on(
    scratch, chunks, sweep, thresholds, EXACT: tl.constexpr, EPS: tl.constexpr, KEEP: tl.constexpr
):
    """Add up the chunks' sums, take one step of each group's search, and return whether all are done."""
    partials = scratch + STATE_ROWS * KEEP
    _, _, c, _ = thresholds
    zeros = tl.zeros([KEEP], scratch.dtype.element_ty)
    s, t, low, high, done = zeros + 1, zeros + c, zeros + c, zeros, zeros != 0
    if sweep == 0:
        alive = (total(partials, SUM_ALIVE, chunks, KEEP) != 0).to(zeros.dtype)
        store_row(scratch, STATE_ALIVE, alive, KEEP)
    else:
        s, t = load_row(scratch, STATE_S, KEEP), load_row(scratch, STATE_T, KEEP)
        low, high = load_row(scratch, STATE_LOW, KEEP), load_row(scratch, STATE_HIGH, KEEP)
        done = load_row(scratch, STATE_DONE, KEEP) != 0
        alive = load_row(scratch, STATE_ALIVE, KEEP)
    count, l1 = zeros, total(partials, SUM_L1, chunks, KEEP)
    l2_squared = total(partials, SUM_L2_SQUARED, chunks, KEEP)
    if EXACT:
        count = total(partials, SUM_COUNT, chunks, KEEP)
    dead = alive == 0  # the z of a frozen group is zero, though its sums were taken before that was known
    stats = tl.where(dead, 0.0, count), tl.where(dead, 0.0, l1), tl.where(dead, 0.0, l2_squared)
    s, t, low, high, done = solve_shrinkage((s, t, low, high, done), stats, thresholds, sweep, EXACT, EPS)
    store_row(scratch, STATE_S, s, KEEP)
    store_row(scratch, STATE_T, t, KEEP)
    store_row(scratch, STATE_LOW, low, KEEP)
    store_row(scratch, STATE_HIGH, high, KEEP)
    store_row(scratch, STATE_DONE, done.to(zeros.dtype), KEEP)
    return tl.min(done.to(tl.int32), axis=0) != 0


@triton.jit
def split_tile(
    item, sweep, tensor, shape, hyper, grad_scale, scratch, counters,
    KIND: tl.constexpr, RED: tl.constexpr, KEEP: tl.constexpr, VEC: tl.constexpr, WIDE: tl.constexpr,
    STORED: tl.constexpr, COMPUTE: tl.constexpr, EPS: tl.constexpr, EXACT: tl.constexpr, FREEZE: tl.constexpr,
    LOAD: tl.constexpr, UPDATE: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """One chunk of a panel of KEEP groups: a sweep of sums or, as the last stage, update and apply."""
    STAGES: tl.constexpr = MAX_SWEEPS if EXACT else 1
    row = hyper_row(hyper, shape)
    thresholds, freeze = load_thresholds(row), load_freeze(row)
    a, b, c, _ = thresholds
    panel = counters + COUNTER_PANELS + PANEL_COUNTERS * tl.load(item + ITEM_PANEL)
    arrived, swept, seen = panel + PANEL_ARRIVED, panel + PANEL_SWEPT, panel + PANEL_SEEN
    chunk, chunks = tl.load(item + ITEM_CHUNK), tl.load(item + ITEM_CHUNKS)
    scratch += tl.load(item + ITEM_SCRATCH)
    needs_sums = (a != 0) | (b != 0) | (freeze == FREEZE_GROUP)
    applies = sweep == STAGES
    behind = 0  # below 0 where the panel's search ended before this ticket's sweep
    if needs_sums:
        behind = sweep - wait_for(swept, sweep)
        if sweep > 0:  # the last program to have waited sets the counters back for the next step
            if tl.atomic_add(seen, 1, sem="acq_rel") == chunks * STAGES - 1:
                tl.store(seen, 0)
                tl.store(swept, 0)
    if applies | (needs_sums & (behind == 0)):
        g0, r0 = tl.load(item + ITEM_GROUP), tl.load(item + ITEM_ENTRY)
        base, offsets, mask = tile_offsets(shape, g0, r0, KIND, RED, KEEP, VEC, WIDE)
        scalars = LOAD(tensor, row, grad_scale)
        w, z, states = update_tile(tensor, base, offsets, mask, scalars, UPDATE, STATES, STORED, COMPUTE, VEC)
        s, t = tl.zeros([KEEP], COMPUTE) + 1, tl.zeros([KEEP], COMPUTE) + c
        alive = tl.zeros([KEEP], COMPUTE) + 1
        if needs_sums & (applies | (sweep > 0)):
            s, t = load_row(scratch, STATE_S, KEEP), load_row(scratch, STATE_T, KEEP)
            alive = load_row(scratch, STATE_ALIVE, KEEP)
        if FREEZE:
            dead = frozen(w, alive, freeze)
            z, states = keep_zeros(dead, z, states)
        if applies:
            store_states(tensor, base, offsets, mask, states, STORED, VEC)
            store_weights(tensor, base, offsets, mask, z, s, t, (a != 0) | (b != 0) | (c != 0), STORED, VEC)
        else:
            partials = scratch + (STATE_ROWS + chunk * SUM_ROWS) * KEEP
            count, l1, l2_squared = group_stats((z,), t, 1)
            store_row(partials, SUM_COUNT, count, KEEP)
            store_row(partials, SUM_L1, l1, KEEP)
            store_row(partials, SUM_L2_SQUARED, l2_squared, KEEP)
            alive = tl.max((w != 0).to(COMPUTE), axis=0)
            store_row(partials, SUM_ALIVE, tl.where(freeze == FREEZE_GROUP, alive, 1.0), KEEP)
            tl.debug_barrier()  # all threads must have stored before one of them releases
            if tl.atomic_add(arrived, 1, sem="acq_rel") == chunks - 1:
                tl.store(arrived, 0)
                done = move_search_on(scratch, chunks, sweep, thresholds, EXACT, EPS, KEEP)
                tl.debug_barrier()
                tl.atomic_xchg(swept, tl.where(done, STAGES, sweep + 1), sem="release")


@triton.jit
def split_groups(
    items, tensors, shapes, hyper, grad_scale, found_inf, scratch, counters, per_window, tickets,
    VARIANTS: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, EPS: tl.constexpr,
    EXACT: tl.constexpr, FREEZE: tl.constexpr,
    LOAD: tl.constexpr, UPDATE: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """One program per ticket. Tickets go window by window; in a window, sweep by sweep, then the apply.

    A window holds whole panels, as many as the L2 keeps, so that each pass finds in the L2 what the pass
    before has read.
    """
    STAGES: tl.constexpr = (MAX_SWEEPS if EXACT else 1) + 1
    if tl.load(found_inf) != 0:  # all programs see the same, so no ticket is taken
        return
    ticket = tl.atomic_add(counters + COUNTER_TICKETS, 1, sem="relaxed")
    if ticket == tickets - 1:
        tl.store(counters + COUNTER_TICKETS, 0)  # all tickets are taken: set back for the next step
    window, rest = ticket // (per_window * STAGES), ticket % (per_window * STAGES)
    item = items + (window * per_window + rest % per_window).to(tl.int64) * SPLIT_ITEM_COLUMNS
    variant, index = tl.load(item + ITEM_VARIANT), tl.load(item + ITEM_TENSOR)
    tensor, shape = tensors + index * TENSOR_COLUMNS, shapes + index * SHAPE_COLUMNS
    if tl.load(tensor + TENSOR_PHASE) > SKIPPED:
        for i in tl.static_range(len(VARIANTS)):
            if variant == i:
                split_tile(
                    item, rest // per_window, tensor, shape, hyper, grad_scale, scratch, counters,
                    VARIANTS[i][VARIANT_KIND], VARIANTS[i][VARIANT_RED], VARIANTS[i][VARIANT_KEEP],
                    VARIANTS[i][VARIANT_VEC], VARIANTS[i][VARIANT_WIDE],
                    STORED, COMPUTE, EPS, EXACT, FREEZE, LOAD, UPDATE, STATES,
                )  # fmt: skip
