"""The CUDA executor's kernels for rows: what they read and write, and in how many launches.

That their results are right for all specs, modes and dtypes is tested in test_executors.py.
"""

import pytest
import torch
from helpers import emulated
from helpers.cuda import (
    BACKEND,
    GENERAL,
    PLAIN,
    ROWS,
    most,
    needs_cuda,
    on_emulator,
    optimizer_of,
    parameter,
    path_of,
    rows,
)
from helpers.right import DTYPES, MODES, MOMENTA, check_step, coefficients, fresh
from helpers.tiers import covering

from cges_kernels import prox
from cges_kernels.backends.extension import BUILT

pytestmark = needs_cuda

# What is read and written


@on_emulator
@covering(offset=[0, 1], options=[PLAIN, *GENERAL], dtype=DTYPES)
def test_each_byte_is_read_once_and_written_once(device, options, dtype, offset):
    """No byte of weights, gradients and buffers is read or written twice, nor left out."""
    params = [parameter(shape, dtype, offset) for shape in rows(dtype)]
    assert set.union(*(path_of(p.shape, dtype=dtype) for p in params)) == {"rows"}
    optimizer = optimizer_of(params, **options)
    for step in range(2):
        for p in params:
            p.grad = parameter(p.shape, dtype, offset).detach()
        accesses = device.accesses(optimizer.step)
        for p in params:
            buf = optimizer.state[p].get("momentum_buffer") if options["momentum"] else None
            expected = [(p, 1, 1), (p.grad, 1, 0)]
            expected += [] if buf is None else [(buf, int(step > 0), 1)]
            for x, reads, writes in expected:
                got_reads, got_writes = emulated.traffic(accesses, x.detach())
                assert (got_reads == reads).all() and (got_writes == writes).all(), (p.shape, step)


@on_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_prox_alone_reads_and_writes_weights_alone(device, dtype):
    """prox reads and writes each byte of its copy once, and nothing else."""
    w = parameter((33, 136), dtype).detach()
    options = dict(group_lasso=0.3, group_by="filter", backend=BACKEND)
    read, written = (x.sum() for x in emulated.traffic(device.accesses(lambda: prox(w, **options)), w))
    assert (read, written) == (0, 0)  # prox works on a copy
    accesses = device.accesses(lambda: prox(w, **options))
    size = w.numel() * w.itemsize
    for write in (0, 1):
        assert accesses[accesses[:, 2] == write, 1].sum() == size


@on_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [PLAIN, GENERAL[0]], ids=str)
def test_accesses_are_of_16_bytes_wherever_groups_are(device, options, dtype):
    """Aligned rows whose length allows it are accessed by 16 bytes only."""
    params = [parameter(shape, dtype) for shape in ((70, 8), (9, 48), (5, 512), (80,))]
    optimizer = optimizer_of(params, **options)
    for _ in range(2):
        for p in params:
            p.grad = torch.randn_like(p)
        accesses = device.accesses(optimizer.step)
        assert (accesses[:, 1] == 16).all() and (accesses[:, 0] % 16 == 0).all()


@on_emulator
def test_lanes_side_by_side_touch_neighbours(device):
    """Neighbouring threads access neighbouring 16 bytes, so that a warp reads whole cache lines."""
    p = parameter((4, 512))
    optimizer = optimizer_of([p], **PLAIN)
    p.grad = torch.randn_like(p)
    accesses = device.accesses(optimizer.step)
    of_w = accesses[(accesses[:, 0] >= p.data_ptr()) & (accesses[:, 0] < p.data_ptr() + 4 * p.numel())]
    first = of_w[(of_w[:, 3] == 0) & (of_w[:, 4] == 0) & (of_w[:, 2] == 0)][0, 0]
    for thread in range(8):
        mine = of_w[(of_w[:, 3] == 0) & (of_w[:, 4] == thread) & (of_w[:, 2] == 0)]
        assert mine[0, 0] == first + 16 * thread


@on_emulator
@pytest.mark.parametrize("options", [PLAIN, GENERAL[0]], ids=str)
@pytest.mark.parametrize("odd", ["w", "grad", "buf"])
def test_whichever_tensor_is_off_16_bytes_no_access_is_misaligned(device, odd, options):
    """One misaligned tensor among weight, gradient and buffer causes no misaligned access."""
    p, grad, buf = (parameter((9, 48), offset=int(odd == name)) for name in ("w", "grad", "buf"))
    optimizer = optimizer_of([p], **options)
    optimizer.state[p]["momentum_buffer"] = buf.detach()
    p.grad = grad.detach()
    accesses = device.accesses(optimizer.step)
    assert len(accesses) and (accesses[:, 0] % accesses[:, 1] == 0).all()


# Launches and paths


