"""Every option of torch.optim.SGD: without penalties ProxSGD is torch.optim.SGD."""

import pytest
import torch
from helpers.right import INTERPRETED
from helpers.steps import SHAPES, assert_same_bits, everything, give_grads, parameters, train
from helpers.tiers import covering, fused_backends
from torch.optim import SGD

from cges_kernels import ProxSGD

# (momentum, dampening, nesterov): each on and off, in the combinations that torch accepts.
RULES = [(0, 0, False), (0, 0.3, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)]
OPTIONS = dict(rule=RULES, weight_decay=(0, 1e-2), maximize=(False, True))


@pytest.fixture
def options(rule, weight_decay, maximize):
    """The options as torch.optim.SGD's keywords."""
    momentum, dampening, nesterov = rule
    rule = dict(momentum=momentum, dampening=dampening, nesterov=nesterov)
    return dict(rule, weight_decay=weight_decay, maximize=maximize)


@covering(**OPTIONS, dtype=[torch.float32, torch.float64])
def test_reference_is_torch_sgd_bit_for_bit(options, dtype):
    """Parameters and buffers have the bits of torch.optim.SGD(foreach=False) after 50 steps."""
    results = []
    for make in (SGD, lambda *args, **kw: ProxSGD(*args, **kw, backend="reference")):
        params = parameters(dtype=dtype)
        foreach = False if make is SGD else None
        optimizer = make(params, lr=0.03, foreach=foreach, **options)
        train(optimizer, params, range(50))
        results.append(everything(optimizer))
    assert_same_bits(*results)


@covering(**OPTIONS, dtype=[torch.float32, torch.bfloat16], executor=fused_backends())
def test_as_near_to_torch_sgd_as_fused_sgd_is(executor, options, dtype):
    """The error is at most twice that of torch's fused SGD, plus one rounding.

    The truth is SGD in float64 from the same numbers, and the rounding is that of the largest value.

    Bits may differ, because a fused kernel rounds at other places than foreach=False does: it fuses
    multiply-adds, and in bfloat16 it rounds once a step. The size of the error may not differ.
    """

    def run(make, dtype, **more):
        params = parameters(dtype=start_dtype)
        for p in params:
            p.data = p.data.to(dtype)
        optimizer = make(params, lr=0.03, **options, **more)
        for step in range(3 if INTERPRETED and executor == "triton" else 50):
            give_grads(params, step)
            for p in params:
                p.grad = p.grad.to(start_dtype).to(dtype)
            optimizer.step()
        return everything(optimizer)

    start_dtype = dtype
    truth = run(SGD, torch.float64, foreach=False)
    fused, ours = run(SGD, dtype, fused=True), run(ProxSGD, dtype, backend=executor)
    assert len(truth) == len(fused) == len(ours)
    for kind in (slice(0, len(SHAPES)), slice(len(SHAPES), None)):  # parameters, then buffers

        def error(xs, kind=kind):
            return max(
                (float((x - t).abs().max()) for x, t in zip(xs[kind], truth[kind]) if t.numel()), default=0
            )

        rounding = torch.finfo(dtype).eps * max(
            (float(t.abs().max()) for t in truth[kind] if t.numel()), default=0
        )
        assert error(ours) <= 2 * error(fused) + rounding
