"""The proximal SGD step as Triton kernels: every tensor of one dtype and device in one launch.

A step has at most two launches. `whole_groups` serves groups that fit a register tile: a program loads parts
of RED x KEEP elements (PARTS*RED >= group size), and z never leaves its registers between the reduction and
the apply. `split_groups` (triton_split.py) serves longer groups in chunks, ordered by tickets: sweeps that
only read leave partial sums, the last chunk of a panel to arrive adds them in index order and moves the
panel's search for (s, t) on, and the apply pass reads everything again. A ticket waits only for tickets
already taken, so nothing depends on how many programs are resident, and exact mode's further sweeps cost no
further launch.

Numbers come from tables in device memory, so that a new learning rate or pointer compiles nothing:
`tensors` int64 [n, 4]: addresses of w, gradient and momentum buffer, and the phase (shrinkage.h's Momentum);
`shapes` int64 [n, 5]: R1, K2, R2, number of groups, row of `hyper`;
`hyper` [param groups, HYPER] of the compute dtype, in the order in which load_sgd and its neighbours read
them, then four int64 addresses of floats that take the place of lr, a, b and c (0: none), see load_number;
`grad_scale` divides gradients; where `found_inf` is not 0 nothing changes;
`items` int64 [programs, 4]: variant (an index into VARIANTS, or -1), tensor, first group, first entry of it;
those of split_groups go on with [4]: panel, chunk, chunks of the panel, first slot of the panel's scratch.

The formulas carry the names of reference.py and shrinkage.h. triton_step.py cuts the work and launches.
"""

from __future__ import annotations

import triton
import triton.language as tl

# What a variant of a tile can be; the canonical layout is groups.py's (K1, R1, K2, R2).
ROWS = tl.constexpr(0)  # K1 = R1 = 1: a group is a contiguous run
COLUMNS = tl.constexpr(1)  # R2 = 1: neighbours along a row are of different groups
GENERAL = tl.constexpr(2)  # any layout, by division
ELEMENTWISE = tl.constexpr(3)  # no groups

NO_GRAD = tl.constexpr(0)
FIRST = tl.constexpr(2)
RUNNING = tl.constexpr(3)

FREEZE_GROUP = tl.constexpr(1)
FREEZE_ELEMENT = tl.constexpr(2)

HYPER = tl.constexpr(20)  # entries of a row of `hyper`, room for four addresses among them
NUMBERS = tl.constexpr(12)  # of them before the addresses
MAX_SWEEPS = tl.constexpr(24)
SLOT_BLOCK = tl.constexpr(2048)  # partial sums added at once


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
def sgd_update(w, grad, buf, phase, sgd):
    """(z, new momentum buffer) of torch.optim.SGD."""
    lr, momentum, one_minus_dampening, weight_decay, grad_sign, nesterov = sgd
    g = grad_sign * grad
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)
    new = tl.where(phase == RUNNING, momentum * buf + one_minus_dampening * g, g)
    step = tl.where(phase >= FIRST, tl.where(nesterov != 0, g + momentum * new, new), g)
    return tl.where(phase == NO_GRAD, w, w - lr * step), new


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
        high = tl.where(sweep == 0, settled, high)
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
def hyper_row(hyper, shape):
    return hyper + tl.load(shape + 4) * HYPER


@triton.jit
def load_number(row, column: tl.constexpr, source: tl.constexpr):
    """A number of the row, or the float at the row's address ``source``, if there is one."""
    value = tl.load(row + column)
    address = tl.load((row + NUMBERS).to(tl.pointer_type(tl.int64)) + source)
    there = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return tl.where(address != 0, there.to(value.dtype), value)


@triton.jit
def load_sgd(row, grad_scale):
    """The scalars of sgd_update."""
    lr, momentum, one_minus_dampening = load_number(row, 0, 0), tl.load(row + 1), tl.load(row + 2)
    grad_sign = tl.load(row + 4)
    grad_sign = divide(grad_sign, tl.load(grad_scale).to(grad_sign.dtype))
    return lr, momentum, one_minus_dampening, tl.load(row + 3), grad_sign, tl.load(row + 5)


@triton.jit
def load_thresholds(row):
    """(a, b, c, whether exact); where an address is among them they are to be multiplied by lr."""
    a, b, c = load_number(row, 6, 1), load_number(row, 7, 2), load_number(row, 8, 3)
    lr = tl.where(tl.load(row + 11) != 0, load_number(row, 0, 0), 1.0)
    return lr * a, lr * b, lr * c, tl.load(row + 9)


@triton.jit
def load_freeze(row):
    return tl.load(row + 10).to(tl.int32)


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
    """(base, offsets [RED, KEEP] from it, mask) of entries r0.. of groups g0..; see groups.Layout.

    VEC elements are 16 bytes where every row begins on a multiple of them, else 1: a promise to the
    compiler, which then loads 16 bytes at once. WIDE: 32-bit offsets from the base would overflow.
    """
    R1, K2, R2, groups = tl.load(shape), tl.load(shape + 1), tl.load(shape + 2), tl.load(shape + 3)
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
        k1 = g0 // K2  # a panel of columns lies within one k1; rows have but one
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
    p = tl.load(tensor + column).to(tl.pointer_type(STORED)) + base
    return tl.multiple_of(p, 16 if VEC > 1 else 1)


