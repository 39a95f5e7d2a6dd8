"""The contenders, one function each: from shapes and options to a step to call and what it changes.

All train with momentum 0.9 on normal random weights and gradients, never zeros. The learning rate is small
enough that hundreds of steps leave the weights what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cges_kernels import ProxSGD

from .workloads import Shapes

LR, MOMENTUM = 1e-4, 0.9
COEFFICIENTS = {"group_lasso": 1e-3, "exclusive_lasso": 1e-6}


class Contender(NamedTuple):
    step: Callable[[], Any]
    params: list[Tensor]


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    params = [torch.nn.Parameter(torch.randn(shape).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape).to(dtype)
    return params


def fused_sgd(shapes: Shapes, **_: Any) -> Contender:
    """torch.optim.SGD(fused=True): no proximal step at all; what an optimizer costs at the least."""
    params = parameters(shapes)
    return Contender(torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, fused=True).step, params)


def prox_sgd(shapes: Shapes, backend: str = "cpu", **options: Any) -> Contender:
    params = parameters(shapes)
    options = {"lr": LR, "momentum": MOMENTUM, **COEFFICIENTS, **options}
    return Contender(ProxSGD(params, backend=backend, **options).step, params)


def eager(shapes: Shapes, **options: Any) -> Contender:
    """The reference executor: the same step written as well as plain PyTorch allows, tensor by tensor."""
    return prox_sgd(shapes, backend="reference", **options)


def copy(shapes: Shapes, **_: Any) -> Contender:
    """A plain copy of as many bytes as a step must move (20 per fp32 element): the speed of light."""
    sources = parameters(shapes)
    pairs = [(torch.empty_like(p), p.detach()) for p in sources]

    def step() -> None:  # one copy reads 4 and writes 4 bytes an element; 2.5 of them make 20
        for target, source in pairs:
            target.copy_(source)
            source.copy_(target)
            half = source.numel() // 2
            target.view(-1)[:half].copy_(source.view(-1)[:half])

    return Contender(step, [])


def empty_step(shapes: Shapes, **_: Any) -> Contender:
    """An optimizer that does nothing: torch's own overhead around every step()."""

    class Empty(torch.optim.Optimizer):
        def __init__(self, params: list[Tensor]) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            pass

    params = parameters(shapes)
    return Contender(Empty(params).step, params)
