"""What docs/adamw.md says is true, and its code runs."""

import re

import pytest
import torch
from helpers.programs import ROOT
from torch import nn

from cges_kernels import ProxAdamW, sparsity_param_groups

USE, FREEZE = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "adamw.md").read_text(), re.DOTALL)


def test_its_code_runs():
    """The first block builds the optimizer, and only with the second does a zeroed column stay 0."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 40), nn.ReLU(), nn.Linear(40, 3))
    scope = {"model": model, "sparsity_param_groups": sparsity_param_groups, "ProxAdamW": ProxAdamW}
    exec(USE, scope)
    optimizer = scope["optimizer"]
    assert optimizer.param_groups[0]["group_lasso"] == pytest.approx(0.1 * 40**0.5)
    weight = model[0].weight
    weight.data[:, 3] = 0
    for freeze in (True, False):
        if freeze:
            exec(FREEZE, scope)
        else:
            optimizer.param_groups[0]["freeze_zeros"] = None
        optimizer.zero_grad()
        model(torch.randn(16, 12)).square().mean().backward()
        assert weight.grad[:, 3].any()
        optimizer.step()
        assert bool(weight[:, 3].any()) is not freeze


@pytest.mark.parametrize(("lr", "scale"), [(1e-3, 1.0), (1e-2, 1e-4), (1e-2, 1e4)])
def test_a_weight_lives_where_its_gradients_signal_exceeds_the_coefficient(lr, scale):
    """Under l1 a weight leaves 0 if its gradient's signal exceeds the coefficient.

    The signal is the gradient's mean over its root mean square.

    The page says that this holds whatever lr and the loss's scale, so each is varied.
    """
    generator = torch.Generator().manual_seed(0)
    signal = torch.linspace(0.02, 0.5, 200)
    w = nn.Parameter(torch.zeros(200))
    optimizer = ProxAdamW([w], lr=lr, l1=0.2, weight_decay=0.0)
    for _ in range(3000):
        noise = torch.randn(200, generator=generator) * (1 - signal**2).sqrt()
        w.grad = -scale * (signal + noise)
        optimizer.step()
    far = lr * 3000 * 0.05  # how far a signal that exceeds the coefficient by .05 moves a weight
    assert (w[signal > 0.26] > far / 2).all() and (w[signal < 0.1].abs() < far / 2).all()


def test_the_second_moment_stands_still_in_bfloat16():
    """In bfloat16 exp_avg_sq does not decay from 1 in 300 steps; in float32 it does."""
    for dtype in (torch.bfloat16, torch.float32):
        w = nn.Parameter(torch.ones(8, dtype=dtype))
        optimizer = ProxAdamW([w], lr=1e-3)
        w.grad = torch.zeros_like(w)
        optimizer.step()
        moment = optimizer.state[w]["exp_avg_sq"].fill_(1.0)
        for _ in range(300):  # as if the gradients had become small
            optimizer.step()
        assert (moment == 1).all() if dtype == torch.bfloat16 else (moment < 0.75).all()


def test_a_threshold_below_half_an_ulp_does_nothing_to_bfloat16():
    """lr*l1 = .001 does not move a weight of 1 in bfloat16, and does in float32."""
    w = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    w.grad = torch.zeros_like(w)
    ProxAdamW([w], lr=1e-3, l1=1.0, weight_decay=0.0).step()
    assert (w == 1).all()
    wide = nn.Parameter(torch.ones(8))
    wide.grad = torch.zeros_like(wide)
    ProxAdamW([wide], lr=1e-3, l1=1.0, weight_decay=0.0).step()
    assert (wide < 1).all()