@triton.jit
def update_tile(
    tensor, base, offsets, mask, sgd, STORED: tl.constexpr, COMPUTE: tl.constexpr, VEC: tl.constexpr
):
    """(w, z, new buffer) of a tile; what is masked out is 0."""
    phase = tl.load(tensor + 3)
    w = tl.load(pointer(tensor, 0, base, STORED, VEC) + offsets, mask, other=0.0).to(COMPUTE)
    grad = tl.load(
        pointer(tensor, 1, base, STORED, VEC) + offsets, tl.where(phase > NO_GRAD, mask, False), other=0.0
    )
    buf = tl.load(
        pointer(tensor, 2, base, STORED, VEC) + offsets, tl.where(phase == RUNNING, mask, False), other=0.0
    )
    z, buf = sgd_update(w, grad.to(COMPUTE), buf.to(COMPUTE), phase, sgd)
    return w, z, buf


@triton.jit
def frozen(w, alive, freeze):
    """Where what is zero must stay so: single elements, or groups none of whose entries is alive."""
    dead = tl.where(freeze == FREEZE_GROUP, alive[None, :] == 0, False)
    return tl.where(freeze == FREEZE_ELEMENT, w == 0, dead)


@triton.jit
def store_buffer(tensor, base, offsets, mask, buf, STORED: tl.constexpr, VEC: tl.constexpr):
    has_buf = tl.load(tensor + 3) >= FIRST
    tl.store(pointer(tensor, 2, base, STORED, VEC) + offsets, buf.to(STORED), tl.where(has_buf, mask, False))


@triton.jit
def store_weights(tensor, base, offsets, mask, z, s, t, shrinks, STORED: tl.constexpr, VEC: tl.constexpr):
    """w = s * soft(z, t); z itself, bit for bit, where nothing shrinks."""
    w = tl.where(shrinks, apply_shrinkage(z, s, t, STORED), z)
    tl.store(pointer(tensor, 0, base, STORED, VEC) + offsets, w.to(STORED), mask)


@triton.jit
def whole_tile(
    item, tensor, shape, hyper, grad_scale,
    KIND: tl.constexpr, PARTS: tl.constexpr, RED: tl.constexpr, KEEP: tl.constexpr, VEC: tl.constexpr,
    WIDE: tl.constexpr, STORED: tl.constexpr, COMPUTE: tl.constexpr, EPS: tl.constexpr, EXACT: tl.constexpr,
    FREEZE: tl.constexpr,
):  # fmt: skip
    """KEEP whole groups: load, reduce, solve and apply without z leaving the registers.

    The parts are loaded one after another, so that only z is held of all of them.
    """
    row, g0 = hyper_row(hyper, shape), tl.load(item + 2)
    alive = tl.zeros([KEEP], tl.int32) + (KIND == ELEMENTWISE)
    if FREEZE and KIND != ELEMENTWISE:
        for p in tl.static_range(PARTS):
            base, offsets, mask = tile_offsets(shape, g0, p * RED, KIND, RED, KEEP, VEC, WIDE)
            w = tl.load(pointer(tensor, 0, base, STORED, VEC) + offsets, mask, other=0.0).to(COMPUTE)
            alive |= tl.max((w != 0).to(tl.int32), axis=0)
    zs = ()
    for p in tl.static_range(PARTS):
        base, offsets, mask = tile_offsets(shape, g0, p * RED, KIND, RED, KEEP, VEC, WIDE)
        w, z, buf = update_tile(tensor, base, offsets, mask, load_sgd(row, grad_scale), STORED, COMPUTE, VEC)
        if FREEZE:
            dead = frozen(w, alive, load_freeze(row))
            z, buf = tl.where(dead, 0.0, z), tl.where(dead, 0.0, buf)
        store_buffer(tensor, base, offsets, mask, buf, STORED, VEC)
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
):  # fmt: skip
    """One program per item: a tile of whole groups of one tensor."""
    if tl.load(found_inf) != 0:
        return
    item = items + tl.program_id(0).to(tl.int64) * 4
    variant, index = tl.load(item), tl.load(item + 1)
    tensor, shape = tensors + index * 4, shapes + index * 5
    if tl.load(tensor + 3) >= NO_GRAD:  # else the parameter has no gradient
        for i in tl.static_range(len(VARIANTS)):
            if variant == i:
                whole_tile(
                    item, tensor, shape, hyper, grad_scale,
                    VARIANTS[i][0], VARIANTS[i][1], VARIANTS[i][2], VARIANTS[i][3], VARIANTS[i][4],
                    VARIANTS[i][5], STORED, COMPUTE, EPS, EXACT, FREEZE,
                )  # fmt: skip


INTERPRETED = not isinstance(whole_groups, triton.JITFunction)
