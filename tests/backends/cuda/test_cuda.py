"""What is the CUDA executor's own: paths, launches, block order, limits of the device, failures.

Without a GPU its kernels run on the CPU (emulated.py), where a test also rules the device. That it is right,
over all specs, modes and dtypes, is in test_executors.py.
"""

import copy
import itertools
import re

import pytest
import torch
from helpers import emulated
from helpers.emulated import limit_device
from helpers.right import DTYPES, INTERPRETED, MODES, SPECS, check_step, coefficients, fresh, training
from helpers.tiers import covering

from cges_kernels import ProxSGD, prox, prox_
from cges_kernels.backends import registry, unplanned
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout

BACKEND = "cuda"
pytestmark = pytest.mark.skipif(
    "cuda" not in BUILT, reason="the extension is built without the CUDA executor"
)
on_emulator = pytest.mark.skipif(not INTERPRETED, reason="rules the device, which only the emulator allows")
PENALTY = dict(group_lasso=0.3, exclusive_lasso=0.001, l1=0.02)
LIMIT = 9000  # bytes of shared memory: shapes below then take a path each
TILE, SHARED, TICKET = (16, 12), (150, 20), (900, 20)


@pytest.fixture
def device():
    found = emulated.Device(BUILT["cuda"].__file__)
    registry._why_not_device.cache_clear()
    yield found
    found.reset()
    registry._why_not_device.cache_clear()


@pytest.fixture
def little_memory():
    limit_device(shared_bytes=LIMIT if INTERPRETED else 36_000, multiprocessors=4)
    yield
    limit_device()


def paths(shape, group_by="feature", dtype=torch.float32):
    """How many blocks work on a tensor by each path: (rows, tile, shared, ticket)."""
    return paths_together([shape], group_by, dtype)


def paths_together(shapes, group_by="feature", dtype=torch.float32):
    layouts = [grouped_layout(torch.empty(shape, dtype=dtype), group_by, None) for shape in shapes]
    number = (torch.float32, torch.float64, torch.bfloat16, torch.float16).index(dtype)
    return BUILT["cuda"].cuda_paths(layouts, number, 0)


