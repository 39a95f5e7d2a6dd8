"""Which path of the CUDA executor serves a tensor, by its size and the device, and in how many launches.

Without a GPU its kernels run on the emulator (helpers/emulated.py), where a test also controls the device.
That its results are right for all specs, modes and dtypes is tested in test_executors.py.
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
    """TILE, SHARED and TICKET take one path each; without cooperative launches SHARED goes by tickets."""
    for shape, path in zip((TILE, SHARED, TICKET), (1, 2, 3)):
        counts = paths(shape)
        assert [i for i in range(4) if counts[i]] == [path], (shape, counts)
    device["cooperative_launch"] = 0
    assert paths(SHARED)[2] == 0 and paths(SHARED)[3] > 0


@covering(shape=[SHARED, TICKET, (3, 5000), (40, 3, 70)], group_by=SPECS, prox_mode=MODES, dtype=DTYPES)
@pytest.mark.usefixtures("little_memory", "poisoned_memory")
@on_emulator
def test_a_device_without_cooperative_launches(device, shape, group_by, prox_mode, dtype):
    """Steps are right on a device where blocks may not wait for each other."""
    device["cooperative_launch"] = 0
    assert paths(shape, group_by, dtype)[2] == 0
    w, grad, buf = (fresh(shape, dtype) for _ in range(3))
    check_step(BACKEND, w, grad, buf, **training(w, group_by, prox_mode))


@on_emulator
def test_a_device_with_too_few_multiprocessors(device):
    """Where fewer blocks run at once than a panel has parts, the tensor goes by tickets.

    A part of a partitioned GPU is such a device.
    """
    shape = (5000, 32)
    assert paths(shape)[2] > 0
    device["multiprocessors"] = 2
    assert paths(shape)[2] == 0 and paths(shape)[3] > 0
    w, grad = fresh(shape), fresh(shape)
    check_step(BACKEND, w, grad, None, **training(w, "feature", "sequential"))


@on_emulator
def test_less_shared_memory_is_used_where_there_is_less(device):
    """On a device with less shared memory no launch asks for more than there is."""
    w, grad = fresh((500, 40)), fresh((500, 40))
    for size in (233_472, 102_400, 65_536):
        device["shared_memory_per_multiprocessor"] = size
        device["shared_memory_per_block"] = size - 1024
        check_step(BACKEND, w, grad, None, **training(w, "feature", "exact"))


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("freeze_zeros", [None, "group"])
@pytest.mark.parametrize("prox_mode", MODES)
def test_one_small_step_of_every_path(prox_mode, freeze_zeros):
    """Two steps by every path leave finite numbers; the second finds counters as the first has left them."""
    for group_by, shapes in (
        ("feature", [TILE, SHARED, TICKET]),
        ("filter", [(40, 9), (2, 700), (3, 7000)]),
    ):
        options = dict(steps=2, group_by=group_by, prox_mode=prox_mode, freeze_zeros=freeze_zeros)
        assert all(x.isfinite().all() for x in trained(shapes, **options))


@pytest.mark.parametrize(("rows", "columns"), [(2**31, 2), (2**32 + 4, 2), (2**33, 1)])
def test_no_count_overflows(rows, columns):
    """Groups beyond 32-bit counts are cut into enough chunks for all of their elements.

    The rows lie at and beyond 2^31 and 2^32, so that 32-bit numbers would be negative, small, or 0.
    """
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
    """A step makes exactly one launch for each dtype and path, and more only for more than 1,000 tensors."""
    params = [p for dtype in dtypes for p in parameters(shapes, dtype)]
    optimizer = ProxSGD(params, lr=0.1, backend=BACKEND, prox_mode="exact", **PENALTY)
    for step in range(2):
        give_grads(params, step)
        device["launches"] = 0
        optimizer.step()
        assert device["launches"] == expected


@on_emulator
def test_many_param_groups_take_few_launches(device):
    """A launch takes some 90 param groups, and each parameter gets its own group's coefficients."""
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
    """Empty tensors cause no launch."""
    optimizer = ProxSGD(parameters([(0, 3)], torch.float32), lr=0.1, backend=BACKEND)
    give_grads(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert device["launches"] == 0
