"""The states of a parameter that a step begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype


def new_like(p: Tensor) -> Tensor:
    """Uninitialised memory in p's memory order, whatever p's class."""
    return torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)


def new_step(p: Tensor, options: Mapping[str, Any]) -> Tensor:
    """A count of p's steps, 0 so far, where torch.optim has it: with p where kernels are to read it."""
    if options["capturable"] or options["fused"]:
        is_float = options["fused"] or p.device.type != "cpu"  # kernels read no other
        return torch.zeros((), dtype=_get_scalar_dtype(is_fused=is_float), device=p.device)
    return torch.zeros((), dtype=_get_scalar_dtype(), device="cpu")
