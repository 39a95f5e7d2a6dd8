"""Panels of the CUDA executor that several blocks share: the same bits in any order, and no endless wait.

A panel is a set of neighbouring columns, with all of their rows. Its parts lie in the shared memory of
several blocks, which wait for each other's sums. That results are right for all specs, modes and dtypes is
tested in test_executors.py, where panels count as large.
"""

import itertools
from functools import partial

import pytest
import torch
from helpers import cuda, emulated
from helpers.cuda import (
    BACKEND,
    GENERAL,
    PENALTY,
    PLAIN,
    give_grads_at,
    needs_cuda,
    on_emulator,
    optimizer_of,
    parameter,
    parameters_of,
    path_of,
)
from helpers.right import DTYPES, INTERPRETED, MODES, check_step, fresh, one_step, training
from helpers.tiers import covering, each_value

from cges_kernels import ProxSGD

pytestmark = needs_cuda

# Columns of whole vector accesses, of odd lengths, and fewer than a tile's; adjacent columns of one group;
# several matrices; long rows; the whole tensor. With so little memory and 8 multiprocessors each is a panel
# of 2 to 8 parts.
PANELS = [
    ("feature", (430, 136)),
    ("feature", (640, 67)),
    ("feature", (560, 20)),
    ("channel", (300, 16, 3, 3)),
    ((1,), (3, 400, 50)),
    ("filter", (3, 30_000)),
    ("tensor", (190, 147)),
]
LIMITS = {"shared_bytes": 40_000 if INTERPRETED else 160_000, "multiprocessors": 8}
model = partial(cuda.model, tiles=PANELS)


@pytest.fixture(autouse=True)
def little():
    """Limits the device by LIMITS."""
    emulated.limit_device(**LIMITS)
    yield
    emulated.limit_device()


@on_emulator
def test_these_are_shared(device):
    """PANELS take this path, so that the tests below test it."""
    device["multiprocessors"] = 8
    for dtype, (spec, shape) in itertools.product(DTYPES, PANELS):
        assert path_of(shape, spec, dtype) == {"shared"}, (shape, dtype)


@on_emulator
# only these three options, because each takes seconds
@each_value(dtype=DTYPES, options=[PLAIN, GENERAL[1], GENERAL[4]])
def test_each_byte_is_read_once_and_written_once(device, options, dtype):
    """A step is one launch, and no byte is read or written twice, nor left out."""
    device["multiprocessors"] = 8
    groups = model(dtype)
    optimizer = optimizer_of(groups, **options)
    for step in range(2):
        give_grads_at(parameters_of(groups), dtype)
        device["launches"] = 0
        accesses = device.accesses(optimizer.step)
        assert device["launches"] == 1
        for p in parameters_of(groups):
            buf = optimizer.state[p]["momentum_buffer"]
            for x, reads, writes in ((p, 1, 1), (p.grad, 1, 0), (buf, int(step > 0), 1)):
                got_reads, got_writes = emulated.traffic(accesses, x.detach())
                assert (got_reads == reads).all() and (got_writes == writes).all(), (p.shape, step)


@on_emulator
@covering(freeze_zeros=[None, "group"], prox_mode=MODES, dtype=DTYPES)
def test_right_step_after_step(device, freeze_zeros, prox_mode, dtype):
    """The second step, too, is right: it finds counters as the first has left them."""
    device["multiprocessors"] = 8
    for spec, shape in PANELS:
        for seed in (1, 2):
            device["seed"] = seed
            w, grad, buf = (fresh(shape, dtype) for _ in range(3))
            if freeze_zeros:
                w.view(shape[0], -1)[:, ::3] = 0.0
            check_step(BACKEND, w, grad, buf, freeze_zeros=freeze_zeros, **training(w, spec, prox_mode))


@on_emulator
@pytest.mark.parametrize("options", [PLAIN, *GENERAL[:2], GENERAL[3]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_whatever_is_resident_in_every_order(device, dtype, options):
    """The order of blocks, and how many run at once, change no bit.

    The fewest are as many as the tallest panel has parts, the least that the cut allows.
    """
    device["multiprocessors"] = 8
    start = [fresh(shape, dtype) for _, shape in PANELS]
    grads = [[fresh(shape, dtype) for _, shape in PANELS] for _ in range(2)]
    results = []
    for seed, resident in itertools.product((1, 2, 3), (1, 2, 5)):
        device["seed"] = seed
        device["shared_memory_per_multiprocessor"] = resident * (80 << 10)
        params = [torch.nn.Parameter(x.clone()) for x in start]
        groups = [{"params": [p], "group_by": spec} for p, (spec, _) in zip(params, PANELS)]
        optimizer = optimizer_of(groups, **options)
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = grad.clone()
            optimizer.step()
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))
    assert any(0 < x.count_nonzero() < x.numel() for x in results[0])


