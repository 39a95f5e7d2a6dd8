"""The proximal SGD step in Triton: every tensor of one dtype and device in one launch.

A step has at most two launches. `whole_groups` (whole.py) serves groups that fit a register tile: a program
loads parts of RED x KEEP elements (PARTS*RED >= group size), and z never leaves its registers between the
reduction and the apply. `split_groups` (split.py) serves longer groups in chunks, ordered by tickets: sweeps
that only read leave partial sums, the last chunk of a panel to arrive adds them in index order and moves the
panel's search for (s, t) on, and the apply pass reads everything again. A ticket waits only for tickets
already taken, so nothing depends on how many programs are resident, and exact mode's further sweeps cost no
further launch.

Here is what both kernels do with a tile. The formulas carry the names of core/reference.py, sgd.h and
shrinkage.h. The numbers come from tables in device memory, see tables.py. executor.py launches.
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
    HYPER_COLUMNS,
    HYPER_EXACT,
    HYPER_FREEZE,
    HYPER_GRAD_SIGN,
    HYPER_LR,
    HYPER_MOMENTUM,
    HYPER_NESTEROV,
    HYPER_NUMBERS,
    HYPER_ON_DEVICE,
    HYPER_ONE_MINUS_DAMPENING,
    HYPER_WEIGHT_DECAY,
    PROX_ALONE,
    RUNNING,
    SHAPE_HYPER,
    TENSOR_BUF,
    TENSOR_GRAD,
    TENSOR_PHASE,
    TENSOR_W,
)


@triton.jit
def divide(x, y):
    """x / y, correctly rounded."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def hyper_row(hyper, shape):
    """The row of `hyper` that a tensor takes."""
    return hyper + tl.load(shape + SHAPE_HYPER) * HYPER_COLUMNS


@triton.jit
def load_number(row, column: tl.constexpr, source: tl.constexpr):
    """A number of the row, or the float at the row's address ``source``, if there is one."""
    value = tl.load(row + column)
    address = tl.load((row + HYPER_NUMBERS).to(tl.pointer_type(tl.int64)) + source)
    there = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return tl.where(address != 0, there.to(value.dtype), value)


# The update rule, SGD; its columns of `hyper` are apart from the prox's.


@triton.jit
def load_sgd(row, grad_scale):
    """The scalars of sgd_update."""
    lr, momentum = load_number(row, HYPER_LR, ADDRESS_LR), tl.load(row + HYPER_MOMENTUM)
    one_minus_dampening = tl.load(row + HYPER_ONE_MINUS_DAMPENING)
    grad_sign = tl.load(row + HYPER_GRAD_SIGN)
    grad_sign = divide(grad_sign, tl.load(grad_scale).to(grad_sign.dtype))
    weight_decay, nesterov = tl.load(row + HYPER_WEIGHT_DECAY), tl.load(row + HYPER_NESTEROV)
    return lr, momentum, one_minus_dampening, weight_decay, grad_sign, nesterov


@triton.jit
def sgd_update(w, grad, buf, phase, sgd):
    """(z, new momentum buffer) of torch.optim.SGD."""
    lr, momentum, one_minus_dampening, weight_decay, grad_sign, nesterov = sgd
    g = grad_sign * grad
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)
    new = tl.where(phase == RUNNING, momentum * buf + one_minus_dampening * g, g)
    step = tl.where(phase >= FIRST, tl.where(nesterov != 0, g + momentum * new, new), g)
    return tl.where(phase == PROX_ALONE, w, w - lr * step), new


# The prox.


@triton.jit
def form_thresholds(lr, group_lasso, exclusive_lasso, l1):
    """(a, b, c)"""
    return lr * group_lasso, lr * exclusive_lasso, lr * l1


@triton.jit
def load_thresholds(row):
    """(a, b, c, whether exact). Where the host has formed them they are multiplied by 1."""
    group_lasso = load_number(row, HYPER_A, ADDRESS_GROUP_LASSO)
    exclusive_lasso = load_number(row, HYPER_B, ADDRESS_EXCLUSIVE_LASSO)
    l1 = load_number(row, HYPER_C, ADDRESS_L1)
    lr = tl.where(tl.load(row + HYPER_ON_DEVICE) != 0, load_number(row, HYPER_LR, ADDRESS_LR), 1.0)
    a, b, c = form_thresholds(lr, group_lasso, exclusive_lasso, l1)
    return a, b, c, tl.load(row + HYPER_EXACT)


