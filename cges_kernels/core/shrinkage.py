"""The prox in plain PyTorch: two numbers (s, t) for each group, and w = s * soft(z, t).

The other executors (csrc/common/shrinkage.h, backends/triton/kernels.py) have the same functions under the
same names: form_thresholds, group_stats, solve_shrinkage, apply_shrinkage. They use the same formulas as
well, except for exact mode's t, where only the equation and its root are the same. From the left of the root
they take Halley's steps where this file takes Newton's, so the number of sweeps differs. Without group lasso
this file and the CPU executor sort small groups (shrink_sorted), where the others search.

Everything here is differentiable. Maximum and sign are written so that NaN survives and zeros are +0.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from .groups import GroupSpec, has_groups, reduced_dims, viewed
from .tensors import holds_values, is_followed
from .updates import Scalar

MAX_SWEEPS = 24  # the most sweeps of exact mode's search; 13 were enough for the hardest groups seen
SORTED = 16  # without group lasso, exact mode sorts groups of up to 16 elements instead of searching


class Thresholds(NamedTuple):
    """The step size times each coefficient, as `form_thresholds` computes them."""

    a: Scalar
    b: Scalar
    c: Scalar


def form_thresholds(lr: Scalar, group_lasso: Scalar, exclusive_lasso: Scalar, l1: Scalar) -> Thresholds:
    """a = lr*alpha (group lasso), b = lr*beta (exclusive lasso), c = lr*gamma (l1)."""
    return Thresholds(lr * group_lasso, lr * exclusive_lasso, lr * l1)


class GroupStats(NamedTuple):
    """Sums over one group of u = soft(z, t): the number of nonzeros (for exact mode), l1 and l2 norm."""

    alive: Tensor | None
    l1: Tensor
    l2: Tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for the 16-bit types, the type itself otherwise."""
    return torch.float32 if dtype in (torch.float16, torch.bfloat16) else dtype


def soft_magnitude(z: Tensor, t: Scalar) -> Tensor:
    """|soft(z, t)| = max(|z| - t, 0); relu lets NaN through."""
    return z.abs().sub_(t).relu_()


def group_stats(z: Tensor, t: Scalar, dims: tuple[int, ...], with_count: bool = False) -> GroupStats:
    """The l1 and l2 norm of soft(z, t) over `dims`, kept as dims of size 1, and with_count the nonzeros."""
    u = soft_magnitude(z, t)
    if not dims:
        return GroupStats(u.sign(), u, u)
    alive = u.sign().sum(dims, keepdim=True) if with_count else None
    l1 = u.sum(dims, keepdim=True)
    if u.requires_grad or not holds_values(u):
        l2 = torch.linalg.vector_norm(u, dim=dims, keepdim=True)  # its gradient at 0 is 0; sqrt's is not
    else:
        l2 = u.square_().sum(dims, keepdim=True).sqrt()  # ten times faster than vector_norm across rows
    return GroupStats(alive, l1, l2)


def group_scale(l2: Tensor, a: Scalar) -> Tensor:
    """s = max(1 - a/||u||_2, 0), the factor of group soft-thresholding; 1 where a = 0, whatever the norm."""
    if a == 0:
        return torch.ones_like(l2)
    dead = l2 <= a
    return torch.where(dead, 0.0, 1 - a / torch.where(dead, 1.0, l2))


def solve_shrinkage(
    z: Tensor, dims: tuple[int, ...], thresholds: Thresholds, prox_mode: str = "sequential"
) -> tuple[Tensor, Tensor]:
    """The two numbers `(s, t)` per group, shaped like `z` with `dims` of size 1.

    sequential (thesis, Eq. 7, then Eq. 8): s = max(1 - a/||u||_2, 0), t = c + b*||u||_1, u = soft(z, c).
    exact (the true proximal operator): t = c + b * s(t) * ||soft(z, t)||_1, solved for t.
    """
    if all(z.shape[d] == 1 for d in dims):
        return shrink_one(z, thresholds, prox_mode)
    if prox_mode == "exact" and thresholds.a == 0 and prod(z.shape[d] for d in dims) <= SORTED:
        return shrink_sorted(z, dims, thresholds)
    stats = group_stats(z, thresholds.c, dims, with_count=prox_mode == "exact")
    if prox_mode == "sequential" or thresholds.b == 0:
        return sequential_shrinkage(stats, thresholds)
    return _solve_exact(z, dims, thresholds, stats)


