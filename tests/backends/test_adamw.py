"""AdamW's update before the proximal map: every executor against the float64 reference.

test_executors.py runs AdamW over shapes, specs and dtypes. Here are the cases that only AdamW has.
"""

import pytest
import torch
from helpers.right import (
    ADAMW,
    DTYPES,
    MODES,
    as_large_as_may_be,
    check_step,
    coefficients,
    fresh,
    inputs,
    moments,
    one_step,
    training,
)
from helpers.tiers import TILES, covering, fused_backends

NAN, INF = float("nan"), float("inf")


@pytest.mark.usefixtures("tiles")
@covering(
    executor=fused_backends(),
    options=[
        dict(),
        dict(weight_decay=0.0, betas=(0.3, 0.6)),
        dict(decoupled_weight_decay=False, weight_decay=0.1, maximize=True, betas=(0.0, 0.0), eps=0.1),
        dict(weight_decay=0.1, maximize=True, betas=(0.99, 0.2)),
        dict(decoupled_weight_decay=False, weight_decay=0.1, eps=0.1),
    ],
    steps=(0, 1, 999_999),
    dtype=DTYPES,
    tiles=TILES,
)
def test_options(executor, options, steps, dtype):
    """Every combination of AdamW's options is right, in a first step, the next, and the millionth."""
    w, grad = inputs((45, 130), dtype, 2)
    states = moments(w.shape, dtype) if steps else None
    told = dict(lr=0.3, rule=ADAMW, weight_decay=0.01, **coefficients(w, "feature")) | options
    check_step(executor, w, grad, states, steps=steps, **told)


@pytest.mark.parametrize("shape", [(33, 20), (40_000, 4)])
def test_without_penalties_it_is_the_update_alone(fused_backend, shape):
    """Without coefficients a step is AdamW's update."""
    w, grad = inputs(as_large_as_may_be(fused_backend, shape), torch.float32, 2)
    for states, steps in ((None, 0), (moments(w.shape, torch.float32), 5)):
        check_step(fused_backend, w, grad, states, steps=steps, rule=ADAMW, lr=0.2)


def test_without_beta1_the_first_moment_is_the_gradient_to_the_bit(fused_backend):
    """With beta1 = 0 nothing is left of the first moment, however large it was.

    torch.lerp computes from the nearer end, and so must the kernels.
    """
    w, grad = inputs((33, 20), torch.float32, 2)
    first, second = moments(w.shape, torch.float32)
    told = dict(rule=ADAMW, lr=0.2, betas=(0.0, 0.9), steps=5)
    _, got, _ = one_step(fused_backend, w, grad, (1e6 * first, second), **told)
    assert torch.equal(got, grad)


@pytest.mark.usefixtures("tiles")
@covering(executor=fused_backends(), group_by=("feature", "filter"), tiles=TILES)
def test_zeros_that_are_frozen_lose_both_moments(executor, group_by):
    """Frozen weights and both moments become +0.0 even if the gradient is NaN, and only those."""
    for mode in ("group", "element"):
        w, grad = inputs((70, 40), torch.float32, 2)
        w[::3] = 0.0
        w[:, 1] = -0.0
        options = training(w, group_by, "sequential", ADAMW)
        options |= dict(group_lasso=0.0, exclusive_lasso=0.0, l1=0.0)
        frozen = w == 0
        if mode == "group":
            frozen = (w == 0).all(0 if group_by == "feature" else 1, keepdim=True).expand_as(w)
        grad[frozen] = NAN
        states = moments(w.shape, torch.float32)
        got = one_step(executor, w, grad, states, steps=2, freeze_zeros=mode, **options)
        free = one_step(executor, w, grad, states, steps=2, **options)
        assert frozen.any() and not frozen.all()
        for x, y in zip(got, free):
            assert not x[frozen].any() and not torch.signbit(x[frozen]).any()
            assert torch.equal(x[~frozen], y[~frozen])


@pytest.mark.parametrize("prox_mode", MODES)
def test_infinities_and_nans_are_where_the_reference_has_them(fused_backend, prox_mode):
    """This holds for infinities and NaNs in weights, gradients and moments."""
    w, grad = inputs((40, 30), torch.float32, 2)
    states = moments(w.shape, torch.float32)
    for x, (row, column), value in (
        (w, (3, 1), NAN), (grad, (5, 7), NAN), (grad, (6, 9), INF), (states[0], (8, 11), -INF),
        (states[1], (9, 13), INF), (states[1], (2, 17), -1.0),
    ):  # fmt: skip
        x[row, column] = value
    options = training(w, "feature", prox_mode, ADAMW)
    ours, reference = (
        one_step(backend, w, grad, states, steps=4, **options) for backend in (fused_backend, "reference")
    )
    for x, y in zip(ours, reference):
        assert torch.equal(x.isnan(), y.isnan()) and torch.equal(x.isinf(), y.isinf())
        assert y.isnan().any() or y.isinf().any()


def test_zero_gradients_from_the_first_step(fused_backend):
    """Zero gradients move nothing, and 0/0 does not occur."""
    w = fresh((20, 10))
    got, *states = one_step(
        fused_backend, w, torch.zeros_like(w), rule=ADAMW, lr=0.5, weight_decay=0.0, eps=1e-8
    )
    assert torch.equal(got, w.cpu()) and not any(x.any() for x in states)


def test_a_gradient_far_below_eps(fused_backend):
    """Gradients near 1e-12 are right: eps decides there."""
    w, grad = inputs((30, 20), torch.float32, 2)
    check_step(fused_backend, w, grad * 1e-12, rule=ADAMW, lr=0.5, **coefficients(w, "feature"))


def test_misaligned_and_strided_states(fused_backend):
    """States at odd addresses, or with the strides of a transposed weight, are handled rightly."""

    def misaligned(x):
        return torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view(x.shape).copy_(x)

    w, grad = inputs((64, 48), torch.float32, 2)
    states = moments(w.shape, torch.float32)
    options = training(w, "feature", "sequential", ADAMW)
    check_step(fused_backend, w, grad, states, misaligned, steps=3, **options)
    check_step(fused_backend, w.t().contiguous().t(), grad, states, steps=3, **options)
