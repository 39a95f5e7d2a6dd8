"""Makes the states of a parameter with which a rule begins."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import _get_scalar_dtype


def new_like(p: Tensor) -> Tensor:
    """Uninitialised memory of the shape, dtype and memory order of `p`, as a plain tensor."""
    return torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)


def new_step(p: Tensor, options: Mapping[str, Any]) -> Tensor:
    """A count of steps for `p`, 0 so far, on the device where torch.optim keeps it.

    With `capturable` or `fused` it is on the parameter's device, where kernels read it.
    """
    if options["capturable"] or options["fused"]:
        is_float = options["fused"] or p.device.type != "cpu"  # kernels read float32 alone
        return torch.zeros((), dtype=_get_scalar_dtype(is_fused=is_float), device=p.device)
    return torch.zeros((), dtype=_get_scalar_dtype(), device="cpu")
