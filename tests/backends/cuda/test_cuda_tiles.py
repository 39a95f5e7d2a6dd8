"""The CUDA executor's tiles: what a block reads and writes and in which order, and limits of the device.

A tile holds some columns of a tensor, with all of their rows, in one block's shared memory. That results are
right for all specs, modes and dtypes is tested in test_executors.py.
"""

import itertools

import pytest
import torch
from helpers import emulated
from helpers.cuda import (
    BACKEND,
    GENERAL,
    PLAIN,
    TILES,
    give_grads_at,
    model,
    needs_cuda,
    on_emulator,
    optimizer_of,
    parameter,
    parameters_of,
    path_of,
)
from helpers.right import DTYPES, MODES, check_step, coefficients, fresh, training
from helpers.tiers import covering

from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout

pytestmark = needs_cuda
FREEZES_GROUPS = dict(momentum=0.9, freeze_zeros="group")


def counts(shape, spec, dtype=torch.float32):
    """The number of tiles into which a tensor is cut."""
    layout = grouped_layout(torch.empty(shape, dtype=dtype), spec, None)
    return BUILT["cuda"].cuda_paths([layout], (torch.float32, torch.float64).index(dtype), 0)[1]


def reads_of(accesses, tensor):
    """The rows of `accesses` that read this tensor."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
    return accesses[(accesses[:, 0] >= begin) & (accesses[:, 0] < end) & (accesses[:, 2] == 0)]


@on_emulator
def test_these_are_tiles():
    """TILES take this path, so that the tests below test it; the last of them has no groups."""
    for dtype, (spec, shape) in itertools.product(DTYPES, TILES[:-1]):
        assert path_of(shape, spec, dtype) == {"tile"}, (shape, dtype)


# What is read and written


@on_emulator
@covering(offset=[0, 1], options=[PLAIN, *GENERAL], dtype=DTYPES)
def test_each_byte_is_read_once_and_written_once(device, options, dtype, offset):
    """No byte is read or written twice, nor left out.

    Buffers of frozen groups are an exception: that a group is dead is known only after all of it has been
    read.
    """
    groups = model(dtype, offset)
    optimizer = optimizer_of(groups, **options)
    params = parameters_of(groups)
    for step in range(2):
        give_grads_at(params, dtype, offset)
        accesses = device.accesses(optimizer.step)
        for p in params:
            buf = optimizer.state[p].get("momentum_buffer") if options["momentum"] else None
            expected = [(p, 1, 1), (p.grad, 1, 0)]
            expected += [] if buf is None else [(buf, int(step > 0), 1)]
            for x, reads, writes in expected:
                got_reads, got_writes = emulated.traffic(accesses, x.detach())
                assert (got_reads == reads).all(), (p.shape, step)
                if x is buf and options == FREEZES_GROUPS:
                    got_writes = got_writes.clamp(max=1)
                assert (got_writes == writes).all(), (p.shape, step)


@on_emulator
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [PLAIN, GENERAL[0]], ids=str)
def test_accesses_are_as_wide_as_addresses_allow(device, options, dtype):
    """Rows are read by 16, 8 or 4 bytes or single elements, as their length allows."""
    size = torch.empty((), dtype=dtype).itemsize
    for shape, unit in (
        ((64, 48), 16),
        ((20, 48 + 8 // size), 8),
        ((20, 48 + 4 // min(size, 4)), 4),
        ((20, 47), 2),
    ):
        unit = max(unit, size)
        p = parameter(shape, dtype)
        optimizer = optimizer_of([p], group_by="feature", **options)
        for _ in range(2):
            give_grads_at([p], dtype)
            accesses = device.accesses(optimizer.step)
        read = reads_of(accesses, p.detach())
        assert (read[:, 1] == unit).all() and (read[:, 0] % unit == 0).all(), (shape, unit)


def pieces(accesses, tensor):
    """What a block reads of a row at once: (block, address of the row, address of the piece, its end)."""
    read = reads_of(accesses, tensor)
    thread = read[:, 3] * 1024 + read[:, 4]
    order = thread.argsort(stable=True)
    _, counts = thread.unique(return_counts=True)
    turn = torch.empty_like(order)
    # the number of a read among its thread's reads
    turn[order] = torch.cat([torch.arange(int(n)) for n in counts])
    pitch = tensor[0].numel() * tensor.itemsize
    row = (read[:, 0] - tensor.data_ptr()) // pitch
    keys, which = torch.stack([read[:, 3], turn, row], 1).unique(dim=0, return_inverse=True)
    begin = torch.full((len(keys),), 2**62).scatter_reduce(0, which, read[:, 0], "amin")
    end = torch.zeros(len(keys), dtype=torch.int64).scatter_reduce(0, which, read[:, 0] + read[:, 1], "amax")
    size = torch.zeros(len(keys), dtype=torch.int64).scatter_add(0, which, read[:, 1])
    assert torch.equal(size, end - begin)  # a piece has no gaps
    first = tensor.data_ptr() + keys[:, 2] * pitch
    return torch.stack([keys[:, 0], first, begin, end], 1)


@on_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("spec", "columns", "rows", "least"),
    [
        *(("feature", (160,), 100, 256), ("feature", (160,), 1600, 128)),
        *(("channel", (40, 3, 3), 100, 256), ("channel", (40, 3, 3), 1400, 128)),
    ],
)
def test_a_block_reads_256_bytes_of_each_row_at_once(device, spec, columns, rows, least, dtype):
    """A block reads 256 bytes of a row at once, or 128 where all rows fit only then.

    Fewer bytes at once would waste memory bandwidth.

    The last panel of a row has what is left.
    """
    p = parameter((rows // (2 if dtype == torch.bfloat16 else 1), *columns), dtype)
    assert path_of(p.shape, spec, dtype) == {"tile"}
    optimizer = optimizer_of([p], group_by=spec, **PLAIN)
    give_grads_at([p], dtype)
    _, first, begin, end = pieces(device.accesses(optimizer.step), p.detach()).T
    last = end - first == p[0].numel() * p.itemsize
    assert (end - begin >= least)[~last].all() and (least == 256 or (end - begin < 256).all())
    assert (begin - first)[last].unique().numel() == 1


@on_emulator
def test_blocks_beside_each_other_work_beside_each_other(device):
    """Neighbouring blocks read neighbouring columns at the same time, from left to right and back."""
    p = parameter((256, 64 * 20))
    optimizer = optimizer_of([p], group_by="feature", **PLAIN)
    give_grads_at([p])
    found = pieces(device.accesses(optimizer.step), p.detach())
    place = (found[:, 2] - found[:, 1]) // 256
    of_block = [sorted(set(place[found[:, 0] == block].tolist())) for block in range(8)]
    assert found[:, 0].max() == 7  # as many blocks as run at once
    assert of_block == [[b, 15 - b] + [16 + b] * (b < 4) for b in range(8)]


# Limits


@on_emulator
@covering(dtype=[torch.float32, torch.float64, torch.bfloat16], kilobytes=[227, 163, 99], prox_mode=MODES)
def test_less_shared_memory(device, dtype, kilobytes, prox_mode):
    """Steps are right with the shared memory of an H100, an A100 and a consumer card.

    With less of it tiles hold fewer rows, and the ring of copies has fewer slots.
    """
    device["shared_memory_per_multiprocessor"] = (kilobytes + 1) << 10
    device["shared_memory_per_block"] = kilobytes << 10
    for spec, shape in (("feature", (700, 40)), ("channel", (300, 8, 3, 3)), ("filter", (2, 9000))):
        w, grad, buf = (fresh(shape, dtype) for _ in range(3))
        check_step(BACKEND, w, grad, buf, **training(w, spec, prox_mode))


@on_emulator
@pytest.mark.full("tiles and blocks have the size that they have on a GPU; that builds the kernels once more")
def test_how_large_tiles_are_on_a_gpu(monkeypatch):
    """The most rows of 128 bytes, and the longest contiguous group, that a block holds."""
    monkeypatch.setitem(BUILT, "cuda", emulated.load(256))
    for dtype, rows, longest in ((torch.float32, 1344, 43_008), (torch.bfloat16, 640, 40_960)):
        assert path_of((rows, 512), "feature", dtype) == {"tile"}
        assert path_of((rows + 1, 512), "feature", dtype) == {"shared"}
        assert path_of((rows // 2, 200), "feature", dtype) == {"tile"}
        assert path_of((2, longest), "filter", dtype) == {"tile"}
        assert path_of((2, longest + 8), "filter", dtype) == {"shared"}


@on_emulator
@pytest.mark.full("tiles and blocks have the size that they have on a GPU; that builds the kernels once more")
def test_how_many_tiles_there_are_on_a_gpu(monkeypatch, device):
    """Tiles are narrow where there would be too few, and wide in low tensors.

    Small matrices share a tile.
    """
    module = emulated.load(256)
    monkeypatch.setitem(BUILT, "cuda", module)
    gpu = emulated.Device(module.__file__)
    gpu["multiprocessors"] = 132
    expected = {
        (512, 4608): 72,  # columns of 256 bytes: every other multiprocessor has one
        (1000, 16384): 512,  # 128 bytes, because all rows fit only then
        (1000, 1000): 63,  # 64 bytes, since there would be 16 tiles of 256
        (256, 1024): 32,
        (64, 65536): 256,  # wide tiles of 16,384 elements
        (16, 640): 2,
    }
    try:
        for shape, tiles in expected.items():
            assert counts(shape, "feature") == tiles, shape
        assert counts((3750, 8, 9), (1,)) == 130  # tiles of 29 matrices each
    finally:
        gpu.reset()


@on_emulator
@pytest.mark.full("tiles and blocks have the size that they have on a GPU; that builds the kernels once more")
@pytest.mark.parametrize("options", [PLAIN, GENERAL[1], FREEZES_GROUPS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_512_threads(monkeypatch, dtype, options):
    """Steps are right in blocks of a GPU's size."""
    monkeypatch.setitem(BUILT, "cuda", emulated.load(256))
    for spec, shape in (
        *(("feature", (512, 160)), ("feature", (1100, 40)), ("feature", (131, 147))),
        *(("channel", (140, 40, 3, 3)), ("filter", (2, 20_000))),
    ):
        w, grad, buf = (fresh(shape, dtype) for _ in range(3))
        w[:, ::3] = 0.0
        check_step(BACKEND, w, grad, buf, lr=0.5, **options, **coefficients(w, spec))
