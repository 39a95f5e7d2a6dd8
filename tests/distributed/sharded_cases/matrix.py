"""Each placement of shards with each kind of group: steps, and the value of the penalty."""

from functools import partial
from itertools import product

import torch
import torch.distributed as dist
from sharded_cases.common import (
    CASES,
    STRONG,
    R,
    S,
    case,
    check_steps,
    device,
    mesh_of,
    parameters,
    placed,
    whole,
)
from torch.distributed.tensor.placement_types import _StridedShard

from cges_kernels import available_backends
from cges_kernels.core import reference
from cges_kernels.core.hyperparameters import PROX_MODES

SPECS = ("feature", "filter", "channel", "tensor", (-1,))
PLACED = {
    1: {"rows": ((1,), [S(0)])},
    2: {
        "rows": ((2,), [S(0)]),
        "columns": ((2,), [S(1)]),
        "taps": ((2,), [S(2)]),
        "replicas": ((2,), [R]),
    },
    4: {
        "rows": ((4,), [S(0)]),
        "columns": ((4,), [S(1)]),
        "rows-and-columns": ((2, 2), [S(0), S(1)]),
        "columns-and-rows": ((2, 2), [S(1), S(0)]),
        "rows-twice": ((2, 2), [S(0), S(0)]),
        "replicas-of-rows": ((2, 2), [R, S(0)]),
        "as-fsdp-and-tp": ((2, 2), [_StridedShard(0, split_factor=2), S(0)]),
    },
}


def dtypes():
    """The dtypes in which steps are checked."""
    fused = "cpu" in available_backends() if device() == "cpu" else len(available_backends()) > 1
    # Without a compiled executor the reference steps. In 16 bits it computes SGD's update as torch does,
    # which is not held to the rule for executors.
    return (torch.float32, torch.float64, *[torch.bfloat16] * fused)


def matrix(mesh_shape, placements, spec):
    """Steps in every dtype and mode are right for this placement and spec."""
    mesh = mesh_of(*mesh_shape)
    probe = torch.arange(40.0).view(5, 4, 2)
    # otherwise the comparison would mean nothing
    assert torch.equal(whole(placed(probe, mesh, placements)), probe)
    zeros = 0
    for i, (dtype, prox_mode) in enumerate(product(dtypes(), PROX_MODES)):
        params = parameters(mesh, placements, dtype)
        zeros += check_steps(params, checker=i, group_by=spec, prox_mode=prox_mode, **STRONG)
    assert zeros > 0


for world, table in PLACED.items():
    for name, (mesh_shape, placements) in table.items():
        for spec in SPECS:
            spec_name = spec if isinstance(spec, str) else "dims" + "".join(map(str, spec))
            CASES[world][f"{name}-{spec_name}"] = partial(matrix, mesh_shape, placements, spec)


@case(2, 4)
def omega_of_sharded_parameters():
    """reference.omega takes DTensors, so that the objective is logged without gathering weights."""
    penalty = dict(group_lasso=0.7, exclusive_lasso=0.1, l1=0.3)
    for mesh_shape, placements in PLACED[dist.get_world_size()].values():
        for spec in SPECS:
            for p in parameters(mesh_of(*mesh_shape), placements, shapes=((7, 5, 3, 3), (3, 8))):
                omega = reference.omega(p.detach(), group_by=spec, **penalty)
                expected = reference.omega(whole(p.detach()), group_by=spec, **penalty)
                torch.testing.assert_close(whole(omega), expected)
