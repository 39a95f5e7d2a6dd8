"""The Triton executor's bits, which do not depend on what runs beside: neighbours, windows, late programs."""

import inspect
import threading

import numpy as np
import pytest
import torch
from helpers.right import DTYPES, INTERPRETED, MODES, fresh
from helpers.steps import assert_same_bits, give_grads, parameters
from helpers.triton_launches import (
    BACKEND,
    MIXED,
    PENALTY,
    SPLIT,
    executor,
    needs_triton,
    optimizer_of,
    steps_of,
)

from cges_kernels import prox
from cges_kernels.backends.extension import BUILT

split = pytest.importorskip("cges_kernels.backends.triton.split")
tl = pytest.importorskip("triton.language")  # the interpreter looks for the name tl in this module
pytestmark = needs_triton
needs_interpreter = pytest.mark.skipif(not INTERPRETED, reason="for the interpreter")

# Bits


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("prox_mode", "dtype"), [("sequential", torch.bfloat16), ("exact", torch.float32)], ids=str
)
def test_bits_depend_neither_on_the_neighbours_nor_on_the_run(prox_mode, dtype):
    """A tensor gets the same bits in a second run, in a shuffled list, and alone."""
    options = dict(prox_mode=prox_mode, **PENALTY)
    together = steps_of(parameters(MIXED, dtype), **options)
    assert_same_bits(together, steps_of(parameters(MIXED, dtype), **options))
    params, order = parameters(MIXED, dtype), (4, 0, 6, 2, 5, 3, 1)
    optimizer = optimizer_of([params[i] for i in order], **options)
    for step in range(2):
        give_grads(params, step)
        optimizer.step()
    assert_same_bits(together[: len(MIXED)], params)
    for i in (0, 1):
        params = parameters(MIXED, dtype)
        optimizer = optimizer_of([params[i]], **options)
        for step in range(2):
            give_grads(params, step)
            optimizer.step()
        assert_same_bits([together[i]], [params[i]])


@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("prox_mode", MODES)
def test_several_windows_give_the_same_bits_as_one(launches, monkeypatch, prox_mode):
    """Long groups are worked on in windows that fit the L2 cache; its size changes no bit."""
    results = []
    for l2_bytes in (2**30, 1):
        monkeypatch.setattr(executor, "_l2_bytes", lambda device, size=l2_bytes: size)
        results.append(steps_of(parameters(MIXED, torch.float32), prox_mode=prox_mode, **PENALTY))
    assert_same_bits(*results)
    one, several = ({len(x.args[0]) // x.args[8] for x in launches[i:] if x.name == SPLIT} for i in (0, 4))
    assert one == {1, *several} and min(several) >= 3


@pytest.mark.usefixtures("small_tiles")
def test_the_plan_in_python_gives_the_same_bits(monkeypatch):
    """The step plan in Python and the one in C++ lead to the same bits."""
    if "cpu" not in BUILT:
        pytest.skip("the C++ extension is not built")
    results = [steps_of(parameters(MIXED, torch.float32), **PENALTY)]
    monkeypatch.delitem(BUILT, "cpu")
    results.append(steps_of(parameters(MIXED, torch.float32), **PENALTY))
    assert_same_bits(*results)


@pytest.mark.usefixtures("small_tiles")
def test_everything_differs_in_one_optimizer():
    """Param groups of different options and dtypes each get the bits that they get alone."""
    kinds = [
        dict(group_by="filter", prox_mode="exact", **PENALTY),
        dict(group_by="tensor", freeze_zeros="group", momentum=0, group_lasso=0.5),
        dict(group_by="channel", freeze_zeros="element", nesterov=True, weight_decay=0.1, l1=0.1),
        dict(maximize=True, dampening=0.5),
        dict(group_by=(1,), view=(4, 10, 6), prox_mode="exact", exclusive_lasso=0.1),
    ]

    def made():
        params = [parameters([(40, 6), (12, 20)], dtype, seed=i) for i, dtype in enumerate(DTYPES)]
        params.append(parameters([(20, 12)], seed=9))
        for p in params[1] + params[2]:
            p.data[:, 1::2] = 0.0
        return params

    everyone = made()
    optimizer = optimizer_of([{"params": params, **kind} for params, kind in zip(everyone, kinds)])
    for step in range(2):
        for params in everyone:
            give_grads(params, step)
        optimizer.step()
    for together, params, kind in zip(everyone, made(), kinds):
        alone = steps_of(params, **kind)
        buffers = [optimizer.state[p].get("momentum_buffer") for p in together]
        assert_same_bits([*together, *(buf for buf in buffers if buf is not None)], alone)
        assert not all(torch.equal(p, q) for p, q in zip(together, made()[0]))


# Programs that run at the same time


@pytest.fixture
def three_at_once(monkeypatch):
    """Runs the programs of split_groups three at a time.

    The ``late``-th program that starts waiting for others sleeps until all of these are done, or for half a
    second.
    """
    from triton.runtime.interpreter import InterpretedFunction

    kernel, wait_for = executor.split_groups, split.wait_for
    program = kernel.rewrite()

    def set_up(tickets, late):
        todo, waits, ends = (iter(range(tickets)) for _ in range(3))
        others_are_done = threading.Event()

        def wait_late(count, at_least):
            if next(waits) == late:
                others_are_done.wait(timeout=0.5)
            return wait_for(count, at_least)

        @np.errstate(all="ignore")
        def work(args):
            for _ in todo:
                program(**args)
                if next(ends) == tickets - 2:
                    others_are_done.set()

        def run(**args):  # called for each program; the first call runs them all
            threads = [threading.Thread(target=work, args=[args], daemon=True) for _ in range(3)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=10)
            assert not any(thread.is_alive() for thread in threads), "a program waits in vain"

        run.__signature__, run.__module__ = inspect.signature(program), program.__module__
        run.__annotations__ = program.__annotations__
        monkeypatch.setattr(split, "wait_for", wait_late)
        monkeypatch.setitem(InterpretedFunction.rewritten_fn, kernel.fn, run)

    return set_up


@needs_interpreter
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize(
    ("prox_mode", "late"), [("sequential", 1), ("sequential", 4), *(("exact", n) for n in (1, 4, 40, 73))]
)
def test_programs_may_be_late(three_at_once, prox_mode, late):
    """A program that wakes late gives the same result.

    It may have nothing left to do, because its panel's search ended before its sweep.

    Late are programs near the beginning of the launch and near its end: there are 3 chunks, with 2 or 25
    tickets each.
    """
    w, options = fresh((70, 5)), dict(prox_mode=prox_mode, backend=BACKEND, **PENALTY)
    expected = prox(w, **options)
    three_at_once(tickets=3 * (25 if prox_mode == "exact" else 2), late=late)
    assert torch.equal(prox(w, **options), expected)
