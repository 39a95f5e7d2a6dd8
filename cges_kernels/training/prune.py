"""Pruning by magnitude in rounds, with a sparse regulariser instead of weight decay between them.

Train, prune, retrain, prune further (Han et al., Learning both weights and connections for efficient neural
networks, 2015). With CGES in training and retraining it is the thesis's section 4.3.1. The pruned weights
stay zero by `freeze_zeros`, which the optimizer's own step obeys: there is no mask.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..core.hyperparameters import FREEZE_MODES
from ..core.tensors import check_whole
from .layers import Include, LayerWeight, regularised_weights, warn_of_computed_weights
from .schedules import check_density, check_steps, cubic

SCOPES = ("global", "layer")
CURVES = ("geometric", "cubic", "linear")


def density_schedule(density: float, rounds: int, curve: str = "geometric") -> list[float]:
    """The fractions of nonzero weights to prune to, round by round.

    Args:
        density: the last fraction, in (0, 1].
        rounds: the number of rounds, >= 1.
        curve: how the fraction falls. "geometric" (default): each round keeps the same share of what is left
            (Han et al. 2015). "cubic": `1 - (1 - density) * (1 - (1 - r / rounds)^3)` after round r (Zhu and
            Gupta, To prune, or not to prune, 2017, Eq. 1). "linear": equal steps.

    Returns:
        A list of `rounds` fractions, the last of which is `density`.

    Raises:
        ValueError: a density outside (0, 1], fewer than one round, or an unknown curve.

    Examples:
        >>> density_schedule(0.25, rounds=2)
        [0.5, 0.25]
    """
    check_density("density", density)
    density = float(density)
    check_steps("rounds", rounds, 1)
    if curve not in CURVES:
        raise ValueError(f"curve: expected one of {CURVES}, got {curve!r}")
    parts = [r / rounds for r in range(1, rounds + 1)]
    if curve == "geometric":
        return [*(density**t for t in parts[:-1]), density]
    share = [cubic(t) if curve == "cubic" else t for t in parts]
    return [1 - (1 - density) * x for x in share[:-1]] + [density]


@torch.no_grad()
def prune_to_density(
    model: nn.Module,
    density: float,
    *,
    optimizer: Optimizer | None = None,
    scope: str = "global",
    include: Include | None = None,
    freeze_zeros: str | None = "element",
) -> float:
    """Set the smallest layer weights to exactly 0, in place, so that at most `density` of them are nonzero.

    The weights are those of [`sparsity_param_groups`][cges_kernels.sparsity_param_groups]. Weights that are
    zero already count as pruned, so a model that is sparser than `density` stays as it is. Ties are decided
    by order, so exactly the same weights are pruned every time.

    Args:
        model: the model to prune.
        density: the fraction of the weights to be left nonzero, in (0, 1].
        optimizer: the one that trains on, such as [`ProxSGD`][cges_kernels.ProxSGD]. The state of the pruned
            weights (their momentum) becomes 0, and `freeze_zeros` is written into the param groups that hold
            the weights, so that they stay zero. None (default): only weights change.
        scope: "global" (default) compares the weights of all layers with each other; "layer" prunes each
            layer to `density`.
        include: chooses the weights, as for [`sparsity_param_groups`][cges_kernels.sparsity_param_groups].
        freeze_zeros: "element" (default), "group" or None, to be written into those param groups.

    Returns:
        The fraction of the weights that is nonzero now.

    Raises:
        ValueError: a density outside (0, 1] or one that leaves no weight; a weight that is not finite, is
            sharded, or is on the meta device; an optimizer that lacks a weight; or a param group that holds
            other parameters too, whose zeros (such as fresh biases) would be frozen as well.

    Warns:
        UserWarning: a layer without any nonzero weight; or weights that are left as they are because they are
            computed from other parameters (parametrizations, pruning masks).

    Examples:
        The thesis's Table 2, to 10% of the weights:

        >>> optimizer = ProxSGD(cges_param_groups(model, lam=1e-4), lr=0.05, momentum=0.9)
        >>> train(model, optimizer)
        >>> for density in density_schedule(0.1, rounds=5):
        ...     prune_to_density(model, density, optimizer=optimizer)
        ...     train(model, optimizer)  # retraining; what was pruned stays 0
    """
    check_density("density", density)
    if freeze_zeros not in FREEZE_MODES:
        raise ValueError(f"freeze_zeros: expected one of {FREEZE_MODES}, got {freeze_zeros!r}")
    if scope not in SCOPES:
        raise ValueError(f"scope: expected one of {SCOPES}, got {scope!r}")
    layers = regularised_weights(model, include)
    if include is None:
        warn_of_computed_weights(model, "nothing is pruned")
    for layer in layers:
        check_whole(layer.name, layer.param)
        if not layer.param.isfinite().all():
            raise ValueError(f"{layer.name}: expected finite weights, got NaN or Inf")
    groups = [] if optimizer is None else _param_groups(optimizer, layers, freeze_zeros)
    for together in [layers] if scope == "global" else [[layer] for layer in layers]:
        _prune([layer.param for layer in together], density, [layer.name for layer in together])
    for layer in layers:
        if not layer.param.any():
            warnings.warn(f"{layer.name}: no weight is left nonzero at density {density}", stacklevel=3)
        if optimizer is not None:
            for value in optimizer.state.get(layer.param, {}).values():
                if isinstance(value, Tensor) and value.shape == layer.param.shape:
                    value.masked_fill_(layer.param == 0, 0)
    for group in groups:
        group["freeze_zeros"] = freeze_zeros
    left = sum(int(torch.count_nonzero(layer.param)) for layer in layers)
    return left / sum(layer.param.numel() for layer in layers)


def _prune(params: list[nn.Parameter], density: float, names: list[str]) -> None:
    """Leave the `density` largest of the params' elements nonzero; of equal ones the first stay."""
    magnitudes = torch.cat([p.detach().abs().flatten().to(params[0].device) for p in params])
    keep = math.floor(density * len(magnitudes) + 0.5)
    if keep == 0:
        raise ValueError(
            f"density: expected to keep a weight of {', '.join(names)}, "
            f"got {density} of {len(magnitudes)} weights"
        )
    # The sort is stable, so that exactly `keep` are left, and the same ones every time.
    dropped = magnitudes.sort(descending=True, stable=True).indices[keep:]
    left = torch.ones_like(magnitudes, dtype=torch.bool)
    left[dropped] = False
    for p, mask in zip(params, left.split([p.numel() for p in params])):
        p.masked_fill_(~mask.view(p.shape).to(p.device), 0)


