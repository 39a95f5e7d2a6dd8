"""Lion (Chen et al. 2023) on the reference: an update, a Rule and an optimizer; see docs/design/a-step.md."""

import torch

from cges_kernels.core.numbers import check_not_negative
from cges_kernels.core.rules import Rule
from cges_kernels.proximal import ProximalOptimizer


def lion_update(w, grad, exp_avg=None, *, lr, betas=(0.9, 0.99), weight_decay=0.0, maximize=False):
    """Lion's update: the sign of an interpolated momentum."""
    exp_avg = torch.zeros_like(w) if exp_avg is None else exp_avg
    grad = -grad if maximize else grad
    step = exp_avg.lerp(grad, 1 - betas[0]).sign()
    return w.mul(1 - lr * weight_decay).add(step, alpha=-lr), exp_avg.lerp(grad, 1 - betas[1])


LION = Rule(
    name="lion",
    options={"betas": (0.0, 0.0), "weight_decay": 0.0, "maximize": False},
    states=("exp_avg",),
    states_with=lambda options: ("exp_avg",),
    update=lion_update,
    check=lambda group: check_not_negative("weight_decay value", group["weight_decay"]),
)


class ProxLion(ProximalOptimizer):
    """A proximal optimizer with Lion's update."""

    rule = LION

    def __init__(
        self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, *, backend="reference", **options
    ):
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=False, foreach=None)
        defaults |= dict(group_lasso=0.0, exclusive_lasso=0.0, l1=0.0, group_by="feature", view=None)
        defaults |= dict(prox_mode="sequential", freeze_zeros=None, skip_dead=False)
        defaults |= dict(differentiable=False, fused=None)
        super().__init__(params, {**defaults, "capturable": False, **options}, backend=backend)
