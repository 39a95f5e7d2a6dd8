"""The contenders, one function each: from shapes, dtype, device and options to a step to call.

All train with momentum 0.9 on normal random weights and gradients, never zeros. The learning rate is small
enough that hundreds of steps leave the weights what they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cges_kernels import ProxSGD, reference

from .workloads import Shapes

LR, MOMENTUM = 1e-4, 0.9
COEFFICIENTS = {"group_lasso": 1e-3, "exclusive_lasso": 1e-6}


class Contender(NamedTuple):
    step: Callable[[], Any]
    params: list[Tensor]


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device).to(dtype)
    return params


def torch_sgd(shapes: Shapes, place: dict[str, Any], **options: Any) -> Contender:
    params = parameters(shapes, **place)
    return Contender(torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, **options).step, params)


def fused_sgd(shapes: Shapes, **place: Any) -> Contender:
    """torch.optim.SGD(fused=True): no proximal step at all; what an optimizer costs at the least."""
    return torch_sgd(shapes, place, fused=True)


def foreach_sgd(shapes: Shapes, **place: Any) -> Contender:
    """torch.optim.SGD(foreach=True), torch's default on a GPU; no proximal step either."""
    return torch_sgd(shapes, place, foreach=True)


def prox_sgd(
    shapes: Shapes,
    backend: str = "cpu",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Contender:
    params = parameters(shapes, dtype, device)
    options = {"lr": LR, "momentum": MOMENTUM, **COEFFICIENTS, **options}
    return Contender(ProxSGD(params, backend=backend, **options).step, params)


def eager(shapes: Shapes, **options: Any) -> Contender:
    """The reference executor: the same step written as well as plain PyTorch allows, tensor by tensor."""
    return prox_sgd(shapes, backend="reference", **options)


def compiled(
    shapes: Shapes, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any
) -> Contender:
    """torch.compile of the reference's step, tensor by tensor; a handful of graphs serves all shapes."""
    options = {"lr": LR, "momentum": MOMENTUM, **COEFFICIENTS, **options}
    params = [p.detach() for p in parameters(shapes, dtype, device)]
    grads, bufs = ([torch.randn_like(p) for p in params] for _ in range(2))

    def in_place(w: Tensor, grad: Tensor, buf: Tensor) -> None:
        new, new_buf = reference.step(w, grad, buf, **options)
        w.copy_(new)
        buf.copy_(new_buf)

    torch._dynamo.config.recompile_limit = 64  # beyond it, torch.compile goes on uncompiled without a word
    one = torch.compile(in_place)

    @torch.no_grad()
    def step() -> None:
        for tensors in zip(params, grads, bufs):
            one(*tensors)

    return Contender(step, params)


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


def plain_copy(size: int, device: str) -> Contender:
    """One copy of ``size`` bytes, which moves twice as many."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source), [])


def empty_step(shapes: Shapes, **place: Any) -> Contender:
    """An optimizer that does nothing: torch's own overhead around every step()."""

    class Empty(torch.optim.Optimizer):
        def __init__(self, params: list[Tensor]) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            pass

    params = parameters(shapes, **place)
    return Contender(Empty(params).step, params)


def rotating(make: Callable[[], Contender], sets: int) -> Contender:
    """``sets`` contenders of one kind that step in turn, so that none finds its tensors in a cache."""
    contenders = [make() for _ in range(sets)]
    turns = cycle(contenders)
    return Contender(lambda: next(turns).step(), [p for c in contenders for p in c.params])


@contextmanager
def plans_in_python() -> Iterator[None]:
    """Triton plans that are built meanwhile check their tensors in Python, as without the C++ extension."""
    from cges_kernels import triton_step

    kept, triton_step._C = triton_step._C, None
    try:
        yield
    finally:
        triton_step._C = kept
