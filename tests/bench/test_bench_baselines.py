"""The contenders of the benchmarks compute the intended steps, and their counts are right."""

import pytest
import torch
from helpers.right import SPECS
from helpers.tiers import covering

from bench import baselines, counts, workloads
from cges_kernels import available_backends
from cges_kernels.core import reference
from cges_kernels.core.groups import has_groups, reduced_dims

SHAPES = [(37, 5), (7,), (6, 3, 3, 3), (1, 4), (12, 1)]
STRONG = {"lr": 1e-2, "group_lasso": 40.0, "exclusive_lasso": 1.0}  # some groups and weights die
DTYPES = [torch.float32, torch.bfloat16]


def made(make, *arguments, **options):
    torch.manual_seed(5)
    return make(SHAPES, *arguments, **options)


def by_reference(steps, dtype=torch.float32, **options):
    """The weights after ``steps`` steps of the reference from the same numbers."""
    params, weights = made(baselines.parameters, dtype), []
    for p in params:
        w, buf = p.detach(), None
        for _ in range(steps):
            w, buf = reference.step(w, p.grad, buf, momentum=baselines.MOMENTUM, **options)
        weights.append(w)
    return weights


def check(contender, expected):
    """Asserts equal weights, up to the order of sums and the places at which 16-bit types are rounded."""
    for got, right in zip(contender.params, expected):
        tolerance = {} if right.dtype == torch.float32 else {"rtol": 0.03, "atol": 0.02}
        torch.testing.assert_close(got.detach(), right, **tolerance)


@pytest.mark.parametrize("make", [baselines.fused_sgd, baselines.foreach_sgd, baselines.for_loop_sgd])
@pytest.mark.parametrize("dtype", DTYPES)
def test_sgd_is_the_step_without_penalties(make, dtype):
    contender = made(make, dtype=dtype)
    for _ in range(3):
        contender.step()
    check(contender, by_reference(3, dtype, lr=baselines.LR))


@pytest.mark.filterwarnings("ignore:param_groups:UserWarning")
@covering(name=["eager", "vectorised", "prox_sgd"], dtype=DTYPES, group_by=SPECS, l1=[0.0, 5.0])
def test_proximal_contenders_take_the_steps_of_the_reference(name, dtype, group_by, l1):
    if name == "prox_sgd" and "cpu" not in available_backends():
        pytest.skip("the CPU executor is not built")
    options = {**STRONG, "l1": 0.0 if name == "vectorised" else l1, "group_by": group_by}
    contender = made(getattr(baselines, name), dtype=dtype, **options)
    for _ in range(3):
        contender.step()
    expected = by_reference(3, dtype, **options)
    check(contender, expected)
    assert any((w == 0).any() for w in expected) and any((w != 0).any() for w in expected)


def test_vectorised_without_penalties():
    options = {**STRONG, "group_lasso": 0.0, "exclusive_lasso": 0.0}
    contender = made(baselines.vectorised, **options)
    contender.step()
    check(contender, by_reference(1, **options))


@pytest.mark.parametrize("group_by", list(baselines.PAT_GROUPERS))
def test_the_first_step_of_pat_is_a_proximal_one(group_by):
    pytest.importorskip("torchao")
    strength = 0.95 / baselines.LR  # times the root of a group's length: near the norm of normal numbers
    contender = made(baselines.pat, group_by=group_by, reg_lambda=strength)
    contender.step()
    dead = 0
    for got, p in zip(contender.params, made(baselines.parameters)):
        n = 1
        if has_groups(p.dim(), group_by):
            n = torch.Size(p.shape[d] for d in reduced_dims(p.dim(), group_by)).numel()
        options = {"lr": baselines.LR, "group_lasso": strength * n**0.5, "group_by": group_by}
        expected = reference.step(p.detach(), p.grad, **options)[0]
        torch.testing.assert_close(got.detach(), expected)
        dead += (expected == 0).sum()
    assert dead > 0
    kept = [p.detach().clone() for p in contender.params]
    contender.step()  # the second step is another method's: it starts from weights that no step has shrunk
    again = [reference.step(w, p.grad, lr=baselines.LR)[0] for w, p in zip(kept, contender.params)]
    assert not torch.allclose(contender.params[0], again[0])


def test_every_contender_gets_weights_and_gradients_that_are_not_zero():
    for make in (baselines.fused_sgd, baselines.prox_sgd, baselines.vectorised, *baselines.others().values()):
        if make is not baselines.compiled and (
            make is not baselines.prox_sgd or "cpu" in available_backends()
        ):
            contender = made(make)
            assert all(p.grad.any() and p.any() for p in contender.params)


def test_operations_and_memory_are_counted():
    w = torch.ones(1000)

    def step():
        w.add_(1)
        (w * 2).sum()

    assert counts.dispatched_ops(step) == 3
    assert 4000 <= counts.extra_bytes(step) <= 4100
    assert counts.extra_bytes(lambda: w.add_(1)) <= 64


def test_a_fused_step_dispatches_the_same_whatever_the_number_of_tensors():
    if "cpu" not in available_backends():
        pytest.skip("the CPU executor is not built")
    ops = []
    for many in (2, 20):
        step = baselines.prox_sgd(workloads.small(many, 16)).step
        step()
        ops.append(counts.dispatched_ops(step))
    assert ops[0] == ops[1]
