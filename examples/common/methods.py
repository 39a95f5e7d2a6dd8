"""The six methods of the thesis, each with the range of its lambda."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from cges_kernels import cges_param_groups, sparsity_param_groups

ParamGroups = Callable[[nn.Module, float], list[dict[str, Any]]]  # called with a network and a lambda


@dataclass(frozen=True)
class Arm:
    """One of the methods that an experiment compares: a penalty, and its weakest and strongest lambda."""

    label: str
    weakest: float
    strongest: float
    param_groups: ParamGroups
    in_gradient: bool = False  # weight decay: momentum scales it as it does the loss, unlike a threshold
    nets: tuple[str, ...] = ()  # the only networks that it is for; none: it is for all
    norm: bool = False  # on the network with batch norm
    slimming: bool = False  # channels are counted as removed where their batch-norm scale is zero

    def lambdas(self, count: int) -> list[float]:
        """``count`` lambdas, each the same factor above the last; one alone is in the middle."""
        if count == 1 or self.weakest == self.strongest:
            return [float(f"{(self.weakest * self.strongest) ** 0.5:.3g}")]
        return [float(f"{lam:.3g}") for lam in np.geomspace(self.weakest, self.strongest, count)]


def _by_size(penalty: str, **options: Any) -> ParamGroups:
    """Param groups with lambda as the coefficient ``penalty``, scaled by group size."""
    return lambda model, lam: sparsity_param_groups(model, scale="size", **{**options, penalty: lam})


# The ranges go from nearly dense to where accuracy suffers, with ProxSGD at momentum 0.9, where the penalty
# in force is a tenth of lambda. Scaling by size divides the exclusive penalty by the group size, so ES alone
# needs a lambda some fifty times the others' to zero as much. CGES has one lambda for both parts, so its
# exclusive part is nearly inactive: docs/claims.md says how much. Its m = 0 lets mu rise from 0 in the first
# layer to 1 in the last.
METHODS = {
    "l2": Arm("l2 (dense)", 1e-4, 1e-2, _by_size("weight_decay"), in_gradient=True),
    "l1": Arm("l1", 0.003, 0.05, _by_size("l1")),
    "gs_filter": Arm("GS filter", 0.006, 0.045, _by_size("group_lasso", group_by="filter")),
    "gs_feature": Arm("GS feature", 0.006, 0.045, _by_size("group_lasso")),
    "es": Arm("ES", 0.05, 2.0, _by_size("exclusive_lasso")),
    "cges": Arm("CGES", 0.006, 0.045, lambda model, lam: cges_param_groups(model, lam, scale="size")),
}
LABELS = {key: method.label for key, method in METHODS.items()}
RIVALS = ("l1", "gs_filter", "gs_feature", "es")  # of CGES
