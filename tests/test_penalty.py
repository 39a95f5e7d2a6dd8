"""The public function penalty: the value of the regulariser Omega of one tensor, and its gradient."""

import pytest
import torch
from helpers.right import SPECS, fresh

from cges_kernels import penalty

OPTIONS = {"group_lasso": 0.9, "exclusive_lasso": 0.02, "l1": 0.1}


def groups_of(w, group_by):
    """The groups as vectors, cut out by hand."""
    matrix = {
        "feature": lambda: w.flatten(1).T,
        "filter": lambda: w.flatten(1),
        "channel": lambda: w.transpose(0, 1).flatten(1),
        "tensor": lambda: w.flatten()[None],
    }[group_by]()
    return list(matrix)


@pytest.mark.parametrize("group_by", SPECS)
def test_penalty_is_omega(group_by):
    """The value is the formula over groups cut out by hand, and view= gives the same bits."""
    for shape in ((6, 5), (4, 3, 2), (4, 3, 2, 2), (1, 5)):
        w = fresh(shape, torch.float64)
        a, b, c = 0.7, 0.3, 0.2
        expected = sum(
            a * g.square().sum().sqrt() + b / 2 * g.abs().sum() ** 2 + c * g.abs().sum()
            for g in groups_of(w, group_by)
        )
        got = penalty(w, group_lasso=a, exclusive_lasso=b, l1=c, group_by=group_by)
        assert got.shape == () and got.dtype == torch.float64
        torch.testing.assert_close(got, expected, rtol=1e-14, atol=0)
        flat = penalty(w.flatten(), group_lasso=a, exclusive_lasso=b, l1=c, group_by=group_by, view=shape)
        assert torch.equal(flat, got)


def test_penalty_of_a_known_matrix():
    """Each coefficient alone gives a value that is easy to work out: the column (3, -4) has norm 5."""
    w = torch.tensor([[3.0, 0.0], [-4.0, 0.0]])
    assert penalty(w, group_lasso=1.0) == 5
    assert penalty(w, exclusive_lasso=1.0) == 24.5
    assert penalty(w, l1=1.0) == 7
    assert penalty(w, group_lasso=1.0, group_by="filter") == 7
    assert penalty(w, exclusive_lasso=2.0, group_by=(1,)) == 25
    assert penalty(w) == 0


def test_penalty_of_a_bias_is_its_l1_alone_under_a_named_spec():
    """A named spec makes no groups of one dimension; a tuple of dims does. An empty tensor has penalty 0."""
    w = torch.tensor([3.0, -4.0])
    assert penalty(w, group_lasso=1.0, exclusive_lasso=1.0, l1=0.5) == 3.5
    assert penalty(w, group_lasso=1.0, exclusive_lasso=1.0, l1=0.5, group_by=(0,)) == 5 + 24.5 + 3.5
    assert penalty(torch.empty(0, 3), **OPTIONS) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_penalty_of_16_bit_types_is_computed_in_float32(dtype):
    """float16 and bfloat16 give the bits of the float32 computation, without overflow."""
    w = (100 * fresh((50, 40))).to(dtype)  # squares overflow float16
    got = penalty(w, **OPTIONS)
    assert got.dtype == torch.float32 and torch.equal(got, penalty(w.float(), **OPTIONS))


@pytest.mark.parametrize("group_by", [*SPECS, (1,), ()])
def test_penalty_is_differentiable(group_by):
    """gradcheck passes for every spec, for a tuple of dims, and for groups of one element."""
    w = fresh((4, 3, 2), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: penalty(w, group_by=group_by, **OPTIONS), (w,))


def test_penalty_has_gradient_zero_at_zero_groups():
    """The norm has no derivative at a zero group: the gradient there is 0, not NaN."""
    w = fresh((5, 4))
    w[:, 2] = 0.0
    w.requires_grad_()
    (grad,) = torch.autograd.grad(penalty(w, **OPTIONS), w)
    assert grad.isfinite().all() and not grad[:, 2].any() and grad[:, 1].all()


def test_the_penalty_has_tangent_0_at_0():
    """Forward mode and vmap too give finite derivatives at zero, although the norm has none there."""
    zeros, ones = torch.zeros(4, 3), torch.ones(4, 3)
    _, tangent = torch.func.jvp(lambda w: penalty(w, group_lasso=1.0), (zeros,), (ones,))
    assert tangent.isfinite()
    mapped = torch.func.vmap(lambda w: penalty(w, group_lasso=1.0))
    assert not torch.func.grad(lambda x: mapped(x).sum())(torch.zeros(2, 4, 3)).any()
