"""For tests of the CUDA executor: shapes for each of its paths, parameters, and optimizers.

A path is a way in which blocks work on groups. "rows" keeps them in registers, "tile" in one block's shared
memory, and "shared" in the shared memory of several blocks. "ticket" cuts groups that no blocks can hold into
chunks, and reads these more than once.
"""

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
# Options that keep a step off the specialised kernels and on the general one, for one reason each.
GENERAL = (
    *(dict(momentum=0.9, nesterov=True), dict(momentum=0.9, prox_mode="exact"), dict(momentum=0.0)),
    *(dict(momentum=0.9, freeze_zeros=freeze) for freeze in ("group", "element")),
)
# With shared memory limited to LIMIT, each of these shapes takes one path.
LIMIT = 9000  # bytes
TILE, SHARED, TICKET = (16, 12), (150, 20), (900, 20)
# Rows of whole vector accesses, worked on by a part of a warp up to a whole block; rows of odd lengths;
# groups of one element; and a tensor without groups.
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
# One or two for each kind of tile: columns of whole vector accesses, of odd lengths, and more of them than a
# block's threads can span; adjacent columns of one group, an odd and an even number; matrices side by side;
# rows too long for registers; and a tensor without groups.
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
    """The set of paths that work on a tensor: of "rows", "tile", "shared" and "ticket"."""
    counts = paths(shape, group_by, dtype)
    return {name for name, count in zip(("rows", "tile", "shared", "ticket"), counts) if count}


def parameter(shape, dtype=torch.float32, offset=0):
    """Normal weights, some of them and the last row 0, that begin ``offset`` elements into their memory."""
    memory = torch.empty(offset + fresh(shape).numel(), dtype=dtype)
    w = memory[offset:].view(shape).copy_(fresh(shape, dtype))
    w[torch.rand(shape) < 0.2] = 0.0
    w[-1] = 0.0
    return torch.nn.Parameter(w)


def optimizer_of(params, **options):
    """A ProxSGD on the CUDA executor, under PENALTY over filters unless options say otherwise."""
    options = {"lr": 0.1, "group_by": "filter", **PENALTY, **options}
    return ProxSGD(params, backend=BACKEND, **options)


def parameters_of(groups):
    return [p for group in groups for p in group["params"]]


def give_grads_at(params, dtype=torch.float32, offset=0):
    """Gives each parameter a random gradient that begins ``offset`` elements into its memory."""
    for p in params:
        p.grad = parameter(p.shape, dtype, offset).detach()


def most(dtype):
    """The longest row that a block's registers hold."""
    return (emulated.THREADS if INTERPRETED else 256) * (8 if dtype == torch.float64 else 16)


def rows(dtype):
    """The shapes of ROWS that a block's registers hold in this dtype."""
    return [shape for shape in ROWS if shape[-1] <= most(dtype)]


def paths(shape, group_by="feature", dtype=torch.float32):
    """The number of blocks that work on a tensor by each path: (rows, tile, shared, ticket)."""
    return paths_together([shape], group_by, dtype)


def paths_together(shapes, group_by="feature", dtype=torch.float32):
    """The same numbers as paths(), for several tensors in one launch."""
    layouts = [grouped_layout(torch.empty(shape, dtype=dtype), group_by, None) for shape in shapes]
    number = (torch.float32, torch.float64, torch.bfloat16, torch.float16).index(dtype)
    return BUILT["cuda"].cuda_paths(layouts, number, 0)


def model(dtype=torch.float32, offset=0, tiles=TILES):
    """Param groups with one parameter for each of ``tiles``."""
    return [{"params": [parameter(shape, dtype, offset)], "group_by": spec} for spec, shape in tiles]


def trained(shapes, steps=3, dtype=torch.float32, **options):
    """The parameters and momentum buffers after some steps that always begin from the same numbers."""
    params = parameters(shapes, dtype)
    optimizer = ProxSGD(params, lr=0.1, momentum=0.9, backend=BACKEND, **{**PENALTY, **options})
    for step in range(steps):
        give_grads(params, step)
        optimizer.step()
    return [x.detach().clone() for p in params for x in (p, optimizer.state[p]["momentum_buffer"])]


def assert_same_bits_and_some_zeros(xs, ys):
    assert_same_bits(xs, ys)
    assert any(0 < x.count_nonzero() < x.numel() for x in xs)