def shrink_one(z: Tensor, thresholds: Thresholds, prox_mode: str) -> tuple[Tensor, Tensor]:
    """`(s, t)` of groups of one entry each, in closed form, since both norms are |u|.

    With s > 0 exact mode's equation is t = c + b*(|z| - t - a), so t = c + b/(1 + b) * (|u| - a).
    """
    a, b, c = thresholds
    u = soft_magnitude(z, c)
    s = group_scale(u, a)
    if b == 0:
        return s, torch.zeros_like(u) + c
    if prox_mode == "sequential":
        return s, c + b * u
    dead = s == 0
    rise = torch.where(dead, b * u, b / (1 + b) * (u - a))
    return torch.where(dead, s, group_scale(u - rise, a)), c + rise


def shrink_sorted(z: Tensor, dims: tuple[int, ...], thresholds: Thresholds) -> tuple[Tensor, Tensor]:
    """`(s, t)` of exact mode without group lasso, by sorting each group.

    There t = c + b*sum(max(|z| - t, 0)) is linear in t between neighbouring |z|. If only the k largest
    entries counted, whose |z| - c sum to h_k, the root would be c + b*h_k/(1 + b*k). The largest of these and
    c is t.
    """
    _, b, c = thresholds
    kept = [d for d in range(z.dim()) if d not in dims]
    above = (z.abs() - c).permute(*kept, *dims).flatten(len(kept))
    h, rises = torch.zeros_like(above[..., 0]), []
    for k, largest in enumerate(above.sort(dim=-1, descending=True).values.unbind(-1), start=1):
        h = h + largest
        rises.append(b * h / (1 + b * k))
    t = c + torch.stack(rises).amax(0).relu()
    t = t.reshape([1 if d in dims else n for d, n in enumerate(z.shape)])
    return torch.ones_like(t), t


def sequential_shrinkage(stats: GroupStats, thresholds: Thresholds) -> tuple[Tensor, Tensor]:
    """`(s, t)` of sequential mode from the sums of soft(z, c); of exact mode too where b = 0."""
    a, b, c = thresholds
    return group_scale(stats.l2, a), c + b * stats.l1 if b != 0 else torch.zeros_like(stats.l1) + c


def _newton(t: Tensor, stats: GroupStats, thresholds: Thresholds) -> tuple[Tensor, Tensor, Tensor]:
    """`(s, excess, next t)` at t, where excess = t - c - b*s*||u||_1 rises through the root.

    The slope of -b*s*||u||_1 is b*(k*s + a*l1^2/l2^3), where k is the count, and 0 where the group is dead
    (l2 <= a). `stats` must hold the count.
    """
    assert stats.alive is not None
    a, b, c = thresholds
    s = group_scale(stats.l2, a)
    excess = t - c - b * s * stats.l1
    l2 = torch.where(s == 0, 1.0, stats.l2)  # the derivative of the branch not taken is finite as well
    bend = a * (stats.l1 / l2) * (stats.l1 / l2) / l2 if a != 0 else 0.0
    slope = 1 + torch.where(s == 0, 0.0, b * (stats.alive * s + bend))
    return s, excess, t - excess / slope


class Search(NamedTuple):
    """Exact mode's search between two sweeps: (s, t) so far, the bracket of t, and which groups are done."""

    s: Tensor
    t: Tensor
    low: Tensor
    high: Tensor
    done: Tensor


