"""Groups of 2 to 64 elements, which the CPU executor solves side by side in the lanes of a vector."""

import itertools

import pytest
import torch
from helpers.right import DTYPES, MODES, check_step, coefficients, fresh, inputs, one_step, training
from helpers.tiers import covering, each_value

from cges_kernels import prox
from cges_kernels.backends.extension import BUILT

pytestmark = pytest.mark.skipif("cpu" not in BUILT, reason="the extension is not built")

NORMS = ("group_lasso", "exclusive_lasso")
SIZES = (*range(2, 18), 27, 31, 33, 63, 64, 65)  # 17 is the first that is not sorted, 65 that is not short
# {name: (n, groups) -> (shape, reduced dims)}: groups of n elements that are contiguous, that are columns, or
# that are columns of several matrices with few groups each.
LAYOUTS = {
    "runs": lambda n, groups: ((groups, n), (1,)),
    "columns": lambda n, groups: ((n, groups), (0,)),
    "matrices": lambda n, groups: ((5, n, groups // 5 + 1), (1,)),
}
RUNS_IN_COLUMNS = [
    ((rows, 211, run), (0, 2))
    for rows in (*range(2, 9), 21, 32)
    for run in (*range(2, 16 // rows + 1), 64 // rows)
]


@pytest.mark.usefixtures("poisoned_memory")
@covering(layout=LAYOUTS, prox_mode=MODES, dtype=DTYPES)
def test_all_sizes(layout, prox_mode, dtype):
    """Each size and layout is right, for whole blocks of groups and parts of one."""
    for n in SIZES:
        for groups in (1, 64, 333):  # one group, a whole block of groups, and blocks with a part of one
            shape, dims = LAYOUTS[layout](n, groups)
            w, grad, buf = inputs(shape, dtype)
            check_step("cpu", w, grad, buf, **training(w, dims, prox_mode))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("prox_mode", MODES)
def test_runs_in_columns(prox_mode, dtype):
    """Groups of up to 64 elements made of short runs in several rows are right."""
    for shape, dims in RUNS_IN_COLUMNS:
        w, grad, buf = inputs(shape, dtype)
        check_step("cpu", w, grad, buf, **training(w, dims, prox_mode))


@each_value(terms=[("group_lasso",), ("exclusive_lasso",), ("exclusive_lasso", "l1")], prox_mode=MODES)
def test_terms_alone_in_groups_of_all_strengths(prox_mode, terms):
    """Each penalty alone is right for groups from dead to untouched.

    Without group lasso, exact mode sorts groups of up to 16 elements, and searches in the others.
    """
    for n in SIZES:
        w = fresh((700, n)) * torch.logspace(-2, 2, 700)[:, None]
        options = {name: x for name, x in coefficients(w, "filter").items() if name in (*terms, "group_by")}
        check_step("cpu", w, fresh(w.shape), None, lr=0.5, prox_mode=prox_mode, **options)


@pytest.mark.parametrize("b", [1e-4, 1.0, 1e4, 1e8])
def test_equal_magnitudes(b):
    """Groups of equal magnitudes are right, where a search could step from side to side of a corner."""
    for n in range(2, 17):
        w = torch.tensor([-1.1, 1.1]).repeat(n)[:n].expand(70, n).contiguous()
        got = prox(w, exclusive_lasso=b, group_by="filter", prox_mode="exact", backend="cpu")
        torch.testing.assert_close(got, w / (1 + b * n), rtol=0, atol=2.5e-7)


@covering(layout=LAYOUTS, freeze_zeros=["group", "element"], prox_mode=MODES, dtype=DTYPES)
def test_what_is_zero_stays_zero(layout, freeze_zeros, prox_mode, dtype):
    """Frozen zeros and their momentum stay 0 in each layout, also without some penalties."""
    for n, left_out in itertools.product((2, 5, 16, 37, 64), [(), NORMS, (*NORMS, "l1")]):
        shape, dims = LAYOUTS[layout](n, 205)
        w, grad, buf = inputs(shape, dtype)
        groups = w.movedim(dims[0], -1)
        groups[..., 1::3, :] = 0.0
        groups[..., 0] = 0.0
        options = dict(training(w, dims, prox_mode), freeze_zeros=freeze_zeros) | dict.fromkeys(left_out, 0.0)
        check_step("cpu", w, grad, buf, **options)
        new, new_buf = (x.movedim(dims[0], -1) for x in one_step("cpu", w, grad, buf, **options))
        assert not new[..., 1::3, :].any() and not new_buf[..., 1::3, :].any()
        assert new[..., 0].any() == new_buf[..., 0].any() == (freeze_zeros == "group")


@each_value(dtype=DTYPES, prox_mode=MODES)
def test_bits_tell_nothing_of_neighbours(prox_mode, dtype):
    """A group gets the same bits beside groups that need many sweeps as beside others."""
    for n in (2, 3, 7, 9, 16, 27, 61, 64):
        w = fresh((300, n), dtype) * torch.logspace(-2, 1.5, 300, dtype=dtype)[torch.randperm(300), None]
        for terms in (dict(group_lasso=0.5, exclusive_lasso=0.3), dict(exclusive_lasso=0.3, l1=0.1)):
            options = dict(terms, group_by="filter", prox_mode=prox_mode, backend="cpu")
            together = prox(w, **options)
            for begin, end in ((0, 1), (17, 90), (64, 128), (100, 300)):
                assert torch.equal(prox(w[begin:end].clone(), **options), together[begin:end])


@each_value(value=[float("nan"), float("inf"), -float("inf")], prox_mode=MODES)
def test_what_is_not_finite_stays_in_its_group(value, prox_mode):
    """NaN and infinities show as in the reference and change no other group."""
    for n in SIZES:
        for terms in (
            dict(group_lasso=0.5),
            dict(exclusive_lasso=0.3),
            dict(group_lasso=0.5, exclusive_lasso=0.3),
        ):
            options = dict(terms, group_by="filter", prox_mode=prox_mode)
            w = fresh((130, n))
            before = prox(w, backend="cpu", **options)
            for g in (0, 70, 129):
                w[g, g % n] = value
            got, truth = (prox(w, backend=backend, **options) for backend in ("cpu", "reference"))
            assert torch.equal(got.isnan(), truth.isnan()) and torch.equal(got.isinf(), truth.isinf())
            others = torch.ones(130, dtype=torch.bool).index_fill_(0, torch.tensor([0, 70, 129]), False)
            assert torch.equal(got[others], before[others])


@each_value(dtype=DTYPES, layout=LAYOUTS)
def test_nothing_beside_the_tensor_is_touched(layout, dtype):
    """A step in the middle of a larger memory leaves the rest of it alone."""
    for n in SIZES:
        shape, dims = LAYOUTS[layout](n, 77)
        size = torch.Size(shape).numel()
        memory = fresh((size + 64,), dtype)
        inside, outside = memory[32 : 32 + size].view(shape), [memory[:32], memory[32 + size :]]
        kept = [x.clone() for x in outside]
        got = one_step(
            "cpu", inside, fresh(shape, dtype), place=lambda x: x, **training(inside, dims, "exact")
        )
        assert got[0].data_ptr() == inside.data_ptr()
        assert all(torch.equal(a, b) for a, b in zip(outside, kept))
