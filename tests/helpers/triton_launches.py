"""What tests of the Triton executor share: small tensors and steps, and a log of launches."""

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
MIXED = [(6, 5), (70, 5), (9,), (0, 3), (40, 20), (3, 90), (4, 3, 3, 3)]  # groups that fit SMALL, and longer


def optimizer_of(params, **options):
    return ProxSGD(params, **{"lr": 0.3, "momentum": 0.9, "backend": BACKEND, **options})


def steps_of(params, steps=2, **options):
    """All that a few steps leave behind."""
    optimizer = optimizer_of(params, **options)
    train(optimizer, params, range(steps))
    return everything(optimizer)


def tables_of(optimizer):
    return [tables for _, tables in optimizer._planner.plans[BACKEND]._executor.tables]


class Noted:
    """A kernel whose launches are written down."""

    def __init__(self, name, log):
        self.name, self.kernel, self.log = name, getattr(executor, name), log

    def __getitem__(self, grid):
        def launch(*args, **constants):
            self.log.append(SimpleNamespace(name=self.name, grid=grid, args=args, constants=constants))
            return self.kernel[grid](*args, **constants)

        return launch
