"""The CUDA executor's tiles: what a block reads and writes and in which order, its bits, limits and edges.

That they are right, over all specs, modes and dtypes, is in test_executors.py.
"""

import itertools

import pytest
import torch
from helpers import emulated
from helpers.cuda import (
    GENERAL,
    PENALTY,
    PLAIN,
    give_grads,
    on_emulator,
    optimizer_of,
    parameter,
    parameters_of,
    path_of,
)
from helpers.right import DTYPES, MODES, check_step, coefficients, fresh, training
from helpers.tiers import covering

from cges_kernels import ProxSGD
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout

BACKEND = "cuda"
pytestmark = pytest.mark.skipif(
    "cuda" not in BUILT, reason="the extension is built without the CUDA executor"
)
# Of each kind of tile one or two: columns of whole accesses, of odd lengths, more than a block's threads can
# span; adjacent columns of one group, odd and even; matrices side by side; rows too long for registers; no
# groups at all.
TILES = [
    ("feature", (64, 48)),
    ("feature", (131, 67)),
    ("feature", (3, 1500)),
    ("channel", (24, 16, 3, 3)),
    ("channel", (9, 5, 3, 3)),
    ((1,), (7, 30, 12)),
    ((1,), (30, 3, 5)),
    ("filter", (3, 2052)),
    ("tensor", (90, 73)),
    ("feature", (3000,)),
]
FREEZES_GROUPS = dict(momentum=0.9, freeze_zeros="group")


def model(dtype=torch.float32, offset=0, tiles=TILES):
    return [{"params": [parameter(shape, dtype, offset)], "group_by": spec} for spec, shape in tiles]


def counts(shape, spec, dtype=torch.float32):
    """How many tiles a tensor is cut into."""
    layout = grouped_layout(torch.empty(shape, dtype=dtype), spec, None)
    return BUILT["cuda"].cuda_paths([layout], (torch.float32, torch.float64).index(dtype), 0)[1]


def reads_of(accesses, tensor):
    """Rows of `accesses` that read this tensor."""
    begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.numel() * tensor.itemsize
    return accesses[(accesses[:, 0] >= begin) & (accesses[:, 0] < end) & (accesses[:, 2] == 0)]


@on_emulator
def test_these_are_tiles():
    for dtype, (spec, shape) in itertools.product(DTYPES, TILES[:-1]):
        assert path_of(shape, spec, dtype) == {"tile"}, (shape, dtype)


# What is read and written


@on_emulator
@covering(offset=[0, 1], options=[PLAIN, *GENERAL], dtype=DTYPES)
def test_each_byte_is_read_once_and_written_once(device, options, dtype, offset):
    """But for buffers of frozen groups: that these are dead is known only when all of them has been read."""
    groups = model(dtype, offset)
    optimizer = optimizer_of(groups, **options)
    params = parameters_of(groups)
    for step in range(2):
        give_grads(params, dtype, offset)
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
            give_grads([p], dtype)
            accesses = device.accesses(optimizer.step)
        read = reads_of(accesses, p.detach())
        assert (read[:, 1] == unit).all() and (read[:, 0] % unit == 0).all(), (shape, unit)