def parameters(shapes, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    return [torch.nn.Parameter(fresh(shape, dtype, generator)) for shape in shapes]


def give_grads(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for p in params:
        p.grad = fresh(p.shape, p.dtype, generator)


def trained(shapes, steps=3, dtype=torch.float32, **options):
    """Parameters and buffers after some steps from the same numbers."""
    params = parameters(shapes, dtype)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, backend=BACKEND, **{**PENALTY, **options})
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return [x.detach().clone() for p in params for x in (p, optimizer.state[p]["momentum_buffer"])]


def assert_same_bits(xs, ys):
    assert all(torch.equal(x, y) for x, y in zip(xs, ys, strict=True))
    assert any(0 < x.count_nonzero() < x.numel() for x in xs)


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
    params = parameters([(3, 2)] * 400)
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
    optimizer = ProxSGD(parameters([(0, 3)]), lr=0.1, backend=BACKEND)
    give_grads(optimizer.param_groups[0]["params"], 0)
    optimizer.step()
    assert device["launches"] == 0


# Bits


@on_emulator
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_order_of_blocks(device, dtype, prox_mode):
    results = []
    for seed, in_flight in itertools.product((1, 2, 3), (1, 4, 64)):
        device["seed"], device["blocks_in_flight"] = seed, in_flight
        results.append(trained([TILE, SHARED, TICKET, (2, 3000)], dtype=dtype, prox_mode=prox_mode))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("prox_mode", MODES)
def test_same_bits_whatever_the_neighbours(prox_mode):
    shapes = [TICKET, TILE, SHARED, (2, 3000), (31,)]
    together = trained(shapes, prox_mode=prox_mode)
    generator = torch.Generator().manual_seed(7)
    values = [fresh(shape, torch.float32, generator) for shape in shapes]
    for i in range(len(shapes)):
        p = torch.nn.Parameter(values[i].clone())
        optimizer = ProxSGD([p], lr=0.1, momentum=0.9, backend=BACKEND, prox_mode=prox_mode, **PENALTY)
        for step in range(3):
            generator = torch.Generator().manual_seed(100 + step)
            p.grad = [fresh(shape, torch.float32, generator) for shape in shapes][i]
            optimizer.step()
        assert torch.equal(p, together[2 * i])


@on_emulator
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("prox_mode", MODES)
def test_windows_of_the_l2_change_no_bit(device, prox_mode):
    results = []
    for l2_bytes in (50 << 20, 1 << 20):
        device["l2_bytes"] = l2_bytes
        results.append(trained([TICKET, (2100, 28), (1500, 20)], prox_mode=prox_mode))
    assert_same_bits(*results)


# Steps after one another


@pytest.mark.usefixtures("little_memory")
def test_whatever_changes_between_steps_the_reference_agrees():
    """Counters and scratch serve step after step, of whatever mode; gradients come and go, in new memory."""
    changes = [
        *({}, dict.fromkeys(PENALTY, 0.0), dict(PENALTY), dict(freeze_zeros="group")),
        *(
            dict(prox_mode="exact"),
            dict(exclusive_lasso=0.0),
            dict(freeze_zeros="element", exclusive_lasso=0.002),
        ),
        *(dict(prox_mode="sequential", freeze_zeros=None), dict(momentum=0), dict(momentum=0.5, l1=0.0)),
    ]
    shapes = [TILE, SHARED, TICKET, (40,), (30, 9), (3, 900)]
    everyone = [parameters(shapes, torch.float64) for _ in range(2)]
    for params in everyone:
        for p in params[:3]:
            p.data[:, 1] = 0.0
    pair = []
    for params, backend in zip(everyone, (BACKEND, "reference")):
        groups = [{"params": params[:4]}, {"params": params[4:], "group_by": "filter"}]
        pair.append(ProxSGD(groups, lr=0.1, momentum=0.9, backend=backend, **PENALTY))
    for step, change in enumerate(changes):
        for params, optimizer in zip(everyone, pair):
            optimizer.param_groups[0].update(change)
            optimizer.param_groups[1].update(changes[step - 3])  # another mode in the same launch
            give_grads(params, step)
            params[step % 5].grad = None
            optimizer.step()
        for got, expected in zip(*everyone):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
            assert torch.equal(got == 0, expected == 0)


@on_emulator
def test_prox_keeps_its_plans(device):
    """A second call with the same shapes makes no new tables; another order of them is another plan."""
    first, second = [fresh((30, 20)), fresh((3, 50))], [fresh((3, 50)), fresh((30, 20))]
    for tensors in (first, second, first, second):
        expected = [w.clone() for w in tensors]
        prox_(tensors, backend=BACKEND, **PENALTY)
        prox_(expected, backend="reference", **PENALTY)
        torch.testing.assert_close(tensors, expected)


@on_emulator
def test_what_a_graph_comes_back_to_is_kept_for_good(monkeypatch):
    made = []
    monkeypatch.setattr(unplanned, "_kept", type(unplanned._kept)())
    monkeypatch.setattr(unplanned, "_in_graphs", {})
    make = unplanned._make
    monkeypatch.setattr(unplanned, "_make", lambda *args: made.append(make(*args)) or made[-1])

    def call(n):
        prox_([fresh((n, 2))], backend=BACKEND, **PENALTY)

    call(1)
    with monkeypatch.context() as patch:
        patch.setattr(unplanned, "is_capturing", lambda: True)
        call(1)
    for n in range(2, unplanned.MOST_KEPT + 4):
        call(n)
    count = len(made)
    assert count == unplanned.MOST_KEPT + 3 and len(unplanned._kept) == unplanned.MOST_KEPT
    with monkeypatch.context() as patch:  # a second capture makes no tables, which a capture could not
        patch.setattr(unplanned, "is_capturing", lambda: True)
        call(1)
    call(1)
    assert len(made) == count and list(unplanned._in_graphs.values()) == [made[0]]
    unplanned.forget()
    assert made[0] in unplanned._outlived
    call(1)
    assert len(made) == count + 1


@on_emulator
def test_kept_plans_are_of_the_present_limits(device):
    launches = []
    for limit in ({}, {"shared_bytes": LIMIT}):
        limit_device(**limit)
        device["launches"] = 0
        prox_([fresh(TILE), fresh(TICKET)], backend=BACKEND, **PENALTY)
        launches.append(device["launches"])
    limit_device()
    assert launches == [1, 2]


# Failures


@on_emulator
@pytest.mark.parametrize(
    ("driver", "runtime", "said"),
    [
        (12040, 13000, r"expected a driver for CUDA 13, found one for CUDA 12\.4; update"),
        (12000, 12080, r"expected a driver for CUDA 12\.1 or newer, .* found one for CUDA 12\.0; update"),
    ],
)
def test_a_driver_too_old_is_said_before_anything_is_written(device, driver, runtime, said):
    device["driver_version"], device["runtime_version"] = driver, runtime
    with pytest.raises(RuntimeError, match=said):
        ProxSGD(parameters([TILE]), lr=0.1, backend=BACKEND)


@on_emulator
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("failing", "said"),
    [(1, "no parameter has changed"), (2, "some parameters have been stepped and others not")],
)
def test_a_launch_that_fails_says_what_it_left(device, failing, said):
    params = parameters([TILE, TICKET])
    before = [p.detach().clone() for p in params]
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, backend=BACKEND, **PENALTY)
    give_grads(params, 0)
    device["fail_launch"] = failing
    with pytest.raises(RuntimeError, match=said):
        optimizer.step()
    assert torch.equal(params[0], before[0]) == (failing == 1) and torch.equal(params[1], before[1])
    assert not optimizer.state[params[0]]