@on_emulator
@pytest.mark.parametrize("multiprocessors", range(2, 9))
def test_every_wait_ends_with_as_few_blocks_as_there_may_be(device, multiprocessors):
    """With few multiprocessors no block waits for one that cannot start.

    There are panels of more and of fewer parts than run at once, and tiles before and after them.
    """
    device["multiprocessors"] = multiprocessors
    device["shared_memory_per_multiprocessor"] = 90 << 10  # one block on each multiprocessor
    shapes = [(rows, columns) for rows in (140, 260, 380, 900) for columns in (40, 200, 700)]
    groups = model(tiles=[("feature", shape) for shape in [*shapes, (30, 40), (64,)]])
    optimizer = optimizer_of(groups, **PLAIN)
    expected = [torch.nn.Parameter(p.detach().clone()) for p in parameters_of(groups)]
    reference = ProxSGD(expected, lr=0.1, backend="reference", **PENALTY, **PLAIN)
    assert "shared" in set.union(*(path_of(shape, "feature") for shape in shapes))
    for seed in range(3):
        device["seed"] = seed
        for p, q in zip(parameters_of(groups), expected):
            p.grad = fresh(p.shape)
            q.grad = p.grad.clone()
        optimizer.step()
        reference.step()
    for p, q in zip(parameters_of(groups), expected):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@on_emulator
def test_plans_by_turns_and_gradients_that_come_and_go(device):
    """Another optimizer's steps in between, and missing gradients, leave no counter wrong."""
    device["multiprocessors"] = 8
    pair = []
    for _ in range(2):
        torch.manual_seed(5)
        pair.append(model(tiles=PANELS[:4]))
    alone, by_turns = (optimizer_of(groups, **PLAIN) for groups in pair)
    other = model(tiles=PANELS[1:5])
    beside = optimizer_of(other, prox_mode="exact", momentum=0.9)
    for step in range(5):
        grads = [fresh(p.shape) for p in parameters_of(pair[0])]
        grads[step % 4] = None
        for groups, optimizer in zip(pair, (alone, by_turns)):
            for p, grad in zip(parameters_of(groups), grads):
                p.grad = None if grad is None else grad.clone()
            optimizer.step()
            if optimizer is by_turns:
                give_grads_at(parameters_of(other))
                beside.step()
    for p, q in zip(*map(parameters_of, pair)):
        assert torch.equal(p, q)


@on_emulator
def test_a_step_that_overflows_leaves_the_counters_alone(device):
    """A skipped step changes no weight, and the steps after it work."""
    device["multiprocessors"] = 8
    groups = model()
    params = parameters_of(groups)
    optimizer = optimizer_of(groups, **PLAIN)
    for overflows in (0.0, 1.0, 0.0, 0.0):
        before = [p.detach().clone() for p in params]
        give_grads_at(params)
        optimizer.found_inf = torch.tensor(overflows)
        optimizer.grad_scale = torch.tensor(2.0)
        optimizer.step()
        for p, x in zip(params, before):
            assert torch.equal(p, x) == bool(overflows)


@on_emulator
def test_a_block_goes_on_while_it_waits(device):
    """A block loads as many rows of its next tile as fit before it writes the first one back."""
    device["multiprocessors"] = 4
    device["shared_memory_per_multiprocessor"] = 90 << 10
    p = parameter((400, 64 * 4))
    assert path_of(p.shape, "feature") == {"shared"}
    for options, rows in ((PLAIN, 4), (GENERAL[1], 0)):
        optimizer = optimizer_of([p], group_by="feature", **options)
        give_grads_at([p])
        optimizer.step()
        accesses = device.accesses(optimizer.step)
        buf = optimizer.state[p]["momentum_buffer"]
        for thread in (0, 77):
            writes = accesses[(accesses[:, 2] == 1) & (accesses[:, 3] == 1) & (accesses[:, 4] == thread), 0]
            of_w = (writes >= p.data_ptr()) & (writes < p.data_ptr() + 4 * p.numel())
            of_buf = (writes >= buf.data_ptr()) & (writes < buf.data_ptr() + 4 * p.numel())
            first_w = int(of_w.nonzero()[0])
            # rows loaded before that: of the first tile, then of the second
            taken_in = int(of_buf[:first_w].sum())
            of_first_tile = int(of_w.sum()) // 4
            assert (taken_in - of_first_tile >= rows) if rows else (taken_in == of_first_tile), taken_in


@on_emulator
@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_all_parts_of_its_group(device, value, prox_mode):
    """NaN and infinities show in all parts of a panel, as in the reference."""
    device["multiprocessors"] = 8
    w, grad, buf = (fresh((430, 136)) for _ in range(3))
    grad[3, 5], grad[400, 70] = value, -value
    options = training(w, "feature", prox_mode)
    got, expected = (one_step(x, w, grad, buf, **options)[0] for x in (BACKEND, "reference"))
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    assert got.isnan()[:, 5].any() or got.isinf()[:, 5].any()


@pytest.mark.gpu
def test_beside_kernels_that_hold_multiprocessors():
    """While other kernels occupy the GPU, steps neither hang nor change a bit.

    A cooperative launch starts all blocks at once or none, so that none waits for one outside.
    """
    emulated.limit_device()
    shapes = [(4096, 640), (50_000, 128), (300, 70)]
    start, grads = ([fresh(shape) for shape in shapes] for _ in range(2))
    side, matrix = torch.cuda.Stream(), torch.randn(8192, 8192)
    results = []
    for busy in (False, True, True):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = optimizer_of(params, group_by="feature", **PLAIN)
        for p, grad in zip(params, grads):
            p.grad = grad.clone()
        torch.cuda.synchronize()
        if busy:
            with torch.cuda.stream(side):
                torch.cuda._sleep(20_000_000)
                for _ in range(10):
                    matrix @ matrix
        for _ in range(5):
            optimizer.step()
        torch.cuda.synchronize()
        results.append([p.detach().clone() for p in params])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))
