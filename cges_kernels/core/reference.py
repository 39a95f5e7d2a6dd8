"""The proximal step in plain PyTorch: the definition of right for every executor.

The objective gains, per regularised tensor and over groups g of its entries,

    Omega(W) = sum_g  alpha*||w_g||_2 + (beta/2)*||w_g||_1^2 + gamma*||w_g||_1

(group lasso, exclusive lasso and l1: thesis Eq. 3, 4 and 2; CGES, Eq. 5, is alpha = lambda*(1-mu), beta =
lambda*mu). One step is z = update(w), SGD's or AdamW's (updates.py). Then, with a = lr*alpha, b = lr*beta, c
= lr*gamma, every variant ends in

    w = s_g * soft(z, t_g)        soft(z, t) = sign(z) * max(|z| - t, 0)

so a step is: per-group statistics -> two numbers (s, t) per group -> one elementwise apply (shrinkage.py).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .groups import GroupSpec, has_groups, reduced_dims, viewed
from .shrinkage import Thresholds, compute_dtype, form_thresholds, group_stats, shrink
from .updates import Scalar, sgd_update


def frozen_mask(
    w: Tensor, freeze_zeros: str | None, group_by: GroupSpec = "feature", view: Sequence[int] | None = None
) -> Tensor | None:
    """A mask of the elements that must stay zero: zeros ("element"), all-zero groups ("group"), or None."""
    if freeze_zeros == "element":
        return w == 0
    v = viewed(w, view)
    if freeze_zeros is None or not has_groups(v.dim(), group_by):
        return None
    dims = reduced_dims(v.dim(), group_by)
    dead = (v == 0).all(dim=dims, keepdim=True) if dims else v == 0
    return dead.expand(v.shape).reshape(w.shape)


def frozen_update(frozen: Tensor | None, *updated: Tensor | None) -> tuple[Any, ...]:
    """The results of an update, z and states, set to zero where the mask `frozen` (if any) is True."""
    if frozen is None:
        return updated
    return tuple(None if x is None else torch.where(frozen, 0.0, x) for x in updated)


def proximal_step(
    update: Callable[..., tuple[Any, ...]],
    w: Tensor,
    grad: Tensor,
    states: Sequence[Tensor | None],
    thresholds: Thresholds,
    *,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
    prox_mode: str = "sequential",
    freeze_zeros: str | None = None,
) -> tuple[Any, ...]:
    """One step of one tensor, given its thresholds: `(new w, new states ...)`. Nothing changes in place.

    `update` is a function of updates.py with its options already bound.
    """
    frozen = frozen_mask(w, freeze_zeros, group_by, view)
    z, *states = frozen_update(frozen, *update(w, grad, *states))
    return shrink(z, thresholds, group_by, view, prox_mode), *states


def step(
    w: Tensor,
    grad: Tensor,
    *states: Tensor | None,
    lr: Scalar,
    group_lasso: float = 0.0,
    exclusive_lasso: float = 0.0,
    l1: float = 0.0,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
    prox_mode: str = "sequential",
    freeze_zeros: str | None = None,
    accumulate: torch.dtype | None = None,
    update: Callable[..., tuple[Any, ...]] = sgd_update,
    **options: Any,
) -> tuple[Any, ...]:
    """`(new w, new states ...)` of one step with thresholds lr * coefficient; `options` are the update's.

    With `accumulate` everything is computed and returned in that dtype; in float64 it is the truth that
    executors are tested against. None runs the update in w's own dtype, exactly as torch.optim does.
    """
    if accumulate is not None:
        w, grad = w.to(accumulate), grad.to(accumulate)
        states = tuple(None if x is None else x.to(accumulate) for x in states)
    step_size = lr if isinstance(lr, Tensor) and lr.requires_grad else float(lr)
    thresholds = form_thresholds(step_size, group_lasso, exclusive_lasso, l1)
    return proximal_step(
        partial(update, lr=lr, **options),
        w,
        grad,
        states,
        thresholds,
        group_by=group_by,
        view=view,
        prox_mode=prox_mode,
        freeze_zeros=freeze_zeros,
    )


def omega(
    w: Tensor,
    *,
    group_lasso: float = 0.0,
    exclusive_lasso: float = 0.0,
    l1: float = 0.0,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
) -> Tensor:
    """Omega(w), a differentiable tensor without dims; group terms count where the spec makes groups."""
    x = viewed(w, view).to(compute_dtype(w.dtype))
    total = l1 * x.abs().sum() if l1 != 0 else x.new_zeros(())
    dims = reduced_dims(x.dim(), group_by)
    if has_groups(x.dim(), group_by) and (group_lasso != 0 or exclusive_lasso != 0):
        _, norm1, norm2 = group_stats(x, 0.0, dims)
        if group_lasso != 0:
            total = total + group_lasso * norm2.sum()
        if exclusive_lasso != 0:
            total = total + exclusive_lasso / 2 * norm1.square().sum()
    return total
