"""A step gives the same bits however it is run: threads, repetitions, neighbours in the list."""

import pytest
import torch
from helpers.right import MODES
from helpers.steps import (
    PENALTY,
    assert_as_near_as,
    assert_same_bits,
    everything,
    give_grads,
    needs_cpu,
    parameters,
    train,
)

from cges_kernels import ProxSGD

EXACT = pytest.param(
    "exact",
    marks=pytest.mark.full(
        "exact mode over groups of up to a million elements; smaller ones are in test_cpu_cuts.py"
    ),
)
SIZES = [(130, 70), (3, 5), (7,), (16, 8, 3, 3), (1, 40), (40, 1), (257, 513), (70000, 2)]
SIZES += [(2, 600_000), (40_000, 16)]  # groups that fit into no cache


def run_once(backend, sizes=SIZES, dtype=torch.float32, seed=0, steps=3, **options):
    """All parameters and buffers after some steps from the same numbers."""
    params = parameters(sizes, dtype, seed)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, **PENALTY, **options, backend=backend)
    train(optimizer, params, range(steps))
    return everything(optimizer)


@needs_cpu
@pytest.mark.filterwarnings("ignore:.*sequential mode zeroes")
@pytest.mark.parametrize("group_by", ["feature", "filter", "channel", "tensor"])
@pytest.mark.parametrize("prox_mode", ["sequential", EXACT])
def test_bits_depend_neither_on_the_threads_nor_on_the_run(threads, group_by, prox_mode):
    """One thread, two threads, and two threads again give the same bits."""
    results = []
    for n in (1, 2, 2):
        threads(n)
        results.append(run_once("cpu", group_by=group_by, prox_mode=prox_mode, steps=2))
    for other in results[1:]:
        assert_same_bits(results[0], other)


@needs_cpu
@pytest.mark.filterwarnings("ignore:.*sequential mode zeroes")
def test_bits_do_not_depend_on_the_neighbours():
    """A tensor gets the same bits alone, in a list and in a shuffled list."""
    params, alone, shuffled = (parameters(SIZES, torch.float32) for _ in range(3))
    order = [5, 8, 1, 3, 0, 7, 2, 9, 6, 4]
    options = dict(lr=0.1, momentum=0.9, **PENALTY, backend="cpu")
    optimizers = [ProxSGD(params, **options), ProxSGD([shuffled[i] for i in order], **options)]
    optimizers += [ProxSGD([p], **options) for p in alone]
    for step in range(3):
        for group in (params, alone, shuffled):
            give_grads(group, step)
        for optimizer in optimizers:
            optimizer.step()
    assert_same_bits(params, alone)
    assert_same_bits(params, shuffled)


@needs_cpu
@pytest.mark.parametrize("prox_mode", MODES)
def test_500_tiny_tensors_equal_the_reference(prox_mode):
    """Many small tensors in one step are each stepped as by the reference."""
    sizes = ([(3, 5), (7,), (2, 3, 2, 2), (1,), (4, 1), (), (1, 9), (8, 8)] * 63)[:500]
    cpu, reference = (
        run_once(backend, sizes, torch.float64, prox_mode=prox_mode) for backend in ("cpu", "reference")
    )
    assert_as_near_as("cpu", cpu, reference)
    assert any((w == 0).any() and (w != 0).any() for w in reference)
