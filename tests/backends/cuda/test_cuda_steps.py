"""Steps of the CUDA executor one after another: same bits, what may change in between, what is kept.

Without a GPU its kernels run on the emulator (helpers/emulated.py), where a test also controls the device.
That its results are right for all specs, modes and dtypes is tested in test_executors.py.
"""

import itertools

import pytest
import torch
from helpers.cuda import (
    BACKEND,
    LIMIT,
    PENALTY,
    SHARED,
    TICKET,
    TILE,
    assert_same_bits_and_some_zeros,
    needs_cuda,
    on_emulator,
    trained,
)
from helpers.emulated import limit_device
from helpers.right import MODES, fresh
from helpers.steps import give_grads, parameters, train

from cges_kernels import ProxSGD, prox_
from cges_kernels.backends import unplanned

pytestmark = needs_cuda

# Bits


@on_emulator
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("prox_mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_in_every_order_of_blocks(device, dtype, prox_mode):
    """The order of blocks, and how many run at once, change no bit on any path."""
    results = []
    for seed, in_flight in itertools.product((1, 2, 3), (1, 4, 64)):
        device["seed"], device["blocks_in_flight"] = seed, in_flight
        results.append(trained([TILE, SHARED, TICKET, (2, 3000)], dtype=dtype, prox_mode=prox_mode))
    for other in results[1:]:
        assert_same_bits_and_some_zeros(results[0], other)


@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("prox_mode", MODES)
def test_same_bits_whatever_the_neighbours(prox_mode):
    """A tensor gets the same bits alone as in a list with tensors of every path."""
    shapes = [TICKET, TILE, SHARED, (2, 3000), (31,)]
    together = trained(shapes, prox_mode=prox_mode)
    for i in range(len(shapes)):
        params = parameters(shapes, torch.float32)
        alone = ProxSGD([params[i]], lr=0.1, momentum=0.9, backend=BACKEND, prox_mode=prox_mode, **PENALTY)
        train(alone, params, range(3))
        assert torch.equal(params[i], together[2 * i])


@on_emulator
@pytest.mark.usefixtures("little_memory")
@pytest.mark.parametrize("prox_mode", MODES)
def test_windows_of_the_l2_change_no_bit(device, prox_mode):
    """Tickets work in windows that fit the L2 cache; its size changes no bit."""
    results = []
    for l2_bytes in (50 << 20, 1 << 20):
        device["l2_bytes"] = l2_bytes
        results.append(trained([TICKET, (2100, 28), (1500, 20)], prox_mode=prox_mode))
    assert_same_bits_and_some_zeros(*results)


# Steps one after another


@pytest.mark.usefixtures("little_memory")
def test_whatever_changes_between_steps_the_reference_agrees():
    """Counters and scratch memory serve steps of every mode in turn.

    Gradients come and go meanwhile, in new memory.
    """
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
            optimizer.param_groups[1].update(changes[step - 3])  # so that one launch has two modes
            give_grads(params, step)
            params[step % 5].grad = None
            optimizer.step()
        for got, expected in zip(*everyone):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)
            assert torch.equal(got == 0, expected == 0)


@on_emulator
def test_prox_keeps_its_plans(device):
    """Repeated calls with the same shapes are right with kept tables; another order of them gets its own."""
    first, second = [fresh((30, 20)), fresh((3, 50))], [fresh((3, 50)), fresh((30, 20))]
    for tensors in (first, second, first, second):
        expected = [w.clone() for w in tensors]
        prox_(tensors, backend=BACKEND, **PENALTY)
        prox_(expected, backend="reference", **PENALTY)
        torch.testing.assert_close(tensors, expected)


@on_emulator
def test_what_a_graph_comes_back_to_is_kept_for_good(monkeypatch):
    """Plans of prox_ that were captured are never dropped.

    They outlive the limit on kept plans, and forget(), because graphs hold addresses of their tables.
    """
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
    # a second capture makes no tables, which would not be possible during a capture
    with monkeypatch.context() as patch:
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
    """A plan cut for other limits of the device is not used again."""
    launches = []
    for limit in ({}, {"shared_bytes": LIMIT}):
        limit_device(**limit)
        device["launches"] = 0
        prox_([fresh(TILE), fresh(TICKET)], backend=BACKEND, **PENALTY)
        launches.append(device["launches"])
    limit_device()
    assert launches == [1, 2]
