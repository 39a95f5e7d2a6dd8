"""AdamW's counts of steps and learning rates in device memory: kernels read them, and count up."""

import pytest
import torch
from helpers import emulated
from helpers.right import INTERPRETED, assert_right, coefficients, device_of, inputs, moments
from helpers.tiers import covering

from cges_kernels import available_backends
from cges_kernels.backends import gathering
from cges_kernels.backends.extension import BUILT
from cges_kernels.backends.gathering import Row
from cges_kernels.backends.unplanned import forget, step_once
from cges_kernels.core import reference
from cges_kernels.core.groups import grouped_layout
from cges_kernels.core.hyperparameters import At, Hyperparameters, Phase
from cges_kernels.core.rules import ADAMW

KERNELS = [backend for backend in available_backends() if backend in ("triton", "cuda")]
SHAPES = [(40, 30), (7,), (130, 9), (33, 3, 3)]


@pytest.fixture(autouse=True)
def nothing_kept():
    """Drops all kept executors before and after each test."""
    forget()
    yield
    forget()


def tensors_of(backend, dtype, shapes=SHAPES):
    """Weights, gradients and both moments on the executor's device."""
    device = device_of(backend)
    made = [(*inputs(shape, dtype, 2), *moments(shape, dtype)) for shape in shapes]
    return [tuple(x.to(device) for x in xs) for xs in made]


def hyperparameters(lr, first):
    """Hyperparameters of param group 1 (`first`) or 2."""
    options = dict(betas=(0.9, 0.999) if first else (0.5, 0.25), eps=1e-8 if first else 0.1)
    penalties = {
        key: x for key, x in coefficients(torch.ones(SHAPES[0]), "feature").items() if "_by" not in key
    }
    penalties.pop("view")
    return Hyperparameters.make(ADAMW, lr=lr, weight_decay=0.1, **options, **penalties)


def step(backend, tensors, rows, lr, found_inf=None):
    """One step of two param groups of two tensors each, without an optimizer."""
    layouts = [grouped_layout(w, "feature", None) for w, *_ in tensors]
    of_groups = [hyperparameters(lr, first) for first in (True, False)]
    step_once(backend, [w for w, *_ in tensors], layouts, rows, [0, 0, 1, 1], of_groups, None, found_inf)


def rows_of(tensors, counts):
    """Rows of tensors that have states. A count is a number, or a tensor beside them on the device."""
    return [
        Row(*(x.data_ptr() for x in xs), int(Phase.RUNNING), *counted(count))
        for xs, count in zip(tensors, counts)
    ]


def counted(count):
    """(number, address) of a count."""
    return (0, count.data_ptr()) if isinstance(count, torch.Tensor) else (count, 0)


@covering(executor=KERNELS, dtype=[torch.float32, torch.float64, torch.bfloat16], lr=["number", "address"])
def test_what_lies_on_the_device_is_as_what_the_host_knows(executor, dtype, lr):
    """Counts and rates on the device give the steps of those from the host, to a rounding or two.

    Counts go up by one.

    On the device are all counts, some, or none.
    """
    device = device_of(executor)
    there = [torch.full((), float(n), device=device) for n in (0, 1, 7, 999_999)]
    rate = torch.full((1,), 0.5, device=device)
    for kept in ([0, 1, 2, 3], [1, 3], []):
        tensors = tensors_of(executor, dtype)
        before = [tuple(x.clone().cpu() for x in xs) for xs in tensors]
        counts = [x if i in kept else int(x) + 1 for i, x in enumerate(there)]
        were = [float(x) for x in there]
        step(executor, tensors, rows_of(tensors, counts), At(rate.data_ptr()) if lr == "address" else 0.5)
        assert [float(x) for x in there] == [n + (i in kept) for i, n in enumerate(were)]
        for i, (now, was, n) in enumerate(zip(tensors, before, were)):
            h = hyperparameters(0.5, first=i < 2)
            told = dict(ADAMW.told(h.chosen), lr=0.5, step=n + 1, update=ADAMW.update)
            told |= dict(group_lasso=h.group_lasso, exclusive_lasso=h.exclusive_lasso, l1=h.l1)
            truth = reference.step(*was, accumulate=torch.float64, **told)
            same = reference.step(*was, accumulate=torch.float32, **told)
            for x, true, near in zip((now[0], *now[2:]), truth, same):
                assert_right(x.cpu() + 0.0, true, near, torch.zeros_like(true), dtype)
        for x, n in zip(there, were):
            x.fill_(n)


