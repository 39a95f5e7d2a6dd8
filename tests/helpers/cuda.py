"""What tests of the CUDA executor share: its paths, parameters and optimizers that take them."""

import pytest
import torch
from helpers.right import INTERPRETED, fresh

from cges_kernels import ProxSGD
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout

BACKEND = "cuda"
on_emulator = pytest.mark.skipif(not INTERPRETED, reason="looks into the device, as only the emulator allows")
PENALTY = dict(group_lasso=0.3, exclusive_lasso=0.001, l1=0.02)
PLAIN = dict(momentum=0.9, weight_decay=0.1)
# What takes the general path, a reason each.
GENERAL = (
    *(dict(momentum=0.9, nesterov=True), dict(momentum=0.9, prox_mode="exact"), dict(momentum=0.0)),
    *(dict(momentum=0.9, freeze_zeros=freeze) for freeze in ("group", "element")),
)


def path_of(shape, group_by="filter", dtype=torch.float32):
    """Which paths work on a tensor: of "rows", "tile", "shared", "ticket"."""
    layout = grouped_layout(torch.empty(shape, dtype=dtype), group_by, None)
    number = (torch.float32, torch.float64, torch.bfloat16, torch.float16).index(dtype)
    counts = BUILT["cuda"].cuda_paths([layout], number, 0)
    return {name for name, count in zip(("rows", "tile", "shared", "ticket"), counts) if count}


def parameter(shape, dtype=torch.float32, offset=0):
    """Of normal weights, some of them 0 and a row too, so many elements beyond where memory begins."""
    memory = torch.empty(offset + fresh(shape).numel(), dtype=dtype)
    w = memory[offset:].view(shape).copy_(fresh(shape, dtype))
    w[torch.rand(shape) < 0.2] = 0.0
    w[-1] = 0.0
    return torch.nn.Parameter(w)


def optimizer_of(params, **options):
    options = {"lr": 0.1, "group_by": "filter", **PENALTY, **options}
    return ProxSGD(params, backend=BACKEND, **options)


def parameters_of(groups):
    return [p for group in groups for p in group["params"]]


def give_grads(params, dtype=torch.float32, offset=0):
    for p in params:
        p.grad = parameter(p.shape, dtype, offset).detach()
