"""Gradients through the reference: of the shrinkage, of the penalty, and of a step by its learning rate."""

from functools import partial

import pytest
import torch
from helpers.right import SPECS
from helpers.shrinkage import normal

from cges_kernels.core import reference
from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.core.shrinkage import Thresholds, shrink

# Thresholds (a, b, c): all three, each pair, and each of a and b alone.
COMBINATIONS = [(0.5, 0.1, 0.05), (0.5, 0.3, 0), (0.5, 0, 0.05), (0, 0.3, 0.05), (0, 0.1, 0), (0.5, 0, 0)]


@pytest.mark.parametrize("thresholds", COMBINATIONS, ids=str)
@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_shrink_has_the_right_gradient(prox_mode, thresholds):
    """First and second derivatives are right under each combination, with a dead group among the others."""
    for group_by in (*SPECS, ()):
        z = normal(4, 3, 2)
        z[:, 0, 0] /= 50  # a dead feature group
        of = partial(shrink, thresholds=Thresholds(*thresholds), group_by=group_by, prox_mode=prox_mode)
        assert torch.autograd.gradcheck(of, (z.requires_grad_(),))
        assert torch.autograd.gradgradcheck(of, (z,), fast_mode=True)


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_gradients_are_zero_at_dead_and_zero_groups(prox_mode):
    """A zero group and a group that dies pass no gradient on, and no NaN, also not to second derivatives."""
    for thresholds in COMBINATIONS:
        z = normal(5, 4)
        z[:, 1] = 0.0
        z[:, 2] *= 1e-3
        z.requires_grad_()
        w = shrink(z, Thresholds(*thresholds), "feature", None, prox_mode)
        (grad,) = torch.autograd.grad(w.square().sum(), z, create_graph=True)
        (second,) = torch.autograd.grad(grad.square().sum(), z)
        assert grad.isfinite().all() and second.isfinite().all() and grad[:, 3].any()
        assert not grad[:, 1].any()
        assert thresholds[0] == 0 or not grad[:, 2].any()


@pytest.mark.parametrize("group_by", [*SPECS, ()])
def test_omega_has_the_right_gradient_and_zero_at_zero_groups(group_by):
    """gradcheck passes, and where the norm has no derivative the gradient is 0."""

    def omega(w):
        return reference.omega(w, group_lasso=0.7, exclusive_lasso=0.3, l1=0.2, group_by=group_by)

    w = normal(4, 3, 2).requires_grad_()
    assert torch.autograd.gradcheck(omega, (w,))
    zero = torch.zeros(4, 3, 2, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(omega(zero), zero)
    assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("prox_mode", PROX_MODES)
@pytest.mark.parametrize(
    "coefficients", [{}, {"l1": 0.2}, {"group_lasso": 0.9, "exclusive_lasso": 0.4, "l1": 0.1}]
)
def test_step_has_the_right_gradient_with_respect_to_a_tensor_lr(coefficients, prox_mode):
    """lr scales both the update and the thresholds, and its gradient has both parts."""
    w, grad = normal(5, 4), normal(5, 4)
    lr = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    options = {"momentum": 0.9, "weight_decay": 0.1, "prox_mode": prox_mode, **coefficients}
    assert torch.autograd.gradcheck(lambda lr: reference.step(w, grad, lr=lr, **options)[0], (lr,))