def _param_groups(
    optimizer: Optimizer, layers: list[LayerWeight], freeze_zeros: str | None
) -> list[dict[str, Any]]:
    """The param groups that hold the weights, after the checks that `prune_to_density` promises."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer: expected an Optimizer, got {type(optimizer).__name__}")
    names = {layer.param: layer.name for layer in layers}
    held = {p for group in optimizer.param_groups for p in group["params"]}
    if missing := [name for p, name in names.items() if p not in held]:
        raise ValueError(f"optimizer: expected one that holds the weights to prune, got none of {missing}")
    found = []
    for i, group in enumerate(optimizer.param_groups):
        others = [tuple(p.shape) for p in group["params"] if p not in names]
        if len(others) == len(group["params"]):
            continue
        found.append(group)
        if freeze_zeros is not None and "freeze_zeros" not in group:
            raise ValueError(
                f"freeze_zeros={freeze_zeros!r}: expected an optimizer with that key in its param groups, "
                f"got {type(optimizer).__name__}"
            )
        if freeze_zeros is not None and others:
            raise ValueError(
                f"freeze_zeros={freeze_zeros!r}: expected only weights to prune in param_groups[{i}], as "
                f"sparsity_param_groups makes them, got {len(others)} others of shapes {others[:3]}"
            )
    return found
