"""Every option of torch.optim.SGD: without penalties ProxSGD is torch.optim.SGD."""

import pytest
import torch
from helpers.right import INTERPRETED
from helpers.steps import SHAPES, assert_same_bits, everything, give_grads, parameters, train
from helpers.tiers import covering, fused_backends
from torch.optim import SGD

from cges_kernels import ProxSGD

# (momentum, dampening, nesterov): each on and off, as far as torch takes them together.
RULES = [(0, 0, False), (0, 0.3, False), (0.9, 0, False), (0.9, 0.3, False), (0.9, 0, True)]
OPTIONS = dict(rule=RULES, weight_decay=(0, 1e-2), maximize=(False, True))


@pytest.fixture
def options(rule, weight_decay, maximize):
    momentum, dampening, nesterov = rule
    rule = dict(momentum=momentum, dampening=dampening, nesterov=nesterov)
    return dict(rule, weight_decay=weight_decay, maximize=maximize)


@covering(**OPTIONS, dtype=[torch.float32, torch.float64])
def test_reference_is_torch_sgd_bit_for_bit(options, dtype):
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
    """Truth is SGD in float64 from the same numbers.

    A fused kernel rounds at other places than foreach=False does (fused multiply-adds; one rounding per
    step in bfloat16), so bits may differ. What may not differ is the size of the error: at most twice that
    of torch's own fused kernel, plus one rounding of the largest value.
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
    for kind in (slice(0, len(SHAPES)), slice(len(SHAPES), None)):  # parameters, buffers

        def error(xs, kind=kind):
            return max(
                (float((x - t).abs().max()) for x, t in zip(xs[kind], truth[kind]) if t.numel()), default=0
            )

        rounding = torch.finfo(dtype).eps * max(
            (float(t.abs().max()) for t in truth[kind] if t.numel()), default=0
        )
        assert error(ours) <= 2 * error(fused) + rounding
