"""Parameters, their gradients and steps: the numbers are the same wherever they are asked for."""

import io

import pytest
import torch
from torch import nn

from cges_kernels import ProxAdamW, available_backends

FASTEST = "cpu" if "cpu" in available_backends() else "reference"
needs_cpu = pytest.mark.skipif(FASTEST != "cpu", reason="the C++ extension is not built")
# A matrix, a convolution's weight, a bias, a scalar, an empty tensor, and a larger matrix.
SHAPES = [(6, 5), (4, 3, 3, 3), (9,), (), (0, 3), (130, 70)]
PENALTY = dict(group_lasso=0.02, exclusive_lasso=0.001, l1=0.01)


def parameters(shapes=SHAPES, dtype=torch.float64, seed=0):
    """Fresh random parameters, the same ones for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    draw = (torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu") for shape in shapes)
    return [nn.Parameter(w.to(torch.get_default_device(), dtype)) for w in draw]


def copies(params):
    """New parameters with the same values."""
    return [nn.Parameter(p.detach().clone()) for p in params]


def two_groups(**second):
    """Two param groups of fresh parameters, and all these parameters in one list."""
    params = parameters()
    return [{"params": params[:3]}, {"params": params[3:], "lr": 0.05, **second}], params


def copy_values(to, source):
    """Copies values from one list of tensors into another, in place."""
    with torch.no_grad():
        for p, q in zip(to, source):
            p.copy_(q)


def give_grads(params, step, *twins):
    """Random gradients that depend only on the step and on the place in the list; twins get the same."""
    for i, p in enumerate(params):
        generator = torch.Generator().manual_seed(1000 * step + i)
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64, device="cpu")
        for x in (p, *(twin[i] for twin in twins)):
            x.grad = torch.empty_like(x).copy_(grad)


def train(optimizer, params, steps):
    """Makes the given steps, each with its own gradients."""
    for step in steps:
        give_grads(params, step)
        optimizer.step()


def through_a_file(state):
    """The state after it was saved to a file and loaded again."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def everything(optimizer):
    """All parameters, then all tensors of their states: momentum buffers, or moments and counts."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for p in params if p in optimizer.state for x in optimizer.state[p].values()]
    return [x.detach().clone() for x in params + states if isinstance(x, torch.Tensor)]


def bits(x):
    """The tensor's bits as integers."""
    return x.detach().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def assert_same_bits(xs, ys):
    """Asserts that tensors are equal to the last bit, signs of zeros and NaN included."""
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        assert x.dtype == y.dtype and torch.equal(bits(x), bits(y))


def assert_as_near_as(backend, xs, ys):
    """Asserts equal bits for the reference, and 1e-12 for the others, which may fuse multiply-adds."""
    if backend == "reference":
        return assert_same_bits(xs, ys)
    assert len(xs) == len(ys)
    for x, y in zip(xs, ys):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-12)


def started_adamw(backend, steps=3, **options):
    """A ProxAdamW under PENALTY that has made some steps, and its parameters."""
    params = parameters()
    optimizer = ProxAdamW(params, lr=0.01, backend=backend, **PENALTY, **options)
    train(optimizer, params, range(steps))
    return optimizer, params
