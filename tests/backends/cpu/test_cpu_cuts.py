"""How the CPU executor cuts tensors into tiles: all ways are right, bits depend on no thread or address.

A tile is a block of rows and columns that one thread works on. It holds whole groups, such as all rows of a
panel of neighbouring columns, or a piece of large groups, whose sums are added up over the pieces.
"""

import itertools
import os
from functools import partial

import pytest
import torch
from helpers.memory import Case, peak_extra_memory
from helpers.right import DTYPES, MODES, SPECS, check_step, coefficients, fresh, inputs, one_step, training
from helpers.tiers import covering, each_value

from bench.lab import l2_bytes
from cges_kernels import ProxSGD, prox
from cges_kernels.backends.extension import BUILT

# Columns of 256 rows or more are cut into pieces. Those of the first shape are cut into panels.
TALL = [(255, 1024), (257, 1024), (2100, 1024), (520, 4096), (600, 128, 2, 4)]
# Shapes that are cut in different ways.
CUTS = [(200, 3000), (300, 200), (17000, 33), (400, 90, 5, 5), (2000, 160), *TALL]
LINE = 64
LARGE = partial(
    pytest.param,
    marks=pytest.mark.full(
        "rows and numbers of sums beyond all that a thread keeps; that takes millions of elements"
    ),
)


@pytest.mark.usefixtures("poisoned_memory")
@covering(
    shape=[(420, 160), (140, 480)],
    dtype=DTYPES,
    freeze_zeros=[None, "group", "element"],
    prox_mode=MODES,
)
def test_dead_columns(shape, dtype, freeze_zeros, prox_mode):
    """Frozen columns stay 0 whether z is kept in w, in scratch memory, or is computed anew in each pass."""
    w, grad, buf = inputs(shape, dtype)
    w[:, 1::2] = 0.0
    for held in (buf, None):
        options = training(w, "feature", prox_mode)
        got, _ = check_step("cpu", w, grad, held, freeze_zeros=freeze_zeros, **options)
        assert got[:, 1::2].any() == (freeze_zeros is None) and got[:, ::2].any()


