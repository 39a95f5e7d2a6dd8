"""The public functions prox (returns a new tensor) and prox_ (changes a list in place), by every executor."""

import itertools
from functools import partial

import pytest
import torch
from helpers.right import DTYPES, SPECS, fresh
from helpers.tiers import each_value
from torch import nn

from cges_kernels import ProxSGD, available_backends, penalty, prox, prox_
from cges_kernels.core.hyperparameters import PROX_MODES

OPTIONS = {"group_lasso": 0.9, "exclusive_lasso": 0.02, "l1": 0.1}


FORMATS = {
    "contiguous": lambda: fresh((6, 4, 3, 3)),
    "channels_last": lambda: fresh((6, 4, 3, 3)).to(memory_format=torch.channels_last),
    "transposed": lambda: fresh((7, 9)).t(),
    "size-1 dims": lambda: fresh((6,)).as_strided((6, 1, 1), (1, 50, 7)),
    "bias": lambda: fresh((9,)),
    "0-d": lambda: fresh(()),
}


@each_value(executor=available_backends(), form=[*FORMATS])
def test_prox_returns_a_new_tensor_of_the_same_kind(executor, form):
    """The result keeps dtype, shape, device and strides, and the input is unchanged."""
    for prox_mode, dtype in itertools.product(PROX_MODES, DTYPES):
        w = FORMATS[form]().to(dtype)
        before, strides = w.clone(), w.stride()
        for options in (OPTIONS, {}):
            got = prox(w, prox_mode=prox_mode, backend=executor, **options)
            assert got.data_ptr() != w.data_ptr() and not got.requires_grad
            assert (got.dtype, got.shape, got.device) == (w.dtype, w.shape, w.device)
            assert [s for s, n in zip(got.stride(), w.shape) if n > 1] == [
                s for s, n in zip(strides, w.shape) if n > 1
            ]
            assert torch.equal(w, before) and w.stride() == strides
        assert torch.equal(got, w)  # the last options were {}: without coefficients prox copies


@each_value(executor=available_backends(), group_by=[*SPECS, (1,), (0, 1)])
def test_prox_in_exact_mode_is_a_minimum(executor, group_by):
    """No random move away lowers ||x - w||^2 / 2 + penalty(x); sequential mode is no minimum."""
    w = fresh((12, 5), torch.float64)
    options = {**OPTIONS, "exclusive_lasso": 0.2, "group_by": group_by}

    def objective(x):
        return (x - w).square().sum() / 2 + penalty(x, **options)

    best = prox(w, prox_mode="exact", backend=executor, **options)
    assert best.any() and (best == 0).any()
    for size in (1e-3, 1e-1):
        for _ in range(50):
            move = size * fresh(w.shape, torch.float64)
            # The objective has curvature of at least 1, from its first term.
            assert objective(best + move) >= objective(best) + move.square().sum() / 2 - 1e-12
            move = torch.where(best == 0, 0.0, move)
            assert objective(best + move) >= objective(best) + move.square().sum() / 2 - 1e-12
    assert objective(prox(w, backend=executor, **options)) > objective(best) + 1e-3


@each_value(executor=available_backends(), group_by=SPECS)
def test_prox_of_a_view_is_the_prox_of_the_viewed(executor, group_by):
    """The option view= gives the same bits as calling prox on w.view(...)."""
    for prox_mode in PROX_MODES:
        w = fresh((12, 10))
        options = {**OPTIONS, "group_by": group_by, "prox_mode": prox_mode, "backend": executor}
        assert torch.equal(
            prox(w, view=(3, 4, 10), **options), prox(w.view(3, 4, 10), **options).view(12, 10)
        )


@pytest.mark.parametrize("prox_mode", PROX_MODES)
def test_prox_is_differentiable(checked_backend, prox_mode):
    """gradcheck passes whichever executor is asked for, because the reference's formulas are used then."""
    for group_by in (*SPECS, ()):
        w = fresh((4, 3, 2), torch.float64).requires_grad_()
        of = partial(prox, group_by=group_by, prox_mode=prox_mode, backend=checked_backend, **OPTIONS)
        assert torch.autograd.gradcheck(of, (w,))
        torch.testing.assert_close(of(w).detach(), of(w.detach()), rtol=1e-13, atol=1e-15)


def test_prox_without_coefficients_is_differentiable_and_still_a_new_tensor(backend):
    """With no coefficients prox is the identity for autograd, but it does not return the input itself."""
    w = fresh((4, 3)).requires_grad_()
    got = prox(w, backend=backend)
    assert got.data_ptr() != w.data_ptr() and torch.equal(got, w)
    (grad,) = torch.autograd.grad(got.sum(), w)
    assert torch.equal(grad, torch.ones_like(w))


