"""Which path of the CUDA executor serves a tensor, as its size and the device say, and in how many launches.

Without a GPU its kernels run on the CPU (emulated.py), where a test also rules the device. That it is right,
over all specs, modes and dtypes, is in test_executors.py.
"""

import copy

import pytest
import torch
from helpers.cuda import BACKEND, PENALTY, SHARED, TICKET, TILE, needs_cuda, on_emulator, paths, trained
from helpers.right import DTYPES, MODES, SPECS, check_step, fresh, training
from helpers.steps import give_grads, parameters
from helpers.tiers import covering

from cges_kernels import ProxSGD
from cges_kernels.backends.extension import BUILT

pytestmark = needs_cuda

# Paths


@on_emulator
@pytest.mark.usefixtures("little_memory")
def test_each_shape_takes_the_path_that_its_size_says(device):
    for shape, path in zip((TILE, SHARED, TICKET), (1, 2, 3)):
        counts = paths(shape)
        assert [i for i in range(4) if counts[i]] == [path], (shape, counts)
    device["cooperative_launch"] = 0
    assert paths(SHARED)[2] == 0 and paths(SHARED)[3] > 0


@covering(shape=[SHARED, TICKET, (3, 5000), (40, 3, 70)], group_by=SPECS, prox_mode=MODES, dtype=DTYPES)
@pytest.mark.usefixtures("little_memory", "poisoned_memory")
@on_emulator
def test_a_device_without_cooperative_launches(device, shape, group_by, prox_mode, dtype):
    device["cooperative_launch"] = 0
    assert paths(shape, group_by, dtype)[2] == 0
    w, grad, buf = (fresh(shape, dtype) for _ in range(3))
    check_step(BACKEND, w, grad, buf, **training(w, group_by, prox_mode))


@on_emulator
def test_a_device_with_too_few_multiprocessors(device):
    """Such as a part of a partitioned GPU: fewer blocks run at once than a panel has parts."""
    shape = (5000, 32)
    assert paths(shape)[2] > 0
    device["multiprocessors"] = 2
    assert paths(shape)[2] == 0 and paths(shape)[3] > 0
    w, grad = fresh(shape), fresh(shape)
    check_step(BACKEND, w, grad, None, **training(w, "feature", "sequential"))


@on_emulator
def test_less_shared_memory_is_used_where_there_is_less(device):
    """What is chosen fits: a launch that asks for more than the device has would fail."""
    w, grad = fresh((500, 40)), fresh((500, 40))
    for size in (233_472, 102_400, 65_536):
        device["shared_memory_per_multiprocessor"] = size
        device["shared_memory_per_block"] = size - 1024
        check_step(BACKEND, w, grad, None, **training(w, "feature", "exact"))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("freeze_zeros", [None, "group"])
@pytest.mark.parametrize("prox_mode", MODES)
def test_one_small_step_of_every_path(prox_mode, freeze_zeros):
    """Two of them, rather: the second one finds the counters as the first has left them."""
    for group_by, shapes in (
        ("feature", [TILE, SHARED, TICKET]),
        ("filter", [(40, 9), (2, 700), (3, 7000)]),
    ):
        options = dict(steps=2, group_by=group_by, prox_mode=prox_mode, freeze_zeros=freeze_zeros)
        assert all(x.isfinite().all() for x in trained(shapes, **options))


@pytest.mark.parametrize(("rows", "columns"), [(2**31, 2), (2**32 + 4, 2), (2**33, 1)])
def test_no_count_overflows(rows, columns):
    """Groups beyond 32-bit counts are cut into chunks, as many as it takes for all of their elements."""
    strips, tiles, shared, chunks = BUILT["cuda"].cuda_paths([(1, rows, columns, 3, True)], 2, 0)
    assert strips == tiles == shared == 0 and chunks * 16384 >= rows * columns * 3


# Launches


@on_emulator
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("shapes", "dtypes", "expected"),
    [
        ([TILE, (7,), (3, 40)], [torch.float32], 1),
        ([TILE, TICKET], [torch.float32], 2),
        ([TILE, SHARED, TICKET], [torch.float32], 2),
        ([SHARED], [torch.float32], 1),
        ([TILE, SHARED], [torch.float32, torch.bfloat16], 2),
        ([(2, 2)] * 1001, [torch.float32], 2),  # a launch's arguments hold 1,000 tensors
    ],
)
def test_one_launch_for_each_dtype_and_path(device, shapes, dtypes, expected):
    params = [p for dtype in dtypes for p in parameters(shapes, dtype)]
    optimizer = ProxSGD(params, lr=0.1, backend=BACKEND, prox_mode="exact", **PENALTY)
    for step in range(2):
        give_grads(params, step)
        device["launches"] = 0
        optimizer.step()
        assert device["launches"] == expected


@on_emulator
def test_many_param_groups_take_few_launches(device):
    """Some 90 rows of coefficients fit a launch."""
    params = parameters([(3, 2)] * 400, torch.float32)
    groups = [{"params": [p], "l1": 1e-3 * i} for i, p in enumerate(params)]
    give_grads(params, 0)
    expected = copy.deepcopy(params)
    for p, q in zip(params, expected):
        q.grad = p.grad.clone()
    ProxSGD(groups, lr=0.1, backend=BACKEND).step()
    assert device["launches"] == 5
    for i, p in enumerate(expected):
        ProxSGD([p], lr=0.1, l1=1e-3 * i, backend="reference").step()
    torch.testing.assert_close(params, expected)


@on_emulator
def test_nothing_to_do_launches_nothing(device):
    optimizer = ProxSGD(parameters([(0, 3)], torch.float32), lr=0.1, backend=BACKEND)
    give_grads(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert device["launches"] == 0