@on_emulator
def test_a_failure_after_another_dtypes_launch_says_so(device):
    params = [p for dtype in (torch.float32, torch.bfloat16) for p in parameters([TILE], dtype)]
    optimizer = ProxSGD(params, lr=0.1, backend=BACKEND, **PENALTY)
    give_grads(params, 0)
    device["fail_launch"] = 2
    with pytest.raises(RuntimeError, match="some parameters have been stepped and others not"):
        optimizer.step()


def test_an_extension_without_it_says_how_to_get_it(monkeypatch):
    monkeypatch.delitem(BUILT, "cuda")
    with pytest.raises(RuntimeError, match="install nvcc"):
        ProxSGD(parameters([TILE]), backend=BACKEND)


# On a GPU


@pytest.fixture
def large():
    return [(4096, 512), (512, 512, 3, 3), (1000, 2048), (64,), (50_000, 256)]


@pytest.mark.gpu
def test_the_profiler_sees_the_launches(large):
    params = parameters(large)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, backend=BACKEND, **PENALTY)
    give_grads(params, 0)
    optimizer.step()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        optimizer.step()
        torch.cuda.synchronize()
    kernels = [e.key for e in profile.key_averages() if e.device_type == torch.autograd.DeviceType.CUDA]
    ours = [name for name in kernels if re.search("step_(rows|tiles|chunks)", name)]
    rows, tiles, shared, tickets = paths_together(large)
    assert len(ours) == bool(rows) + bool(tiles or shared) + bool(tickets)
    assert not [name for name in kernels if name not in ours and "emset" not in name]


@pytest.mark.gpu
def test_a_step_neither_waits_nor_allocates(large):
    params = parameters(large)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, backend=BACKEND, prox_mode="exact", **PENALTY)
    give_grads(params, 0)
    optimizer.step()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@pytest.mark.gpu
@pytest.mark.parametrize("prox_mode", MODES)
def test_a_captured_step_replays(large, prox_mode):
    params, others = parameters(large), parameters(large)
    pair = [
        ProxSGD(x, lr=0.1, momentum=0.9, backend=BACKEND, prox_mode=prox_mode, capturable=True, **PENALTY)
        for x in (params, others)
    ]
    for x in (params, others):
        give_grads(x, 0)
    for optimizer in pair:
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        pair[0].step()
    for _ in range(3):
        graph.replay()
        pair[1].step()
    assert all(torch.equal(p, q) for p, q in zip(params, others))


@pytest.mark.gpu
def test_two_streams_at_once(large):
    """Everything is made beforehand, so that nothing orders the two streams' steps."""
    expected = trained(large, steps=1)
    sets = [parameters(large) for _ in range(2)]
    optimizers = [ProxSGD(params, lr=0.1, momentum=0.9, backend=BACKEND, **PENALTY) for params in sets]
    for params in sets:
        give_grads(params, 0)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    torch.cuda.synchronize()
    for stream, optimizer in zip(streams, optimizers):
        with torch.cuda.stream(stream):
            optimizer.step()
    torch.cuda.synchronize()
    for params, optimizer in zip(sets, optimizers):
        result = [x for p in params for x in (p, optimizer.state[p]["momentum_buffer"])]
        assert_same_bits([x.detach() for x in result], expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group_by", "part"),
    [("feature", (slice(None), slice(-8, None))), ("filter", (slice(-4, None), slice(None)))],
    ids=["feature", "filter"],
)
def test_more_elements_than_32_bits_count(group_by, part):
    """The last groups of 2^31 elements and more, beside the reference on them alone."""
    w = torch.randn((2**16 + 3, 2**15 + 8), device="cuda", dtype=torch.bfloat16)
    options = dict(coefficients(w, group_by), prox_mode="sequential")
    expected = prox(w[part].cpu().contiguous(), backend="reference", **options)
    prox_([w], backend=BACKEND, **options)
    assert 0 < expected.count_nonzero() < expected.numel()
    torch.testing.assert_close(w[part].cpu(), expected)