def test_prox_without_grad_mode_is_cut_off(backend):
    """Under torch.no_grad() the result requires no gradient and has the usual values."""
    w = fresh((4, 3)).requires_grad_()
    with torch.no_grad():
        got = prox(w, backend=backend, **OPTIONS)
    assert not got.requires_grad and torch.equal(got, prox(w.detach(), backend=backend, **OPTIONS))


def mixed_list():
    """Tensors of every dtype, shape and memory format."""
    shapes = [(6, 5), (4, 3, 3, 3), (9,), (), (0, 3), (1, 1), (70, 33)]
    tensors = [fresh(shape, dtype) for dtype in DTYPES for shape in shapes]
    return [*tensors, fresh((8, 6)).t(), fresh((4, 5, 3, 3)).to(memory_format=torch.channels_last)]


@each_value(executor=available_backends(), group_by=SPECS, prox_mode=PROX_MODES)
def test_prox_in_place_over_a_mixed_list(executor, group_by, prox_mode):
    """prox_ gives each tensor the bits that prox gives it, keeps its memory, and bumps its version."""
    tensors = mixed_list()
    options = {**OPTIONS, "group_by": group_by, "prox_mode": prox_mode, "backend": executor}
    expected = [prox(w, **options) for w in tensors]
    assert any(not torch.equal(w, x) for w, x in zip(tensors, expected))
    before = [(w.data_ptr(), w.stride(), w.dtype, w._version) for w in tensors]
    assert prox_(tensors, **options) is None
    for w, x, (pointer, strides, dtype, version) in zip(tensors, expected, before):
        assert (w.data_ptr(), w.stride(), w.dtype) == (pointer, strides, dtype)
        assert torch.equal(w, x)
        assert w._version > version or w.numel() == 0  # autograd sees that the tensor was changed


def test_prox_in_place_takes_any_iterable_and_a_lone_tensor(backend):
    """prox_ accepts a tensor or a generator, not only a list."""
    w = fresh((6, 5))
    expected = prox(w, backend=backend, **OPTIONS)
    one, two, three = w.clone(), w.clone(), w.clone()
    prox_(one, backend=backend, **OPTIONS)
    prox_((x for x in (two, three)), backend=backend, **OPTIONS)
    assert all(torch.equal(x, expected) for x in (one, two, three))


def test_prox_in_place_refuses_what_requires_grad_and_writes_nothing(backend):
    """A leaf that requires grad is an error that names it, and no tensor of the list changed."""
    free, leaf = fresh((6, 5)), nn.Parameter(fresh((6, 5)))
    before = [free.clone(), leaf.detach().clone()]
    with pytest.raises(RuntimeError, match=r"tensors\[1\]: expected torch.no_grad\(\)"):
        prox_([free, leaf], backend=backend, **OPTIONS)
    assert torch.equal(free, before[0]) and torch.equal(leaf, before[1])
    coefficient = torch.tensor(0.1, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"prox_: expected coefficients without a gradient, .* use prox"):
        prox_([free], backend=backend, l1=coefficient)
    for bad, words in ((torch.tensor(0.1, device="meta"), "number .* the meta device"), (10**400, "finite")):
        with pytest.raises(ValueError, match=f"l1: expected a {words}"):
            prox_([free], backend=backend, l1=bad)
    with pytest.raises(TypeError, match="tensors: expected tensors, got None"):
        prox_(None)
    assert torch.equal(free, before[0])
    with torch.no_grad():
        prox_([free, leaf], backend=backend, **OPTIONS)
    assert torch.equal(leaf, prox(before[1], backend=backend, **OPTIONS)) and leaf.requires_grad


def test_prox_in_place_serves_another_optimizer(backend):
    """torch.optim.SGD and then prox_ at lr times the coefficients is ProxSGD."""
    start = fresh((12, 7), torch.float64)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    options = {**OPTIONS, "l1": 1.0}
    prox_sgd = ProxSGD([ours], lr=0.1, momentum=0.9, backend=backend, **options)
    sgd = torch.optim.SGD([theirs], lr=0.1, momentum=0.9)
    for _ in range(5):
        ours.grad = fresh((12, 7), torch.float64)
        theirs.grad = ours.grad.clone()
        prox_sgd.step()
        sgd.step()
        with torch.no_grad():
            prox_([theirs], backend=backend, **{name: 0.1 * value for name, value in options.items()})
    # Where one of them fuses a multiply and an add, the updates differ by an ulp a step.
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)
    assert (ours == 0).any() and torch.equal(ours == 0, theirs == 0)