@on_emulator
@pytest.mark.parametrize("options", [PLAIN, GENERAL[1]], ids=str)
def test_one_launch_for_a_model_of_rows_and_elements(device, options):
    """Rows of all lengths and tensors without groups take one launch together."""
    params = [parameter(shape) for shape in [*ROWS, (3, 5), (1000,), (1,)]]
    optimizer = optimizer_of(params, **options)
    for _ in range(3):
        for p in params:
            p.grad = torch.randn_like(p)
        device["launches"] = 0
        optimizer.step()
        assert device["launches"] == 1


@on_emulator
def test_few_arguments_or_many_the_same_steps(device):
    """Launches with small arguments and with large ones, as 200 tensors need, give the same bits."""
    shapes = [(3, 8)] * 200
    w, grad = [fresh(shape) for shape in shapes], [fresh(shape) for shape in shapes]
    together = [torch.nn.Parameter(x.clone()) for x in w]
    alone = [torch.nn.Parameter(x.clone()) for x in w]
    for params in (together, *([p] for p in alone)):
        optimizer = optimizer_of(params, **PLAIN)
        for _ in range(2):
            for p in params:
                i = next(i for i, x in enumerate([*together, *alone]) if x is p) % 200
                p.grad = grad[i].clone()
            device["launches"] = 0
            optimizer.step()
            assert device["launches"] == 1
    assert all(torch.equal(x, y) for x, y in zip(together, alone))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_taken_up_to_what_registers_hold(dtype):
    """The longest row that fits registers takes this path, one more element does not, and both are right."""
    longest = most(dtype)
    for n in (1, 2, longest - 1, longest):
        assert path_of((3, n), dtype=dtype) == {"rows"}
    assert "rows" not in path_of((3, longest + 1), dtype=dtype)
    for n in (longest - 1, longest, longest + 1):
        w, grad, buf = (fresh((3, n), dtype) for _ in range(3))
        options = dict(lr=0.5, momentum=0.9, **coefficients(w, "filter"))
        check_step(BACKEND, w, grad, buf, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prox_mode", MODES)
def test_every_length_of_short_rows(prox_mode, dtype):
    """Every way to share rows among threads is right, at lengths around its limits."""
    for n in (*range(1, 35), 63, 64, 65, 127, 128, 129, 255, 257, 511, 513):
        w, grad, buf = (fresh((5, n), dtype) for _ in range(3))
        options = dict(lr=0.5, momentum=0.9, prox_mode=prox_mode, **coefficients(w, "filter"))
        check_step(BACKEND, w, grad, buf, **options)


@covering(
    shape=[(9, 48), (7, 9), (300, 1), (77,)], rule=MOMENTA, weight_decay=[0.0, 0.1], maximize=[False, True]
)
def test_update_rules(shape, rule, weight_decay, maximize):
    """Each option of SGD is right in these kernels."""
    momentum, dampening, nesterov = rule
    w, grad, buf = (fresh(shape) for _ in range(3))
    options = dict(lr=0.3, momentum=momentum, dampening=dampening, nesterov=nesterov)
    options |= dict(weight_decay=weight_decay, maximize=maximize, **coefficients(w, "filter"))
    check_step(BACKEND, w, grad, buf if momentum else None, **options)


@on_emulator
def test_a_plain_step_has_all_loads_under_way_before_it_writes(device):
    """A plain step takes the plain path, which issues all reads before its writes.

    The general path reads and writes by turns.
    """
    p = parameter((3, 1024))
    for options, plain in ((PLAIN, True), (GENERAL[0], False)):
        optimizer = optimizer_of([p], **options)
        for _ in range(2):
            p.grad = torch.randn_like(p)
            accesses = device.accesses(optimizer.step)
        for thread in range(emulated.THREADS):
            writes = accesses[(accesses[:, 3] == 0) & (accesses[:, 4] == thread), 2]
            # all accesses to w, gradient and buffer
            assert len(writes) == 20 and (writes.diff() >= 0).all() == plain


@on_emulator
@pytest.mark.full(
    "blocks of a GPU's size, with several groups of several warps each; that builds the kernels once more"
)
@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("freeze_zeros", [None, "group"])
def test_blocks_of_256_threads(monkeypatch, freeze_zeros, prox_mode):
    """Steps are right in blocks that hold several groups of several warps each, as on a GPU."""
    monkeypatch.setitem(BUILT, "cuda", emulated.load(256))
    assert path_of((3, 4096)) == {"rows"}
    for shape in ((5, 512), (9, 1024), (3, 2048), (2, 4096), (130, 64)):
        w, grad, buf = (fresh(shape) for _ in range(3))
        w[::2] = 0.0
        options = dict(lr=0.5, momentum=0.9, prox_mode=prox_mode, **coefficients(w, "filter"))
        check_step(BACKEND, w, grad, buf, freeze_zeros=freeze_zeros, **options)