def start_search(stats: GroupStats, thresholds: Thresholds) -> Search:
    """The search at its start, t = c, given the sums `stats` at that threshold.

    The root lies between c and the sequential t, or is that t to rounding, so the bracket ends just above it.
    """
    s, high = sequential_shrinkage(stats, thresholds)
    high = high * (1 + 4 * torch.finfo(high.dtype).eps)
    low = torch.zeros_like(high) + thresholds.c
    return Search(s, low, low, high, torch.zeros_like(low, dtype=torch.bool))


def sweep(search: Search, stats: GroupStats, thresholds: Thresholds) -> Search:
    """One Newton step from the sums at search.t, or a bisection where it would leave the bracket."""
    s, t, low, high, done = search
    tolerance = 4 * torch.finfo(t.dtype).eps
    s_here, excess, step = _newton(t, stats, thresholds)
    low, high = torch.where(excess < 0, t, low), torch.where(excess > 0, t, high)
    converged = ~((step - t).abs() > tolerance * step.abs())  # NaN counts as converged and stays NaN
    outside = ~converged & ((step <= low) | (step >= high))
    step = torch.where(outside, low + (high - low) / 2, step)
    converged = ~((step - t).abs() > tolerance * step.abs())
    return Search(torch.where(done, s, s_here), torch.where(done, t, step), low, high, done | converged)


def _solve_exact(
    z: Tensor, dims: tuple[int, ...], thresholds: Thresholds, stats: GroupStats
) -> tuple[Tensor, Tensor]:
    """`(s, t)` of exact mode: sweeps from t = c until all groups are done, MAX_SWEEPS at most."""
    can_ask = holds_values(z) and not torch.compiler.is_compiling()
    with torch.no_grad():
        search = start_search(stats, thresholds)
        for _ in range(MAX_SWEEPS):
            search = sweep(search, stats, thresholds)
            if can_ask and bool(search.done.all()):
                break
            stats = group_stats(z, search.t, dims, with_count=True)
    s, t = search.s, search.t
    followed = z.requires_grad or any(map(is_followed, (z, *thresholds)))
    # At the root two more Newton steps leave t as it is. They give autograd the derivatives of t as the
    # solution of its equation: the first step the first one, both together the second.
    if torch.is_grad_enabled() and followed:
        for _ in range(2):
            t = _newton(t, group_stats(z, t, dims, with_count=True), thresholds)[2]
        s = group_scale(group_stats(z, t, dims).l2, thresholds.a)
    return s, t


def apply_shrinkage(z: Tensor, s: Scalar, t: Scalar) -> Tensor:
    """s * soft(z, t)."""
    w = soft_magnitude(z, t) * s
    followed = w.requires_grad or not holds_values(w)
    return w * z.sign() if followed else w.copysign_(z)  # copysign's second derivative at 0 is NaN


def shrink(
    z: Tensor,
    thresholds: Thresholds,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
    prox_mode: str = "sequential",
) -> Tensor:
    """The proximal map of Omega at `z`, which may have any float dtype; the result has it too.

    It is computed in at least float32. Named specs apply a and b to tensors of two or more dims only; c
    applies to all. With all thresholds 0 the result is `z` itself, bit for bit.
    """
    v = viewed(z, view)
    grouped = has_groups(v.dim(), group_by)
    thresholds = thresholds if grouped else Thresholds(0.0, 0.0, thresholds.c)
    if not any(thresholds) or z.numel() == 0:
        return z
    x = v.to(compute_dtype(z.dtype))
    s: Scalar
    t: Scalar
    if thresholds.a == 0 and thresholds.b == 0:
        s, t = 1.0, thresholds.c
    else:
        s, t = solve_shrinkage(x, reduced_dims(v.dim(), group_by), thresholds, prox_mode)
    w = apply_shrinkage(x, s, t).to(z.dtype)
    w = w + 0.0 if w.requires_grad or not holds_values(w) else w.add_(0.0)  # every zero becomes +0.0
    return w.reshape(z.shape)
