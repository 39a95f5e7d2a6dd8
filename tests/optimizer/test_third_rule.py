"""How another update rule is added: Lion (Chen et al. 2023), written out here; see docs/design/a-step.md."""

import subprocess
from pathlib import Path

import pytest
import torch
from cuda_emulator.build import CSRC, FLAGS, compiler
from helpers.steps import PENALTY, assert_same_bits, everything, parameters, through_a_file, train

from cges_kernels.core import reference
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
    """A proximal optimizer with Lion's update, on the reference."""

    rule = LION

    def __init__(self, params, lr=1e-4, betas=(0.9, 0.99), weight_decay=0.0, **options):
        defaults = dict(lr=lr, betas=betas, weight_decay=weight_decay, maximize=False, foreach=None)
        defaults |= dict(group_lasso=0.0, exclusive_lasso=0.0, l1=0.0, group_by="feature", view=None)
        defaults |= dict(prox_mode="sequential", freeze_zeros=None, skip_dead=False)
        defaults |= dict(differentiable=False, fused=None)
        super().__init__(params, {**defaults, "capturable": False, **options}, backend="reference")


def test_the_reference_steps_it():
    """A Rule is all that the reference needs: steps are the update and then the prox."""
    params = parameters()
    optimizer = ProxLion(params, lr=0.01, weight_decay=0.1, **PENALTY)
    weights, states = [p.detach().clone() for p in params], [()] * len(params)
    for step in range(4):
        train(optimizer, params, [step])
        for i, p in enumerate(params):
            options = dict(lr=0.01, weight_decay=0.1, update=lion_update, **PENALTY)
            weights[i], *states[i] = reference.step(weights[i], p.grad, *states[i], **options)
    assert_same_bits([p.detach() for p in params], weights)
    assert_same_bits([optimizer.state[p]["exp_avg"] for p in params], [x for (x,) in states])
    assert any((p == 0).any() for p in params)


def test_what_is_around_it_takes_it():
    """Files, and checks of options, work for the new rule without more code."""
    params = parameters()
    optimizer = ProxLion(params, lr=0.01, **PENALTY)
    train(optimizer, params, range(3))
    others = parameters()
    again = ProxLion(others, lr=7.0)
    with torch.no_grad():
        for p, q in zip(others, params):
            p.copy_(q)
    again.load_state_dict(through_a_file(optimizer.state_dict()))
    train(optimizer, params, [3])
    train(again, others, [3])
    assert_same_bits(everything(again), everything(optimizer))
    with pytest.raises(ValueError, match="Invalid weight_decay value: -1"):
        ProxLion(parameters(), weight_decay=-1)


@pytest.mark.skipif(compiler() is None, reason="there is no C++ compiler")
def test_the_cuda_kernels_compile_for_it():
    """The CUDA kernels take a new rule's update in a file of under 60 lines."""
    source = Path(__file__).parents[1] / "backends" / "cuda" / "lion.cu"
    command = [compiler(), *FLAGS, "-fsyntax-only", "-x", "c++", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(source.read_text().splitlines()) < 60 and CSRC.exists()
