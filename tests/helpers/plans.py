"""Step plans without an executor: what they gather, and whether they keep a gradient's memory."""

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
    layouts = [[grouped_layout(p, "feature", None) for p in group] for group in groups]
    plan = Plan(groups, layouts, rule.name)
    options = {"momentum": momentum} if rule is SGD else {}
    for i in range(len(groups)):
        plan.set_hyperparameters(i, Hyperparameters.make(rule, lr=0.1, **options))
    return plan


def run(plan):
    """Runs a gathered step that does nothing; its table as a list of rows."""
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
    """The n floats that lie there."""
    return torch.tensor((ctypes.c_float * n).from_address(address)[:])


def snapshot(params, state):
    return [(p._version, p.tolist()) for p in params], {p: dict(entry) for p, entry in state.items()}


def watched(p):
    """Gives p a gradient whose memory tells whether it is alive after p has let go of it."""
    array = np.ones(tuple(p.shape), np.float32)
    p.grad = torch.from_numpy(array)
    return weakref.ref(array)


def is_alive(p, watch):
    p.grad = None
    if watch() is not None:  # then it may be garbage; collecting takes its time
        gc.collect()
    return watch() is not None