@triton.jit
def load_freeze(row):
    return tl.load(row + HYPER_FREEZE).to(tl.int32)


@triton.jit
def soft_magnitude(z, t):
    """|soft(z, t)| = max(|z| - t, 0), letting NaN through."""
    u = tl.abs(z) - t
    return tl.where(u <= 0, 0.0, u)


@triton.jit
def group_stats(zs, t, PARTS: tl.constexpr):
    """Sums over a tile's parts and their axis 0 of u = soft(z, t): how many are left, l1, l2 norm squared.

    The parts are added up where they are, and only then across threads.
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

    ``search`` is (s, t, low, high, done). Groups that are done keep their numbers.
    """
    s, t, low, high, done = search
    count, l1, l2_squared = stats
    a, b, c, exact = thresholds
    l2 = square_root(l2_squared)
    scale = group_scale(l2, a)
    settled = tl.where(b == 0, c, c + b * l1)  # sequential mode's t
    finished = done == done
    if EXACT:  # Newton's and Halley's steps to the root of excess, in a shrinking bracket; see shrinkage.h
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
        moves = tl.abs(step - t) > 4 * EPS * tl.abs(step)  # false for NaN, which stays
        step = tl.where(moves & ((step <= low) | (step >= high)), low + (high - low) * 0.5, step)
        iterate = (exact != 0) & (b != 0)
        finished = tl.where(iterate, ~(tl.abs(step - t) > 4 * EPS * tl.abs(step)), True)
        settled = tl.where(iterate, step, settled)
    return tl.where(done, s, scale), tl.where(done, t, settled), low, high, done | finished


@triton.jit
def apply_shrinkage(z, s, t, STORED: tl.constexpr):
    """s * soft(z, t) rounded to the stored dtype, every zero +0.0."""
    m = soft_magnitude(z, t[None, :])
    w = (s[None, :] * tl.where(z < 0, -m, m)).to(STORED).to(z.dtype)
    return tl.where(w == 0, 0.0, w)


@triton.jit
def frozen(w, alive, freeze):
    """Where what is zero must stay so: single elements, or groups none of whose entries is alive."""
    dead = tl.where(freeze == FREEZE_GROUP, alive[None, :] == 0, False)
    return tl.where(freeze == FREEZE_ELEMENT, w == 0, dead)


# Tiles.


@triton.jit
def update_tile(
    tensor, base, offsets, mask, sgd, STORED: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr
):
    """(w, z, new buffer) of a tile; what is masked out is 0."""
    phase = tl.load(tensor + TENSOR_PHASE)
    w = tl.load(pointer(tensor, TENSOR_W, base, STORED, VEC) + offsets, mask, other=0.0).to(COMPUTE)
    at = pointer(tensor, TENSOR_GRAD, base, STORED, VEC) + offsets
    grad = tl.load(at, tl.where(phase > PROX_ALONE, mask, False), other=0.0)
    at = pointer(tensor, TENSOR_BUF, base, STORED, VEC) + offsets
    buf = tl.load(at, tl.where(phase == RUNNING, mask, False), other=0.0)
    z, buf = sgd_update(w, grad.to(COMPUTE), buf.to(COMPUTE), phase, sgd)
    return w, z, buf


@triton.jit
def store_buffer(tensor, base, offsets, mask, buf, STORED: tl.constexpr, VEC: tl.constexpr):
    has_buf = tl.load(tensor + TENSOR_PHASE) >= FIRST
    at = pointer(tensor, TENSOR_BUF, base, STORED, VEC) + offsets
    tl.store(at, buf.to(STORED), tl.where(has_buf, mask, False))


@triton.jit
def store_weights(tensor, base, offsets, mask, z, s, t, shrinks, STORED: tl.constexpr, VEC: tl.constexpr):
    """w = s * soft(z, t); z itself, bit for bit, where nothing shrinks."""
    w = tl.where(shrinks, apply_shrinkage(z, s, t, STORED), z)
    tl.store(pointer(tensor, TENSOR_W, base, STORED, VEC) + offsets, w.to(STORED), mask)


INTERPRETED = not isinstance(sgd_update, triton.JITFunction)
