"""For tests of the Triton executor: small tensors, steps, and a record of launches."""

from types import SimpleNamespace

import pytest
from helpers.steps import everything, train

from cges_kernels import ProxSGD, available_backends

executor = pytest.importorskip("cges_kernels.backends.triton.executor")
tiles = pytest.importorskip("cges_kernels.backends.triton.tiles")

BACKEND = "triton"
needs_triton = pytest.mark.skipif(BACKEND not in available_backends(), reason="no GPU, no interpreter")

WHOLE, SPLIT = "whole_groups", "split_groups"
PENALTY = dict(group_lasso=0.2, exclusive_lasso=0.01, l1=0.05)
# Shapes with groups that fit the tile SMALL, and shapes with longer groups.
MIXED = [(6, 5), (70, 5), (9,), (0, 3), (40, 20), (3, 90), (4, 3, 3, 3)]


def optimizer_of(params, **options):
    """A ProxSGD with momentum on the Triton executor."""
    return ProxSGD(params, **{"lr": 0.3, "momentum": 0.9, "backend": BACKEND, **options})


def steps_of(params, steps=2, **options):
    """All parameters and states after a few steps."""
    optimizer = optimizer_of(params, **options)
    train(optimizer, params, range(steps))
    return everything(optimizer)


def tables_of(optimizer):
    """The tables of addresses that the executor keeps for this optimizer."""
    return [tables for _, tables in optimizer._planner.plans[BACKEND]._executor.tables]


class Noted:
    """A kernel that notes each launch in a log and then makes it."""

    def __init__(self, name, log):
        self.name, self.kernel, self.log = name, getattr(executor, name), log

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.log.append(SimpleNamespace(name=self.name, grid=grid, args=args, constants=constants))
            return self.kernel[grid](*args, **constants)

        return launch
