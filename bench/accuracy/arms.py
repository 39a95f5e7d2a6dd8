"""What is compared: the demo's six methods, and what the experiments add to them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import nn

from cges_kernels import cges_param_groups, exclusivity_schedule, sparsity_param_groups
from cges_kernels.demo.training import METHODS
from cges_kernels.training.recipes import regularised_weights

from .networks import scaled


@dataclass(frozen=True)
class Arm:
    """One of the things that an experiment compares, at lambdas from the weakest to the strongest."""

    label: str
    weakest: float
    strongest: float
    param_groups: Callable[[nn.Module, float], list[dict[str, Any]]]
    norm: bool = False  # on the network with batch norm
    slimming: bool = False  # channels are counted as removed where their batch-norm scale is zero

    def lambdas(self, count: int) -> list[float]:
        """Each the same factor above the last; one alone is in the middle."""
        if count == 1:
            return [float(f"{(self.weakest * self.strongest) ** 0.5:.3g}")]
        return [float(f"{lam:.3g}") for lam in np.geomspace(self.weakest, self.strongest, count)]

    def at(self, weakest: float, strongest: float | None = None) -> Arm:
        """The same with other lambdas."""
        return replace(self, weakest=weakest, strongest=strongest or weakest)


SIX = {name: Arm(method.label, *method[1:]) for name, method in METHODS.items()}


def on_layers(chosen: Callable[[nn.Parameter], bool]) -> Callable[[nn.Module, float], list[dict[str, Any]]]:
    """CGES on some layers only, each with the mu that it has when all are regularised."""

    def param_groups(model: nn.Module, lam: float) -> list[dict[str, Any]]:
        weights = [layer.param for layer in regularised_weights(model)]
        mu = exclusivity_schedule(len(weights), 0.0)
        on = [lam * chosen(weight) for weight in weights]
        alpha, beta = [a * (1 - x) for a, x in zip(on, mu)], [a * x for a, x in zip(on, mu)]
        return sparsity_param_groups(model, group_lasso=alpha, exclusive_lasso=beta, scale="size")

    return param_groups


def slimming(model: nn.Module, lam: float) -> list[dict[str, Any]]:
    """Network slimming (Liu et al. 2017): l1 on the batch-norm scales of convolutions, nothing on weights."""
    scales = {norm.weight for _, norm in scaled(model)}
    return sparsity_param_groups(model, l1=lam, include=lambda name, param: param in scales)


CGES = SIX["cges"]
FIG3 = SIX | {
    # Batch norm undoes what shrinks the weights before it, so a filter is harder to bring to zero.
    "cges_norm": replace(CGES.at(0.012, 0.12), label="CGES, net with batch norm", norm=True),
    "slimming": Arm("slimming, net with batch norm", 0.06, 0.6, slimming, norm=True, slimming=True),
}
# At these lambdas Figure 3's runs leave about 45% of the weights, so that methods differ in little else.
FIG4A = {
    name: SIX[name].at(lam)
    for name, lam in dict(
        l2=1e-3, l1=0.0095, gs_filter=0.027, gs_feature=0.0126, es=0.77, cges=0.0255
    ).items()
}
FIG4B = {
    "conv": replace(CGES, label="convolutions only", param_groups=on_layers(lambda w: w.dim() > 2)),
    "fc": replace(CGES, label="fully connected only", param_groups=on_layers(lambda w: w.dim() == 2)),
    "both": replace(CGES, label="both"),
}
FIG4C = {
    "increasing": replace(CGES, label="mu from 0 to 1"),
    "constant": replace(
        CGES,
        label="mu = 0.5",
        param_groups=lambda model, lam: cges_param_groups(model, lam, m=0.5, scale="size"),
    ),
}
# Retraining wants a mild penalty: the pruning is what makes the weights few.
TABLE2 = {
    "l2": replace(SIX["l2"].at(1e-4, 1e-2), label="l2 (Han et al.)"),
    "cges": CGES.at(6e-4, 6e-3),
}