def pieces(accesses, tensor):
    """What a block reads of a row in one go: (block, where the row begins, where the piece does, its end)."""
    read = reads_of(accesses, tensor)
    thread = read[:, 3] * 1024 + read[:, 4]
    order = thread.argsort(stable=True)
    _, counts = thread.unique(return_counts=True)
    turn = torch.empty_like(order)
    turn[order] = torch.cat([torch.arange(int(n)) for n in counts])  # of each thread's reads, which one
    pitch = tensor[0].numel() * tensor.itemsize
    row = (read[:, 0] - tensor.data_ptr()) // pitch
    keys, which = torch.stack([read[:, 3], turn, row], 1).unique(dim=0, return_inverse=True)
    begin = torch.full((len(keys),), 2**62).scatter_reduce(0, which, read[:, 0], "amin")
    end = torch.zeros(len(keys), dtype=torch.int64).scatter_reduce(0, which, read[:, 0] + read[:, 1], "amax")
    size = torch.zeros(len(keys), dtype=torch.int64).scatter_add(0, which, read[:, 1])
    assert torch.equal(size, end - begin)  # without gaps
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
    """Or 128, where all rows fit only then. The last panel of a row has what is left."""
    p = parameter((rows // (2 if dtype == torch.bfloat16 else 1), *columns), dtype)
    assert path_of(p.shape, spec, dtype) == {"tile"}
    optimizer = optimizer_of([p], group_by=spec, **PLAIN)
    give_grads([p], dtype)
    _, first, begin, end = pieces(device.accesses(optimizer.step), p.detach()).T
    last = end - first == p[0].numel() * p.itemsize
    assert (end - begin >= least)[~last].all() and (least == 256 or (end - begin < 256).all())
    assert (begin - first)[last].unique().numel() == 1


@on_emulator
def test_blocks_beside_each_other_work_beside_each_other(device):
    """From their first tiles on, and back again."""
    p = parameter((256, 64 * 20))
    optimizer = optimizer_of([p], group_by="feature", **PLAIN)
    give_grads([p])
    found = pieces(device.accesses(optimizer.step), p.detach())
    place = (found[:, 2] - found[:, 1]) // 256
    of_block = [sorted(set(place[found[:, 0] == block].tolist())) for block in range(8)]
    assert found[:, 0].max() == 7  # as many as are resident
    assert of_block == [[b, 15 - b] + [16 + b] * (b < 4) for b in range(8)]


# Bits


@on_emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("options", [PLAIN, *GENERAL[1:]], ids=str)
def test_same_bits_whatever_is_resident_in_every_order(device, options, dtype):
    start = [fresh(shape, dtype) for _, shape in TILES]
    grads = [[fresh(shape, dtype) for _, shape in TILES] for _ in range(2)]
    results = []
    for resident, in_flight in ((1, 1), (1, 7), (2, 16), (12, 3)):
        device["seed"], device["blocks_in_flight"] = resident, in_flight
        device["shared_memory_per_multiprocessor"] = 228 << 10
        device["multiprocessors"] = 4
        params = [torch.nn.Parameter(x.clone()) for x in start]
        groups = [{"params": [p], "group_by": spec} for p, (spec, _) in zip(params, TILES)]
        # what is resident is asked for when the plan is made, after all has been cut
        device["shared_memory_per_multiprocessor"] = resident * (228 << 10)
        optimizer = optimizer_of(groups, **options)
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = grad.clone()
            optimizer.step()
        results.append([p.detach() for p in params])
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))
    assert any(0 < x.count_nonzero() < x.numel() for x in results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", [PLAIN, *GENERAL], ids=str)
def test_same_bits_at_any_address(options, dtype):
    results = []
    start = [parameter(shape, dtype).detach() for _, shape in TILES]
    grads = [[fresh(shape, dtype) for _, shape in TILES] for _ in range(2)]
    for offset in (0, 1, 2, 3):
        groups = model(dtype, offset)
        params = parameters_of(groups)
        for p, x in zip(params, start):
            p.data.copy_(x)
        optimizer = optimizer_of(groups, **options)
        for step in grads:
            for p, grad in zip(params, step):
                p.grad = parameter(p.shape, dtype, offset).detach().copy_(grad)
            optimizer.step()
        results.append([p.detach().clone() for p in params])
    for other in results[1:]:
        for x, y, (_, shape) in zip(results[0], other, TILES):
            assert torch.equal(x, y), shape


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("neighbour", GENERAL, ids=str)
def test_same_bits_beside_whoever_takes_the_general_path(neighbour, dtype):
    """Alone, a plain step has a kernel of its own. A neighbour's tile comes before, between and after."""
    start = [fresh(shape, dtype) for _, shape in TILES]
    grads = [[fresh(shape, dtype) for _, shape in TILES] for _ in range(2)]
    results = []
    for others in ([], [(40, 8), (64, 48), (20, 400)]):
        params = [torch.nn.Parameter(x.clone()) for x in start]
        groups = [{"params": [p], "group_by": spec} for p, (spec, _) in zip(params, TILES)]
        beside = [parameter(shape, dtype) for shape in others]
        more = [{"params": beside, "group_by": "feature", **neighbour}] if beside else []
        optimizer = optimizer_of([*groups, *more], **PLAIN)
        for step in grads:
            give_grads(beside, dtype)
            for p, grad in zip(params, step):
                p.grad = grad.clone()
            optimizer.step()
        results.append([p.detach() for p in params])
    assert all(torch.equal(x, y) for x, y in zip(*results))


# Limits


@on_emulator
@covering(dtype=[torch.float32, torch.float64, torch.bfloat16], kilobytes=[227, 163, 99], prox_mode=MODES)
def test_less_shared_memory(device, dtype, kilobytes, prox_mode):
    """An H100's, an A100's and a consumer card's: tiles hold fewer rows, and the ring has fewer slots."""
    device["shared_memory_per_multiprocessor"] = (kilobytes + 1) << 10
    device["shared_memory_per_block"] = kilobytes << 10
    for spec, shape in (("feature", (700, 40)), ("channel", (300, 8, 3, 3)), ("filter", (2, 9000))):
        w, grad, buf = (fresh(shape, dtype) for _ in range(3))
        check_step(BACKEND, w, grad, buf, **training(w, spec, prox_mode))


@on_emulator
@pytest.mark.full("tiles and blocks of the size that a GPU has; builds the kernels once more")
def test_how_large_tiles_are_on_a_gpu(monkeypatch):
    """Which rows of 128 bytes, and which groups in one run, a block holds."""
    monkeypatch.setitem(BUILT, "cuda", emulated.load(256))
    for dtype, rows, longest in ((torch.float32, 1344, 43_008), (torch.bfloat16, 640, 40_960)):
        assert path_of((rows, 512), "feature", dtype) == {"tile"}
        assert path_of((rows + 1, 512), "feature", dtype) == {"shared"}
        assert path_of((rows // 2, 200), "feature", dtype) == {"tile"}
        assert path_of((2, longest), "filter", dtype) == {"tile"}
        assert path_of((2, longest + 8), "filter", dtype) == {"shared"}


@on_emulator
@pytest.mark.full("tiles and blocks of the size that a GPU has; builds the kernels once more")
def test_how_many_tiles_there_are_on_a_gpu(monkeypatch, device):
    """Columns of 256 bytes, 128 or 64; more of them in low tensors; several small matrices in one."""
    module = emulated.load(256)
    monkeypatch.setitem(BUILT, "cuda", module)
    gpu = emulated.Device(module.__file__)
    gpu["multiprocessors"] = 132
    expected = {
        (512, 4608): 72,  # 256 bytes: every other multiprocessor has one
        (1000, 16384): 512,  # 128, where all rows fit only then
        (1000, 1000): 63,  # 64, since there would be 16 tiles
        (256, 1024): 32,
        (64, 65536): 256,  # wide ones, of 16,384 elements
        (16, 640): 2,
    }
    try:
        for shape, tiles in expected.items():
            assert counts(shape, "feature") == tiles, shape
        assert counts((3750, 8, 9), (1,)) == 130  # of 29 matrices each
    finally:
        gpu.reset()


@on_emulator
@pytest.mark.full("tiles and blocks of the size that a GPU has; builds the kernels once more")
@pytest.mark.parametrize("options", [PLAIN, GENERAL[1], FREEZES_GROUPS], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_blocks_of_512_threads(monkeypatch, dtype, options):
    """As on a GPU."""
    monkeypatch.setitem(BUILT, "cuda", emulated.load(256))
    for spec, shape in (
        *(("feature", (512, 160)), ("feature", (1100, 40)), ("feature", (131, 147))),
        *(("channel", (140, 40, 3, 3)), ("filter", (2, 20_000))),
    ):
        w, grad, buf = (fresh(shape, dtype) for _ in range(3))
        w[:, ::3] = 0.0
        check_step(BACKEND, w, grad, buf, lr=0.5, **options, **coefficients(w, spec))


# Edges


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("prox_mode", MODES)
def test_every_count_of_rows_and_columns(prox_mode, dtype):
    """Of passes that end early, and vectors that are not full."""
    shapes = [(rows, 20) for rows in (1, 2, 3, 25, 26, 49, 50, 51, 101)]
    shapes += [(12, columns) for columns in (*range(1, 18), 31, 33, 63, 65)]
    for shape in shapes:
        w, grad, buf = (fresh(shape, dtype) for _ in range(3))
        check_step(BACKEND, w, grad, buf, **training(w, "feature", prox_mode))


def test_tensors_without_a_gradient_keep_their_bits_between_others():
    groups = model()
    optimizer = optimizer_of(groups, **PLAIN)
    params = parameters_of(groups)
    for skipped in (slice(0, None, 2), slice(1, None, 2), slice(0, None)):
        give_grads(params)
        for p in params[skipped]:
            p.grad = None
        before = [p.detach().clone() for p in params]
        optimizer.step()
        for i, (p, x) in enumerate(zip(params, before)):
            assert torch.equal(p, x) == (i in range(*skipped.indices(len(params)))), p.shape


@covering(offset=[0, 1], momentum=[0.0, 0.9], dtype=DTYPES)
def test_frozen_groups_stay_dead_and_forget_their_buffer(offset, momentum, dtype):
    for nan in (False, True):
        groups = [g for g in model(dtype, offset) if g["params"][0].dim() > 1]
        params = parameters_of(groups)
        optimizer = optimizer_of(groups, momentum=momentum, freeze_zeros="group", prox_mode="exact")
        dead = []
        for group, p in zip(groups, params):
            p.data += 1.0  # nothing is zero but one group
            index = {"feature": (..., 2), "channel": (slice(None), 2), "filter": (2,), "tensor": (...,)}
            at = index.get(group["group_by"], (slice(None), slice(None), 2))
            p.data[at] = 0.0
            dead.append(at)
        for _ in range(2):
            give_grads(params, dtype, offset)
            for p in params:
                p.grad.add_(float("nan") if nan else 1.0)
            optimizer.step()
        for p, at in zip(params, dead):
            assert not p[at].any() and not p[at].signbit().any(), p.shape
            if momentum:
                assert not optimizer.state[p]["momentum_buffer"][at].any(), p.shape
                if not nan and p[at].numel() < p.numel():
                    assert optimizer.state[p]["momentum_buffer"].count_nonzero() > 0.9 * (
                        p.numel() - p[at].numel()
                    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_without_coefficients_w_is_z_bit_for_bit(momentum, dtype):
    options = dict(lr=0.1, momentum=momentum, backend=BACKEND)
    groups = model(dtype)
    params = parameters_of(groups)
    for p in params:
        p.data.view(-1)[::3] = -0.0
        p.data.view(-1)[1] = float("inf")
    optimizer = ProxSGD(groups, **options)
    before = [p.detach().clone() for p in params]
    for _ in range(2):
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, w in zip(params, before):
        assert torch.equal(p, w) and torch.equal(p.signbit(), w.signbit()), p.shape


def test_zeros_of_tensors_without_groups_keep_their_sign_where_there_is_no_l1():
    """Beside tensors with groups, whose coefficients are in the same param group."""
    results = []
    w, columns = torch.tensor([-0.0, 0.0, 1.0, -2.0] * 5), fresh((64, 48))
    for backend in (BACKEND, "reference"):
        params = [torch.nn.Parameter(x.clone()) for x in (w, columns)]
        optimizer = ProxSGD(params, lr=0.1, momentum=0.9, group_lasso=0.3, backend=backend)
        for _ in range(2):
            for p in params:
                p.grad = torch.zeros_like(p)
            optimizer.step()
        results.append(params[0].detach())
    assert torch.equal(*results) and torch.equal(*(x.signbit() for x in results))


@pytest.mark.parametrize("what", ["lr", "group_lasso", "exclusive_lasso", "l1"])
def test_numbers_in_device_memory(what):
    results = []
    for number in (lambda x: x, torch.tensor):
        torch.manual_seed(3)
        groups = model()
        options = {"lr": 0.1, **PENALTY}
        options[what] = number(options[what])
        optimizer = optimizer_of(groups, **PLAIN, **options, capturable=True)
        give_grads(parameters_of(groups))
        optimizer.step()
        optimizer.step()
        results.append([p.detach() for p in parameters_of(groups)])
    for x, y in zip(*results):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)


def test_an_overflow_of_the_loss_scale_changes_nothing():
    groups = model()
    params = parameters_of(groups)
    optimizer = optimizer_of(groups, **PLAIN)
    give_grads(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.found_inf = torch.tensor(1.0)
    optimizer.grad_scale = torch.tensor(2.0)
    optimizer.step()
    assert all(torch.equal(p, x) for p, x in zip(params, before))