@pytest.mark.parametrize("executor", KERNELS)
def test_an_overflow_is_not_counted(executor):
    """A step with found_inf set changes no count and no tensor."""
    tensors = tensors_of(executor, torch.float32)
    there = [torch.full((), 3.0, device=device_of(executor)) for _ in SHAPES]
    before = [[x.clone() for x in xs] for xs in tensors]
    found_inf = torch.ones(1, device=device_of(executor))
    step(executor, tensors, rows_of(tensors, there), 0.5, found_inf)
    assert [float(x) for x in there] == [3.0] * len(SHAPES)
    assert all(torch.equal(x, y) for xs, ys in zip(tensors, before) for x, y in zip(xs, ys))


@pytest.mark.parametrize("executor", KERNELS)
def test_a_tensor_without_gradient_is_not_counted(executor):
    """A skipped tensor's count stays."""
    tensors = tensors_of(executor, torch.float32)
    there = [torch.full((), 3.0, device=device_of(executor)) for _ in SHAPES]
    rows = rows_of(tensors, there)
    rows[1] = rows[1]._replace(phase=int(Phase.SKIPPED))  # its count is known all the same
    step(executor, tensors, rows, 0.5)
    assert [float(x) for x in there] == [4.0, 3.0, 4.0, 4.0]


def failing(patch, executor, launch):
    """Makes one launch of the next step fail: the first, which counts, or one of the two that step."""
    if executor == "cuda":
        emulated.Device(BUILT["cuda"].__file__)["fail_launch"] = launch + 1
        return
    from cges_kernels.backends.triton import executor as module

    class Fails:
        def __getitem__(self, grid):
            raise RuntimeError("some parameters" if launch == 2 else "no parameter")

    patch.setattr(module, ("count_steps", "whole_groups", "split_groups")[launch], Fails())


@pytest.mark.skipif(not INTERPRETED, reason="launches on a GPU do not fail at will")
@pytest.mark.parametrize("executor", KERNELS)
@pytest.mark.parametrize("tiles", ["pieces"], indirect=True)
def test_a_launch_that_fails_counts_nothing(monkeypatch, executor, tiles):
    """Where no weight has moved, no count on the device has; if only the last launch fails, all have."""
    shapes = [(40, 30), (7,), (900, 20), (33, 3, 3)]
    for launch, words in enumerate(("no parameter", "no parameter", "some parameters")):
        tensors = tensors_of(executor, torch.float32, shapes)
        before = [x.clone() for x, *_ in tensors]
        there = [torch.full((), 3.0, device=device_of(executor)) for _ in shapes]
        with monkeypatch.context() as patch, pytest.raises(RuntimeError, match=words):
            failing(patch, executor, launch)
            step(executor, tensors, rows_of(tensors, there), 0.5)
        moved = not all(torch.equal(x, y) for (x, *_), y in zip(tensors, before))
        assert moved == (launch == 2) and [float(x) for x in there] == [3.0 + moved] * len(shapes)


@pytest.mark.parametrize("executor", KERNELS)
def test_what_has_no_elements_is_counted_too(executor, monkeypatch):
    """A tensor without elements is counted by the plan, because no kernel sees it.

    Here counts are treated as if they were on the device.
    """
    monkeypatch.setattr(gathering, "on_device", lambda step: True)
    params = [
        torch.nn.Parameter(torch.randn(shape, device=device_of(executor))) for shape in ((3, 4), (0, 4))
    ]
    for p in params:
        p.grad = torch.ones_like(p)
    layouts = [[grouped_layout(p, "feature", None) for p in params]]
    plan = gathering.StepPlan([params], layouts, "adamw")
    state = {}
    for step in range(3):
        assert plan.gather([params], state)
        plan.run(lambda table: None, found_inf=torch.tensor(float(step == 2)))
    # the first would be counted by a kernel, and none runs here
    assert [float(state[p]["step"]) for p in params] == [0.0, 2.0]