@pytest.mark.usefixtures("poisoned_memory")
@each_value(shape=TALL, dtype=DTYPES, prox_mode=MODES)
def test_tall_columns(shape, dtype, prox_mode):
    """Columns above and below the limit for pieces are right in each dtype, with and without a buffer."""
    rows, columns, *kernel = shape
    w, grad, buf = inputs((rows, columns * 4 // dtype.itemsize, *kernel), dtype)
    for group_by in ["feature", "channel"][: 1 + bool(kernel)]:
        for held in (buf, None):
            check_step("cpu", w, grad, held, **training(w, group_by, prox_mode))


@each_value(view=[(3, 600, 1024), (2, 513, 2048)], prox_mode=MODES)
def test_many_matrices_of_tall_columns(view, prox_mode):
    """The same where a tensor holds several matrices of such columns."""
    w, grad, buf = inputs(view, torch.float32)
    check_step("cpu", w, grad, buf, **training(w, (1,), prox_mode))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("shape", [(140, 9000), LARGE((140, 40_000)), LARGE((17_000, 600))], ids=str)
def test_rows_longer_than_a_piece_and_more_sums_than_are_kept(shape):
    """Rows are right that are longer than a piece, and so many columns that a thread cannot keep all sums."""
    w, grad, buf = inputs(shape, torch.float32)
    check_step("cpu", w, grad, buf, **training(w, "feature", "sequential"))


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_frozen_elements_of_long_runs(dtype, prox_mode):
    """Frozen elements of groups cut into pieces stay 0."""
    w, grad, buf = inputs((3, 70_000), dtype)
    w[:, ::3] = 0.0
    got, _ = check_step("cpu", w, grad, buf, freeze_zeros="element", **training(w, "filter", prox_mode))
    assert not got[:, ::3].any() and got.any()


def test_groups_that_fill_the_l2():
    """Groups of just about the size of the L2 cache are right."""
    for columns in (2300, 2621):  # sizes for an L2 cache of 1 MB
        w, grad, buf = inputs((100, 2, columns), torch.float32)
        check_step("cpu", w, grad, buf, **training(w, "channel", "exact"))


@pytest.mark.parametrize("rows", [3, 100])
def test_an_exclusive_lasso_beyond_all_bounds(backend, rows):
    """A coefficient of 1e20 overflows nothing in exact mode."""
    w = fresh((rows, 8))
    got = prox(w, exclusive_lasso=1e20, group_by="feature", prox_mode="exact", backend=backend)
    truth = prox(w.double(), exclusive_lasso=1e20, group_by="feature", prox_mode="exact", backend="reference")
    assert torch.allclose(got.double(), truth, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "options", [dict(nesterov=True, weight_decay=0.1), dict(dampening=0.5, maximize=True)]
)
def test_update_rules_of_tall_columns(options):
    """Options of SGD act in pieces as elsewhere."""
    w, grad, buf = inputs((520, 1024), torch.float32)
    check_step("cpu", w, grad, buf, **training(w, "feature", "sequential"), **options)


@each_value(shape=TALL, freeze_zeros=["group", "element"], penalty=[True, False])
def test_frozen_tall_columns(shape, freeze_zeros, penalty):
    """A column is frozen only if all of its pieces are zero."""
    w, grad, buf = inputs(shape, torch.float32)
    w[torch.rand(shape) < 0.3] = 0.0
    w[:, 1::2] = 0.0
    w[:-1, 2], w[-1, 2] = 0.0, 1.0  # alive by its last row only, which is in another piece than the first
    for prox_mode, held in itertools.product(MODES, (buf, None)):
        options = training(w, "feature", prox_mode)
        if not penalty:
            options |= dict(group_lasso=0.0, exclusive_lasso=0.0, l1=0.0)
        got, got_buf = check_step("cpu", w, grad, held, freeze_zeros=freeze_zeros, **options)
        assert not got[:, 1::2].any() and not got_buf[:, 1::2].any() and got[:, 4::2].any()
        assert penalty or got[:, 2].any()


def test_prox_alone_of_tall_columns():
    """prox gives the bits of a step with a zero gradient."""
    for shape in TALL:
        w = fresh(shape)
        options = coefficients(w, "feature")
        expected, _ = check_step("cpu", w, torch.zeros_like(w), None, lr=1.0, **options)
        assert torch.equal(prox(w, backend="cpu", **options), expected)


@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_nan_and_inf_of_tall_columns(poison, prox_mode):
    """NaN and infinities show as in the reference and stay in their column."""
    w = fresh((520, 1024))
    w[300, 11] = poison
    options = coefficients(w, "feature") | {"prox_mode": prox_mode}
    for without in ({}, {"group_lasso": 0.0}):
        got, expected = (prox(w, **options | without, backend=name) for name in ("cpu", "reference"))
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
        assert not got[:, 11].isfinite().all()
        assert got[:, :11].isfinite().all() and got[:, 12:].isfinite().all()


@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("group_by", SPECS)
def test_same_bits_whatever_the_threads(group_by, prox_mode, threads):
    """1, 2, 3 and 64 threads give the same bits for every cut."""
    for shape in CUTS:
        w, grad, buf = inputs(shape, torch.float32)
        results = []
        for count in (1, 2, 3, 64):
            threads(count)
            results.append(one_step("cpu", w, grad, buf, **training(w, group_by, prox_mode)))
        for got, got_buf in results[1:]:
            assert torch.equal(got, results[0][0]) and torch.equal(got_buf, results[0][1])
        assert 0 < results[0][0].count_nonzero() < w.numel()


@pytest.mark.parametrize("count", [2, 64])
def test_tensors_that_share_passes_step_as_each_alone(threads, count):
    """Tensors cut into pieces that are worked on together get the bits that each gets alone.

    Their dtypes, modes and numbers of sweeps differ, and some columns are dead and frozen.
    """
    if "cpu" not in BUILT:
        pytest.skip("the CPU executor is not built")
    threads(count)
    members = list(itertools.product([(300, 250), (2100, 40)], DTYPES, MODES, [None, "group"]))
    states, alone, groups = [], [], []
    for shape, dtype, prox_mode, freeze_zeros in members:
        w, grad, buf = inputs(shape, dtype)
        w[:, ::3] = 0.0
        options = training(w, "feature", prox_mode) | {"freeze_zeros": freeze_zeros}
        states.append((w, grad, buf))
        alone.append(one_step("cpu", w, grad, buf, **options))
        groups.append({"params": [torch.nn.Parameter(w.clone())], **options})
    optimizer = ProxSGD(groups, backend="cpu")
    for group, (_, grad, buf) in zip(optimizer.param_groups, states):
        (p,) = group["params"]
        p.grad = grad.clone()
        optimizer.state[p]["momentum_buffer"] = buf.clone()
    optimizer.step()
    for group, (expected, expected_buf) in zip(optimizer.param_groups, alone):
        (p,) = group["params"]
        assert torch.equal(p.detach(), expected)
        assert torch.equal(optimizer.state[p]["momentum_buffer"], expected_buf)


@each_value(shape=CUTS, dtype=[torch.float32, torch.float64, torch.float16], prox_mode=MODES)
def test_same_bits_wherever_the_tensor_begins(shape, dtype, prox_mode):
    """The place of a tensor's memory in a cache line changes no bit."""
    w, grad, buf = inputs(shape, dtype)
    options = training(w, "feature", prox_mode)
    line = LINE // dtype.itemsize

    def placed(offset):  # begins ``offset`` elements behind the beginning of a cache line
        def place(x):
            memory = torch.empty(x.numel() + 2 * line, dtype=dtype)
            begin = -(memory.data_ptr() // dtype.itemsize) % line + offset
            return memory[begin:][: x.numel()].view(x.shape).copy_(x)

        return place

    first, first_buf = check_step("cpu", w, grad, buf, **options)
    for offset in (0, 1, line // 2, line - 1):
        got, got_buf = one_step("cpu", w, grad, buf, placed(offset), **options)
        assert torch.equal(got, first) and torch.equal(got_buf, first_buf)


@pytest.mark.full("a step's scratch memory is bounded; to measure it takes large tensors")
@covering(shape=[(4096, 1056), (20_000, 1024)], prox_mode=MODES, dtype=["float32", "float64", "bfloat16"])
def test_scratch_is_at_most_the_l2_a_thread(shape, prox_mode, dtype):
    """A step takes at most an L2 cache of extra memory for each thread."""
    if "cpu" not in BUILT or not l2_bytes() or not os.access("/proc/self/clear_refs", os.W_OK):
        pytest.skip("the CPU executor is not built, or nobody tells of the L2 and of memory")
    (taken,) = peak_extra_memory(
        1, (Case(*shape, prox_mode, dtype),)
    ).values()  # memory that threads share counts once
    assert taken <= max(l2_bytes(), (1024 + 128) << 10)  # the 128 KiB are for what is not scratch
