"""For tests of the coefficients' schedules: a model and an optimizer in the middle of a warm-up."""

from helpers.recipes import mlp

from cges_kernels import ProxSGD
from cges_kernels.training.recipes import sparsity_param_groups
from cges_kernels.training.schedules import CoefficientWarmup


def warmed(steps=4):
    """A model, its optimizer under a penalty, and a warm-up of its coefficients over ``steps`` steps."""
    model = mlp(3, 4, 2)
    groups = sparsity_param_groups(model, group_lasso=[0.4, 0.8], exclusive_lasso=0.2)
    optimizer = ProxSGD(groups, lr=0.1, l1=0.1)
    return model, optimizer, CoefficientWarmup(optimizer, steps)
