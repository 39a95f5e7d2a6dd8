"""What the CUDA executor says when it cannot serve or a launch fails; and tests that need a real GPU.

Without a GPU its kernels run on the emulator (helpers/emulated.py), where a test also controls the device.
That its results are right for all specs, modes and dtypes is tested in test_executors.py.
"""

import re

import pytest
import torch
from helpers.cuda import (
    BACKEND,
    PENALTY,
    TICKET,
    TILE,
    assert_same_bits_and_some_zeros,
    needs_cuda,
    on_emulator,
    paths_together,
    trained,
)
from helpers.right import MODES, coefficients
from helpers.steps import give_grads, parameters

from cges_kernels import ProxSGD, prox, prox_
from cges_kernels.backends.extension import BUILT

pytestmark = needs_cuda

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
    """The error names the versions and says to update the driver.

    One driver is of an older major version; the other is older than CUDA 12.1, which large kernel arguments
    need.
    """
    device["driver_version"], device["runtime_version"] = driver, runtime
    with pytest.raises(RuntimeError, match=said):
        ProxSGD(parameters([TILE], torch.float32), lr=0.1, backend=BACKEND)


@on_emulator
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize(
    ("failing", "said"),
    [(1, "no parameter has changed"), (2, "some parameters have been stepped and others not")],
)
def test_a_launch_that_fails_says_what_it_left(device, failing, said):
    """The error says whether some parameters have already been stepped, and no momentum was begun."""
    params = parameters([TILE, TICKET], torch.float32)
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
    """The launches of all dtypes count for that."""
    params = [p for dtype in (torch.float32, torch.bfloat16) for p in parameters([TILE], dtype)]
    optimizer = ProxSGD(params, lr=0.1, backend=BACKEND, **PENALTY)
    give_grads(params, 0)
    device["fail_launch"] = 2
    with pytest.raises(RuntimeError, match="some parameters have been stepped and others not"):
        optimizer.step()


def test_an_extension_without_it_says_how_to_get_it(monkeypatch):
    """Without the CUDA executor the error says to install nvcc."""
    monkeypatch.delitem(BUILT, "cuda")
    with pytest.raises(RuntimeError, match="install nvcc"):
        ProxSGD(parameters([TILE], torch.float32), backend=BACKEND)


# On a GPU


@pytest.fixture
def large():
    """Shapes that take rows, tiles and tickets on a real GPU."""
    return [(4096, 512), (512, 512, 3, 3), (1000, 2048), (64,), (50_000, 256)]


@pytest.mark.gpu
def test_the_profiler_sees_the_launches(large):
    """A step is as many kernel launches as paths are needed, and runs nothing else on the GPU."""
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
    """From the second step on nothing is allocated, and the host never waits for the GPU."""
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
    """Replays of a CUDA graph give the bits of plain steps."""
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
    """Steps of two optimizers on two streams do not disturb each other.

    Everything is made beforehand, so that nothing orders the two streams.
    """
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
        assert_same_bits_and_some_zeros([x.detach() for x in result], expected)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("group_by", "part"),
    [("feature", (slice(None), slice(-8, None))), ("filter", (slice(-4, None), slice(None)))],
    ids=["feature", "filter"],
)
def test_more_elements_than_32_bits_count(group_by, part):
    """The last groups of more than 2^31 elements are those of the reference on them alone."""
    w = torch.randn((2**16 + 3, 2**15 + 8), device="cuda", dtype=torch.bfloat16)
    options = dict(coefficients(w, group_by), prox_mode="sequential")
    expected = prox(w[part].cpu().contiguous(), backend="reference", **options)
    prox_([w], backend=BACKEND, **options)
    assert 0 < expected.count_nonzero() < expected.numel()
    torch.testing.assert_close(w[part].cpu(), expected)
