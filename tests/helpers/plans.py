"""Step plans without an executor: their gathered tables, and whether they keep a gradient's memory alive."""

import ctypes
import gc
import weakref

import numpy as np
import torch
from torch import nn

from cges_kernels.backends import gathering
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout
from cges_kernels.core.hyperparameters import Hyperparameters
from cges_kernels.core.rules import SGD

PLANS = {"python": gathering.StepPlan} | ({"c++": BUILT["cpu"].StepPlan} if "cpu" in BUILT else {})
SHAPES = [(4, 3), (2, 3, 2, 2), (6,), (5, 1)]


def parameters(shapes=SHAPES):
    params = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    for p in params:
        p.grad = torch.randn_like(p)
    return params


def make_plan(Plan, *groups, momentum=0.9, rule=SGD):
    """A plan over ``groups``, with lr 0.1."""
    layouts = [[grouped_layout(p, "feature", None) for p in group] for group in groups]
    plan = Plan(groups, layouts, rule.name)
    options = {"momentum": momentum} if rule is SGD else {}
    for i in range(len(groups)):
        plan.set_hyperparameters(i, Hyperparameters.make(rule, lr=0.1, **options))
    return plan


def run(plan):
    """Runs a gathered step that does nothing, and returns the rows of its table."""
    tables = []
    plan.run(tables.append)
    (table,) = tables
    assert (
        table.dtype == torch.int64
        and table.device.type == "cpu"
        and table.shape[1:] == (len(gathering.Row._fields),)
    )
    return [gathering.Row(*row) for row in table.tolist()]


def memory(address, n):
    """The n floats at this address."""
    return torch.tensor((ctypes.c_float * n).from_address(address)[:])


def snapshot(params, state):
    """The versions and values of parameters, and what the state holds, to compare later."""
    return [(p._version, p.tolist()) for p in params], {p: dict(entry) for p, entry in state.items()}


def watched(p):
    """Gives p a gradient, and returns a weak reference that is None once the gradient's memory is freed."""
    array = np.ones(tuple(p.shape), np.float32)
    p.grad = torch.from_numpy(array)
    return weakref.ref(array)


def is_alive(p, watch):
    """Whether the memory behind ``watch`` is still held after p has dropped its gradient."""
    p.grad = None
    if watch() is not None:  # it may be garbage that was not collected yet
        gc.collect()
    return watch() is not None
