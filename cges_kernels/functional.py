"""Functions on tensors: `prox`, `prox_` and `penalty`, for those who keep their own optimizer or loss.

This file checks arguments and chooses an executor. The mathematics is in core/reference.py and in the
executors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import operators
from .backends.registry import choose_backend
from .backends.unplanned import prox_in_place
from .core import reference, shrinkage
from .core.checks import check_penalty, check_tensor, named_layouts
from .core.groups import GroupSpec
from .core.hyperparameters import Hyperparameters
from .core.tensors import is_followed


def prox_(
    tensors: Sequence[Tensor],
    *,
    group_lasso: float = 0.0,
    exclusive_lasso: float = 0.0,
    l1: float = 0.0,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
    prox_mode: str = "sequential",
    backend: str = "auto",
) -> None:
    """Replace each tensor by its proximal map, in place and all in one pass.

    This is for those who keep their own optimizer: call it after `optimizer.step()`. The formula is that of
    [`prox`][cges_kernels.prox].

    Args:
        tensors: the tensors to change, of any shapes; or one tensor. They must be dense (without gaps or
            overlaps in memory) and share no memory with each other.
        group_lasso: the coefficient of each group's l2 norm. Like the other two it already contains the step
            size, so pass `lr * coefficient`.
        exclusive_lasso: the coefficient of half of each group's squared l1 norm, step size included.
        l1: the coefficient of the l1 norm, step size included.
        group_by: "feature" (default), "filter", "channel", "tensor" or a tuple of the reduced dims; see
            [`ProxSGD`][cges_kernels.ProxSGD]. Named specs apply `group_lasso` and `exclusive_lasso` to
            tensors of two or more dims only; `l1` applies to all.
        view: a shape. Where given, `group_by` refers to `w.view(view)` of each tensor.
        prox_mode: "sequential" (default) or "exact"; see [`prox`][cges_kernels.prox].
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: a bad coefficient, spec or mode, or tensors that cannot be served. Nothing is written.
        TypeError: an argument of the wrong type. Nothing is written.
        RuntimeError: a backend that cannot serve these tensors, or a tensor or coefficient that requires
            grad while gradients are enabled. Nothing is written.

    Examples:
        >>> optimizer.step()
        >>> with torch.no_grad():
        ...     prox_([layer.weight for layer in layers], group_lasso=lr * 1e-3)
    """
    penalty_options: dict[str, Any] = dict(
        group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, group_by=group_by, view=view
    )
    check_penalty({**penalty_options, "prox_mode": prox_mode})
    if any(map(is_followed, (group_lasso, exclusive_lasso, l1))):
        raise RuntimeError(
            "prox_: expected coefficients without a gradient, because a change in place has none; use prox"
        )
    if not isinstance(tensors, (Tensor, Iterable)):
        raise TypeError(f"tensors: expected tensors, got {tensors!r}")
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    hyperparameters = Hyperparameters.of_prox(group_lasso, exclusive_lasso, l1, prox_mode)
    # When the operator runs, it calls prox_in_place as well.
    in_place = operators.prox_ if torch.compiler.is_compiling() else prox_in_place
    in_place(tensors, hyperparameters, group_by, view, backend)


def prox(
    w: Tensor,
    *,
    group_lasso: float = 0.0,
    exclusive_lasso: float = 0.0,
    l1: float = 0.0,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
    prox_mode: str = "sequential",
    backend: str = "auto",
) -> Tensor:
    """The proximal map of the combined regulariser at `w`.

    With `prox_mode="exact"` it is `argmin_x ||x - w||^2 / 2 + Omega(x)`, with

        Omega(x) = sum_g  group_lasso*||x_g||_2 + (exclusive_lasso/2)*||x_g||_1^2 + l1*||x_g||_1

    over the groups g that `group_by` makes. These three terms are group lasso, exclusive lasso and l1 (Eq. 3,
    4 and 2 of Yoon's UNIST thesis). With "sequential" the l1, the group and the exclusive thresholds are
    applied one after another (Eq. 7, then Eq. 8; Yoon and Hwang 2017), which shrinks more.

    Where a derivative of `w` or of a coefficient is asked for, or PyTorch traces, the reference executor
    serves; it is differentiable.

    Norms of float32 and 16-bit tensors are sums of squares in float32. They hold for entries from 1e-19 to
    1e18 in magnitude (in a group of n entries, up to 1.8e19/sqrt(n)). Larger entries have an infinite norm,
    so group lasso leaves their group as it is. A group of smaller entries loses digits, and below 3e-23 its
    norm is 0 and it dies. Where even the sum of magnitudes overflows, exact mode gives NaN. float64 tensors
    hold from 1e-154 to 1e154.

    Args:
        w: a dense floating-point tensor of any shape. It is not changed.
        group_lasso: the coefficient of each group's l2 norm. Like the other two it already contains the step
            size, so pass `lr * coefficient`. It may be a tensor of one element.
        exclusive_lasso: the coefficient of half of each group's squared l1 norm, step size included.
        l1: the coefficient of the l1 norm, step size included.
        group_by: "feature" (default), "filter", "channel", "tensor" or a tuple of the reduced dims; see
            [`ProxSGD`][cges_kernels.ProxSGD]. Named specs apply `group_lasso` and `exclusive_lasso` to
            tensors of two or more dims only; `l1` applies to all.
        view: a shape. Where given, `group_by` refers to `w.view(view)`.
        prox_mode: "sequential" (default) or "exact".
        backend: "auto" (default), "reference", "cpu", "triton" or "cuda".

    Returns:
        A new tensor of the shape and dtype of `w`.

    Raises:
        ValueError: a bad coefficient, spec or mode, or a tensor that cannot be served.
        TypeError: an argument of the wrong type.
        RuntimeError: a backend that cannot serve the tensor.

    Examples:
        >>> prox(torch.tensor([3.0, -1.0, 0.5]), l1=1.0)
        tensor([2., 0., 0.])
    """
    check_tensor("w", w)
    options: dict[str, Any] = dict(
        group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, group_by=group_by, view=view
    )
    if any(map(is_followed, (w, group_lasso, exclusive_lasso, l1))):
        check_penalty({**options, "prox_mode": prox_mode})
        choose_backend(backend, [w])
        w = w.clone()
        named_layouts(["w"], [w], group_by, view)
        thresholds = shrinkage.form_thresholds(1.0, group_lasso, exclusive_lasso, l1)
        return shrinkage.shrink(w, thresholds, group_by, view, prox_mode)
    result = w.detach().clone()
    prox_([result], **options, prox_mode=prox_mode, backend=backend)
    return result


def penalty(
    w: Tensor,
    *,
    group_lasso: float = 0.0,
    exclusive_lasso: float = 0.0,
    l1: float = 0.0,
    group_by: GroupSpec = "feature",
    view: Sequence[int] | None = None,
) -> Tensor:
    """The value of the combined regulariser at `w`, to be added to a loss or logged.

        Omega(w) = sum_g  group_lasso*||w_g||_2 + (exclusive_lasso/2)*||w_g||_1^2 + l1*||w_g||_1

    over the groups g that `group_by` makes (group lasso, exclusive lasso and l1: Eq. 3, 4 and 2 of Yoon's
    UNIST thesis). It is differentiable; a group that is zero has gradient 0.

    Args:
        w: a dense floating-point tensor of any shape.
        group_lasso: the coefficient of each group's l2 norm. Unlike those of [`prox`][cges_kernels.prox], the
            coefficients here are not multiplied by a step size. It may be a tensor of one element.
        exclusive_lasso: the coefficient of half of each group's squared l1 norm.
        l1: the coefficient of the l1 norm.
        group_by: "feature" (default), "filter", "channel", "tensor" or a tuple of the reduced dims; see
            [`ProxSGD`][cges_kernels.ProxSGD]. Named specs apply `group_lasso` and `exclusive_lasso` to
            tensors of two or more dims only; `l1` applies to all.
        view: a shape. Where given, `group_by` refers to `w.view(view)`.

    Returns:
        A tensor without dims, in float32 for 16-bit tensors and in the dtype of `w` otherwise.

    Raises:
        ValueError: a bad coefficient or spec, or a tensor that cannot be served.
        TypeError: an argument of the wrong type.

    Examples:
        >>> loss = loss_fn(model(x), y) + penalty(model.fc.weight, group_lasso=1e-3)
    """
    options: dict[str, Any] = dict(
        group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, group_by=group_by, view=view
    )
    check_penalty(options)
    check_tensor("w", w)
    return reference.omega(w, **options)


__all__ = ["penalty", "prox", "prox_"]
