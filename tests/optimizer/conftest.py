"""Executors of the optimizer's tests, beside those that the suite's conftest.py parametrises by."""

import contextlib

import pytest
import torch
from helpers.right import device_of
from helpers.steps import FASTEST
from helpers.tiers import fused_backends

from cges_kernels import available_backends


def executors(names, first_tier, why):
    """These, of which the first tier runs some."""
    second = pytest.mark.full(why)
    return [name if name in first_tier else pytest.param(name, marks=second) for name in names]


def served(request):
    """An executor; tensors are made where it serves them."""
    device = device_of(request.param)
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield request.param


executor = pytest.fixture(served, name="executor")  # of a covering array, which names it as indirect
fastest_backend = pytest.fixture(
    served,
    name="fastest_backend",
    params=executors(
        available_backends(), [FASTEST], "asked before any executor is: the first tier takes one"
    ),
)
quick_backend = pytest.fixture(
    served,
    name="quick_backend",
    params=executors(
        fused_backends(), ["cpu", "cuda"], "many steps, which Triton's interpreter takes seconds for"
    ),
)
