"""The proximal step in Triton: every tensor of one dtype and device in one launch, or two.

`whole_groups` (whole.py) serves groups that fit a register tile. A program loads PARTS parts of RED x KEEP
elements (PARTS*RED >= group size), and z never leaves its registers between the reduction and the apply.

`split_groups` (split.py) serves longer groups in chunks, ordered by tickets. Sweeps that only read leave
partial sums. The last chunk of a panel to arrive adds them in index order and moves the panel's search for
(s, t) on. The apply pass reads everything again. A ticket waits only for tickets already taken, so nothing
depends on how many programs are resident, and exact mode's further sweeps cost no further launch.

This file has the functions on tiles that both kernels call. updates.py has the update rules; a kernel is
compiled for one of them: for its functions LOAD and UPDATE, and the number of its STATES. The formulas have
the names of core/shrinkage.py and shrinkage.h. Numbers come from tables in device memory (tables.py), and
executor.py launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .addressing import pointer
from .tables import (
    ADDRESS_EXCLUSIVE_LASSO,
    ADDRESS_GROUP_LASSO,
    ADDRESS_L1,
    ADDRESS_LR,
    FIRST,
    FREEZE_ELEMENT,
    FREEZE_GROUP,
    HYPER_A,
    HYPER_B,
    HYPER_C,
    HYPER_EXACT,
    HYPER_FREEZE,
    HYPER_LR,
    HYPER_ON_DEVICE,
    PROX_ALONE,
    RUNNING,
    TENSOR_GRAD,
    TENSOR_PHASE,
    TENSOR_STATES,
    TENSOR_W,
)
from .updates import divide, load_number, square_root

# The prox.


@triton.jit
def form_thresholds(lr, group_lasso, exclusive_lasso, l1):
    """(a, b, c) = lr times each coefficient."""
    return lr * group_lasso, lr * exclusive_lasso, lr * l1


@triton.jit
def load_thresholds(row):
    """(a, b, c, whether exact). Thresholds that the host has formed are multiplied by 1."""
    group_lasso = load_number(row, HYPER_A, ADDRESS_GROUP_LASSO)
    exclusive_lasso = load_number(row, HYPER_B, ADDRESS_EXCLUSIVE_LASSO)
    l1 = load_number(row, HYPER_C, ADDRESS_L1)
    lr = tl.where(tl.load(row + HYPER_ON_DEVICE) != 0, load_number(row, HYPER_LR, ADDRESS_LR), 1.0)
    a, b, c = form_thresholds(lr, group_lasso, exclusive_lasso, l1)
    return a, b, c, tl.load(row + HYPER_EXACT)


@triton.jit
def load_freeze(row):
    """The freeze mode, as an index into FREEZE_MODES."""
    return tl.load(row + HYPER_FREEZE).to(tl.int32)


@triton.jit
def soft_magnitude(z, t):
    """|soft(z, t)| = max(|z| - t, 0); NaN stays NaN."""
    u = tl.abs(z) - t
    return tl.where(u <= 0, 0.0, u)


@triton.jit
def group_stats(zs, t, PARTS: tl.constexpr):
    """Sums over a tile's parts and their axis 0 of u = soft(z, t): count of nonzeros, l1, l2 norm squared.

    The parts are added up within each thread first, and only then across threads.
    """
    u = soft_magnitude(zs[0], t[None, :])
    count, l1, l2_squared = tl.where(u == 0, 0.0, 1.0).to(u.dtype), u, u * u
    for p in tl.static_range(1, PARTS):
        u = soft_magnitude(zs[p], t[None, :])
        count += tl.where(u == 0, 0.0, 1.0).to(u.dtype)
        l1 += u
        l2_squared += u * u
    return tl.sum(count, axis=0), tl.sum(l1, axis=0), tl.sum(l2_squared, axis=0)


@triton.jit
def group_scale(l2, a):
    """s = max(1 - a/||u||_2, 0); 1 where a = 0, whatever the norm."""
    return tl.where(a == 0, 1.0, tl.where(l2 <= a, 0.0, 1.0 - divide(a, l2)))


@triton.jit
def solve_shrinkage(search, stats, thresholds, sweep, EXACT: tl.constexpr, EPS: tl.constexpr):
    """One sweep of each group's search for (s, t), given its stats at the present t; t starts at c.

    `search` is (s, t, low, high, done), and so is the result. Groups that are done keep their numbers.
    """
    s, t, low, high, done = search
    count, l1, l2_squared = stats
    a, b, c, exact = thresholds
    l2 = square_root(l2_squared)
    scale = group_scale(l2, a)
    settled = tl.where(b == 0, c, c + b * l1)  # sequential mode's t
    finished = done == done
    if EXACT:  # Newton's or Halley's step to the root of excess, in a shrinking bracket; see shrinkage.h
        high = tl.where(sweep == 0, settled * (1 + 4 * EPS), high)
        excess = t - c - b * scale * l1
        ratio = divide(l1, l2)
        bend = tl.where(a == 0, 0.0, divide(a * ratio * ratio, l2))
        slope = 1.0 + tl.where(scale == 0, 0.0, b * (count * scale + bend))
        part = divide(-excess, l1)
        part = tl.where(part < b * scale, part, b * scale)
        many = tl.maximum(count - 4, 0.0)
        bent = slope - 0.4 * (part * many) * divide(b * scale * many, slope)
        step = t - divide(excess, tl.where(excess < 0, bent, slope))
        low = tl.where(~done & (excess < 0), t, low)
        high = tl.where(~done & (excess > 0), t, high)
        moves = tl.abs(step - t) > 4 * EPS * tl.abs(step)  # false for NaN, which stays NaN
        step = tl.where(moves & ((step <= low) | (step >= high)), low + (high - low) * 0.5, step)
        iterate = (exact != 0) & (b != 0)
        finished = tl.where(iterate, ~(tl.abs(step - t) > 4 * EPS * tl.abs(step)), True)
        settled = tl.where(iterate, step, settled)
    return tl.where(done, s, scale), tl.where(done, t, settled), low, high, done | finished


@triton.jit
def apply_shrinkage(z, s, t, STORED: tl.constexpr):
    """s * soft(z, t) rounded to the stored dtype; every zero is +0.0."""
    m = soft_magnitude(z, t[None, :])
    w = (s[None, :] * tl.where(z < 0, -m, m)).to(STORED).to(z.dtype)
    return tl.where(w == 0, 0.0, w)


@triton.jit
def frozen(w, alive, freeze):
    """Which elements must stay zero: zeros, or all elements of groups none of whose entries is alive."""
    dead = tl.where(freeze == FREEZE_GROUP, alive[None, :] == 0, False)
    return tl.where(freeze == FREEZE_ELEMENT, w == 0, dead)


# Tiles.


@triton.jit
def update_tile(
    tensor, base, offsets, mask, scalars,
    UPDATE: tl.constexpr, STATES: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr,
    VEC: tl.constexpr,
):  # fmt: skip
    """(w, z, new states) of a tile; elements that are masked out are 0."""
    phase = tl.load(tensor + TENSOR_PHASE)
    w = tl.load(pointer(tensor, TENSOR_W, base, STORED, VEC) + offsets, mask, other=0.0).to(COMPUTE)
    at = pointer(tensor, TENSOR_GRAD, base, STORED, VEC) + offsets
    grad = tl.load(at, tl.where(phase > PROX_ALONE, mask, False), other=0.0)
    states = ()
    for s in tl.static_range(STATES):
        at = pointer(tensor, TENSOR_STATES + s, base, STORED, VEC) + offsets
        state = tl.load(at, tl.where(phase == RUNNING, mask, False), other=0.0)
        states = states + (state.to(COMPUTE),)  # type: ignore[assignment]  # see whole.py
    z, states = UPDATE(w, grad.to(COMPUTE), states, phase, scalars)
    return w, z, states


@triton.jit
def keep_zeros(dead, z, states):
    """(z, states) with zeros where `dead`."""
    kept = ()
    for s in tl.static_range(len(states)):
        kept = kept + (tl.where(dead, 0.0, states[s]),)  # type: ignore[assignment]
    return tl.where(dead, 0.0, z), kept


@triton.jit
def store_states(tensor, base, offsets, mask, states, STORED: tl.constexpr, VEC: tl.constexpr):
    """Write the states of a tile, if the tensor's phase has any."""
    writes = tl.load(tensor + TENSOR_PHASE) >= FIRST
    for s in tl.static_range(len(states)):
        at = pointer(tensor, TENSOR_STATES + s, base, STORED, VEC) + offsets
        tl.store(at, states[s].to(STORED), tl.where(writes, mask, False))


@triton.jit
def store_weights(tensor, base, offsets, mask, z, s, t, shrinks, STORED: tl.constexpr, VEC: tl.constexpr):
    """Write w = s * soft(z, t), or z itself, bit for bit, where nothing shrinks."""
    w = tl.where(shrinks, apply_shrinkage(z, s, t, STORED), z)
    tl.store(pointer(tensor, TENSOR_W, base, STORED, VEC) + offsets, w.to(STORED), mask)


INTERPRETED = not isinstance(update_tile, triton.JITFunction)
