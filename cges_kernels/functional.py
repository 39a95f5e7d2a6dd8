"""Functions on tensors: the proximal map, in place over a list or of one tensor, and the penalty itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .backends import operators
from .backends.registry import choose_backend
from .backends.unplanned import prox_in_place
from .core import reference
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
    """Replace each tensor by its proximal map, all in one pass: for those who keep their own optimizer.

    The coefficients already contain the step size (pass lr*coefficient). Tensors may have any shapes,
    but must be dense and distinct; named specs apply group_lasso and exclusive_lasso to tensors of two
    or more dims only. See :func:`prox` for the formula.

    Raises:
        ValueError, TypeError: bad coefficients, spec, mode or tensors; nothing is written.
        RuntimeError: a backend that cannot serve.

    Example:
        >>> optimizer.step()
        >>> with torch.no_grad():
        ...     prox_([layer.weight for layer in layers], group_lasso=lr * 1e-3)
    """
    penalty_options: dict[str, Any] = dict(
        group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, group_by=group_by, view=view
    )
    check_penalty({**penalty_options, "prox_mode": prox_mode})
    tensors = [tensors] if isinstance(tensors, Tensor) else list(tensors)
    hyperparameters = Hyperparameters.of_prox(group_lasso, exclusive_lasso, l1, prox_mode)
    # the operator ends in prox_in_place as well, when it runs
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
    """The proximal map of the combined regulariser at ``w``, a new tensor of the same shape and dtype.

    ``prox_mode="exact"`` gives argmin_x ||x - w||^2 / 2 + Omega(x) with

        Omega(x) = sum_g  group_lasso*||x_g||_2 + (exclusive_lasso/2)*||x_g||_1^2 + l1*||x_g||_1

    and "sequential" applies the l1, the group and the exclusive thresholds one after another (Yoon and
    Hwang 2017, Eq. 7 then 8), which shrinks more. The coefficients already contain the step size. Where a
    derivative of ``w`` or a coefficient is asked for, or PyTorch traces, the reference serves, which is
    differentiable.

    Norms of float32 and 16-bit tensors are sums of float32 squares. These hold for entries from 1e-19 to
    1e18 (groups of n: to 1.8e19/sqrt(n)). Larger ones have an infinite norm, so group lasso leaves them as
    they are; a group of smaller ones loses digits, and below 3e-23 it has norm 0 and dies. Where even the sum
    of |w| overflows, exact mode gives NaN. float64 tensors hold from 1e-154 to 1e154.

    Raises: as :func:`prox_`.
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
        thresholds = reference.form_thresholds(1.0, group_lasso, exclusive_lasso, l1)
        return reference.shrink(w, thresholds, group_by, view, prox_mode)
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
    """Omega(w): a 0-d tensor, differentiable; the formula stands at :func:`prox`.

    Named specs apply the group terms to tensors of two or more dims only. Zero groups have gradient 0.

    Raises:
        ValueError, TypeError: bad coefficients, spec or tensor.
    """
    options: dict[str, Any] = dict(
        group_lasso=group_lasso, exclusive_lasso=exclusive_lasso, l1=l1, group_by=group_by, view=view
    )
    check_penalty(options)
    check_tensor("w", w)
    return reference.omega(w, **options)


__all__ = ["penalty", "prox", "prox_"]
