"""How the CPU executor cuts tensors into tiles: every way is right, and no bit of the result tells of it."""

import pytest
import torch
from right import SPECS, check_step, fresh, one_step
from test_executors import MODES, coefficients, inputs, training

from cges_kernels import prox

PAGES = [  # rows a multiple of 4 KB apart, which are streamed: [rows, columns] of float32
    (513, 1024),
    (2100, 1024),
    (600, 128, 2, 4),
]
PANELS = (2000, 160)  # three panels, their rows whole pairs of cache lines
CUTS = [(500, 600), (17000, 33), (40, 9, 5, 5), PANELS, *PAGES]


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("group_by", ["feature", "channel", (0,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", PAGES, ids=str)
def test_rows_pages_apart(shape, dtype, group_by, prox_mode):
    rows, columns, *kernel = shape
    w, grad, buf = inputs((rows, columns * 4 // dtype.itemsize, *kernel), dtype)
    for held in (buf, None):
        check_step("cpu", w, grad, held, **training(w, group_by, prox_mode))


@pytest.mark.parametrize("freeze_zeros", ["group", "element"])
@pytest.mark.parametrize("shape", PAGES, ids=str)
def test_frozen_rows_pages_apart(shape, freeze_zeros):
    w, grad, buf = inputs(shape, torch.float32)
    w[torch.rand(shape) < 0.3] = 0.0
    w[:, 1::2] = 0.0
    got, got_buf = check_step(
        "cpu", w, grad, buf, freeze_zeros=freeze_zeros, **training(w, "feature", "sequential")
    )
    assert not got[:, 1::2].any() and not got_buf[:, 1::2].any() and got[:, ::2].any()


@pytest.mark.parametrize("shape", PAGES, ids=str)
def test_prox_alone_of_rows_pages_apart(shape):
    w = fresh(shape)
    options = coefficients(w, "feature")
    expected, _ = check_step("cpu", w, torch.zeros_like(w), None, lr=1.0, **options)
    assert torch.equal(prox(w, backend="cpu", **options), expected)


@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("group_by", SPECS)
@pytest.mark.parametrize("shape", CUTS, ids=str)
def test_same_bits_whatever_the_threads(shape, group_by, prox_mode, threads):
    w, grad, buf = inputs(shape, torch.float32)
    results = []
    for count in (1, 2, 3):
        threads(count)
        results.append(one_step("cpu", w, grad, buf, **training(w, group_by, prox_mode)))
    for got, got_buf in results[1:]:
        assert torch.equal(got, results[0][0]) and torch.equal(got_buf, results[0][1])
    assert 0 < results[0][0].count_nonzero() < w.numel()


@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16], ids=str)
@pytest.mark.parametrize("shape", CUTS, ids=str)
def test_same_bits_wherever_the_tensor_begins(shape, dtype, prox_mode):
    """Panels begin where pairs of cache lines do: at other columns, if the tensor begins elsewhere."""
    w, grad, buf = inputs(shape, dtype)
    options = training(w, "feature", prox_mode)

    def placed(offset):  # so many elements behind the beginning of a pair
        def place(x):
            memory = torch.empty(x.numel() + 96, dtype=dtype)
            begin = -(memory.data_ptr() // dtype.itemsize) % 32 + offset
            return memory[begin:][: x.numel()].view(x.shape).copy_(x)

        return place

    first, first_buf = check_step("cpu", w, grad, buf, **options)
    for offset in (0, 1, 16, 17, 31):
        got, got_buf = one_step("cpu", w, grad, buf, placed(offset), **options)
        assert torch.equal(got, first) and torch.equal(got_buf, first_buf)
