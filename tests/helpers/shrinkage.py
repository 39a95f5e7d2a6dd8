"""For tests of the reference's shrinkage: normal values in float64, and the prox of a single group."""

import torch

from cges_kernels.core.shrinkage import Thresholds, shrink

EPS = torch.finfo(torch.float64).eps


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def soft_magnitude(z, t):
    """The magnitude of soft(z, t)."""
    return (z.abs() - t).clamp_min(0)


def solve_group(z, a, b, c, prox_mode="exact"):
    """shrink of one group, given and returned as a vector."""
    return shrink(z, Thresholds(a, b, c), (0,), prox_mode=prox_mode)
