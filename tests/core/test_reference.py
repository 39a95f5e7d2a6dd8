"""reference.py, the truth of all other tests: sequential mode against loops, the update against torch's SGD.

Everything is float64 unless it says so. Exact mode, edge cases and gradients have files of their own.
"""

import itertools
import math
from functools import partial

import numpy as np
import pytest
import torch
from helpers.right import SPECS
from helpers.shrinkage import EPS, normal
from helpers.tiers import covering
from torch import nn

from cges_kernels.core import reference
from cges_kernels.core.hyperparameters import PROX_MODES
from cges_kernels.core.shrinkage import Thresholds, shrink
from cges_kernels.core.updates import sgd_update

# Two to four dims, one row, one column, and long groups.
SHAPES = [(9, 6), (1, 5), (5, 1), (4, 3, 2), (6, 4, 3, 3), (250, 2)]


KEPT = {
    "feature": lambda d: d > 0,
    "filter": lambda d: d == 0,
    "channel": lambda d: d == 1,
    "tensor": lambda d: False,
}


def by_loops(z, group_by, of_group):
    """Applies ``of_group`` (a list of floats to a list of floats) to every group, found index by index."""
    groups = {}
    for index in np.ndindex(*z.shape):
        key = tuple(i for d, i in enumerate(index) if KEPT[group_by](d))
        groups.setdefault(key, []).append(index)
    result = torch.zeros_like(z)
    for indices in groups.values():
        for index, value in zip(indices, of_group([z[i].item() for i in indices])):
            result[index] = value
    return result


def thesis(z, a, b, c):
    """Eq. 7 (l1, then group lasso) and then Eq. 8 (exclusive lasso) for one group, as in the thesis."""
    w = [math.copysign(max(abs(x) - c, 0.0), x) for x in z]
    norm = math.sqrt(math.fsum(x * x for x in w))
    w = [max(1 - a / norm, 0.0) * x if norm > 0 else 0.0 for x in w]
    threshold = b * math.fsum(abs(x) for x in w)
    return [math.copysign(max(abs(x) - threshold, 0.0), x) for x in w]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sequential_mode_is_the_thesis(shape):
    """The same values and zeros as the thesis's formulas in plain loops.

    The strengths are all three penalties, each alone, and so much that groups die.
    """
    strengths = ((0.4, 0.02, 0.1), (0.4, 0, 0), (0, 0.05, 0), (0, 0, 0.2), (50, 1, 0))
    for group_by, coefficients in itertools.product(SPECS, strengths):
        z = normal(*shape)
        z.view(-1)[::7] = 0.0
        got = shrink(z, Thresholds(*coefficients), group_by)
        expected = by_loops(z, group_by, partial(thesis, **dict(zip("abc", coefficients))))
        # A sum of n terms rounds by n/2 ulp at the very worst, and by far less in practice; n = 500 here.
        torch.testing.assert_close(got, expected, rtol=0, atol=64 * EPS * z.abs().max().item())
        assert torch.equal(got == 0, expected == 0)


@covering(
    options=[{}, {"momentum": 0.9}, {"momentum": 0.9, "dampening": 0.3}, {"momentum": 0.9, "nesterov": True}],
    maximize=[False, True],
    dtype=[torch.float32, torch.float64],
)
def test_sgd_update_is_torch_sgd_bit_for_bit(options, maximize, dtype):
    """The update writes the bits of torch.optim.SGD(foreach=False), the momentum buffer included."""
    options = {"lr": 0.1, "weight_decay": 0.01, "maximize": maximize, **options}
    w, buf = normal(7, 5).to(dtype), None
    p = nn.Parameter(w.clone())
    sgd = torch.optim.SGD([p], foreach=False, **options)
    for _ in range(4):
        grad = normal(7, 5).to(dtype)
        p.grad = grad.clone()
        sgd.step()
        w, buf = sgd_update(w, grad, buf, **options)
        assert torch.equal(w, p)
        assert buf is None or torch.equal(buf, sgd.state[p]["momentum_buffer"])


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_a_step_is_the_update_and_then_the_prox_at_lr_times_the_coefficients(prox_mode):
    """reference.step is sgd_update followed by shrink, and changes nothing in place."""
    w, grad, buf = normal(7, 5), normal(7, 5), normal(7, 5)
    before = [x.clone() for x in (w, grad, buf)]
    sgd = {"lr": 0.25, "momentum": 0.9, "weight_decay": 0.01}
    got, got_buf = reference.step(
        w,
        grad,
        buf,
        group_lasso=2.0,
        exclusive_lasso=0.1,
        l1=0.4,
        group_by="filter",
        prox_mode=prox_mode,
        **sgd,
    )
    z, new_buf = sgd_update(w, grad, buf, **sgd)
    assert torch.equal(got, shrink(z, Thresholds(0.5, 0.025, 0.1), "filter", None, prox_mode))
    assert torch.equal(got_buf, new_buf)
    assert all(torch.equal(x, y) for x, y in zip(before, (w, grad, buf)))  # nothing was changed in place


def test_a_step_accumulates_where_it_is_told_to():
    """accumulate=float64 gives the bits of the same step on float64 inputs."""
    w, grad, buf = (normal(7, 5).float() for _ in range(3))
    options = {"lr": 0.1, "momentum": 0.9, "group_lasso": 1.0, "exclusive_lasso": 0.1, "l1": 0.1}
    got, got_buf = reference.step(w, grad, buf, accumulate=torch.float64, **options)
    expected, expected_buf = reference.step(w.double(), grad.double(), buf.double(), **options)
    assert got.dtype == got_buf.dtype == torch.float64
    assert torch.equal(got, expected) and torch.equal(got_buf, expected_buf)
