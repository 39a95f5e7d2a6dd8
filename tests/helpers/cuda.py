"""What tests of the CUDA executor share: its paths, parameters and optimizers that take them."""

import pytest
import torch
from helpers import emulated
from helpers.right import INTERPRETED, fresh
from helpers.steps import assert_same_bits, give_grads, parameters

from cges_kernels import ProxSGD
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout

BACKEND = "cuda"
needs_cuda = pytest.mark.skipif(
    "cuda" not in BUILT, reason="the extension is built without the CUDA executor"
)
on_emulator = pytest.mark.skipif(not INTERPRETED, reason="looks into the device, as only the emulator allows")
PENALTY = dict(group_lasso=0.3, exclusive_lasso=0.001, l1=0.02)
PLAIN = dict(momentum=0.9, weight_decay=0.1)
# What takes the general path, a reason each.
GENERAL = (
    *(dict(momentum=0.9, nesterov=True), dict(momentum=0.9, prox_mode="exact"), dict(momentum=0.0)),
    *(dict(momentum=0.9, freeze_zeros=freeze) for freeze in ("group", "element")),
)
# Shapes that take a path each where there is so little shared memory: a tile, a shared panel, tickets.
LIMIT = 9000  # bytes
TILE, SHARED, TICKET = (16, 12), (150, 20), (900, 20)
# Groups of whole accesses, of a part of a warp to all of a block, and of odd lengths; of one; none at all.
ROWS = [
    (70, 8),
    (9, 48),
    (33, 136),
    (5, 512),
    (3, 1024),
    (40, 9),
    (70, 3),
    (7, 147),
    (3, 701),
    (300, 1),
    (77,),
]
# Of each kind of tile one or two: columns of whole accesses, of odd lengths, more than a block's threads can
# span; adjacent columns of one group, odd and even; matrices side by side; rows too long for registers; no
# groups at all.
TILES = [
    ("feature", (64, 48)),
    ("feature", (131, 67)),
    ("feature", (3, 1500)),
    ("channel", (24, 16, 3, 3)),
    ("channel", (9, 5, 3, 3)),
    ((1,), (7, 30, 12)),
    ((1,), (30, 3, 5)),
    ("filter", (3, 2052)),
    ("tensor", (90, 73)),
    ("feature", (3000,)),
]


def path_of(shape, group_by="filter", dtype=torch.float32):
    """Which paths work on a tensor: of "rows", "tile", "shared", "ticket"."""
    counts = paths(shape, group_by, dtype)
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


def give_grads_at(params, dtype=torch.float32, offset=0):
    for p in params:
        p.grad = parameter(p.shape, dtype, offset).detach()


def most(dtype):
    """The longest row that a block's registers hold."""
    return (emulated.THREADS if INTERPRETED else 256) * (8 if dtype == torch.float64 else 16)


def rows(dtype):
    return [shape for shape in ROWS if shape[-1] <= most(dtype)]


def paths(shape, group_by="feature", dtype=torch.float32):
    """How many blocks work on a tensor by each path: (rows, tile, shared, ticket)."""
    return paths_together([shape], group_by, dtype)


def paths_together(shapes, group_by="feature", dtype=torch.float32):
    layouts = [grouped_layout(torch.empty(shape, dtype=dtype), group_by, None) for shape in shapes]
    number = (torch.float32, torch.float64, torch.bfloat16, torch.float16).index(dtype)
    return BUILT["cuda"].cuda_paths(layouts, number, 0)


def model(dtype=torch.float32, offset=0, tiles=TILES):
    return [{"params": [parameter(shape, dtype, offset)], "group_by": spec} for spec, shape in tiles]


def trained(shapes, steps=3, dtype=torch.float32, **options):
    """Parameters and buffers after some steps from the same numbers."""
    params = parameters(shapes, dtype)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, backend=BACKEND, **{**PENALTY, **options})
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return [x.detach().clone() for p in params for x in (p, optimizer.state[p]["momentum_buffer"])]


def assert_same_bits_and_some_zeros(xs, ys):
    assert_same_bits(xs, ys)
    assert any(0 < x.count_nonzero() < x.numel() for x in xs)
