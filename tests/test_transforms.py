"""prox under torch.func's transforms, fake tensors, forward-mode derivatives and tracing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

from cges_kernels import ProxSGD, prox, prox_
from cges_kernels.core.hyperparameters import PROX_MODES


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_transforms_and_fake_tensors(prox_mode):
    """vmap, jacrev, jvp and fake tensors work, by the reference only."""
    x = torch.randn(5, 3, 4, dtype=torch.float64)
    options = dict(group_lasso=0.1, exclusive_lasso=0.2, prox_mode=prox_mode)
    wanted = torch.stack([prox(w, **options) for w in x])
    torch.testing.assert_close(torch.vmap(lambda w: prox(w, **options))(x), wanted)

    def in_place(w):
        w = w.clone()
        prox_([w], **options)
        return w

    torch.testing.assert_close(torch.vmap(in_place)(x), wanted)
    jacobian = torch.func.jacrev(lambda w: prox(w, **options))(x[0])
    _, along = torch.func.jvp(lambda w: prox(w, **options), (x[0],), (x[1],))
    torch.testing.assert_close(along, torch.tensordot(jacobian, x[1], 2))
    with FakeTensorMode():
        fake = torch.empty(3, 4)
        assert prox(fake, **options).shape == fake.shape
        p = torch.nn.Parameter(torch.empty(3, 4))
        p.grad = torch.empty(3, 4)
        optimizer = ProxSGD([p], lr=0.1, momentum=0.9, **options)
        optimizer.step()
        assert optimizer.state[p]["momentum_buffer"].shape == p.shape
    with pytest.raises(
        RuntimeError, match=r"'cpu' cannot .*it serves tensors that hold values, got one of Fake"
    ):
        torch.vmap(lambda w: prox(w, backend="cpu", **options))(x)


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_derivatives_through_transforms(prox_mode):
    """Derivatives through vmap and in forward mode agree with the plain ones."""
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    options = dict(group_lasso=0.1, exclusive_lasso=0.2, l1=0.1, prox_mode=prox_mode)

    def total(x):
        return sum(prox(w, **options).square().sum() for w in x)

    def mapped(x):
        return torch.func.vmap(lambda w: prox(w, **options))(x).square().sum()

    wanted = torch.func.grad(total)(x)
    torch.testing.assert_close(torch.func.grad(mapped)(x), wanted)
    leaf = x.clone().requires_grad_()
    mapped(leaf).backward()
    torch.testing.assert_close(leaf.grad, wanted)

    def of_l1(c):
        return prox(x[0], **{**options, "l1": c}).square().sum()

    c, h = torch.tensor(0.1, dtype=torch.float64), 1e-6
    numeric = (of_l1(c + h) - of_l1(c - h)) / (2 * h)
    torch.testing.assert_close(torch.func.grad(of_l1)(c), numeric, rtol=1e-5, atol=1e-7)
    leaf = c.clone().requires_grad_()
    of_l1(leaf).backward()
    torch.testing.assert_close(leaf.grad, numeric, rtol=1e-5, atol=1e-7)
    _, along = torch.func.jvp(lambda w: prox(w, **options), (x[0],), (x[1],))
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x[0], x[1])
        torch.testing.assert_close(forward_ad.unpack_dual(prox(dual, **options)).tangent, along)
        prox_([dual], **options)
        torch.testing.assert_close(forward_ad.unpack_dual(dual).tangent, along)


def test_traces_hold_the_map():
    """A trace by torch.jit or make_fx computes prox for other inputs, instead of the example's result."""
    w = torch.randn(4, 3)
    traced = torch.jit.trace(lambda w: prox(w, l1=0.5), w)
    graph = make_fx(lambda w: prox(w, l1=0.5), tracing_mode="real")(w)
    other = torch.randn(4, 3)
    for found in (traced(other), graph(other)):
        torch.testing.assert_close(found, prox(other, l1=0.5))
