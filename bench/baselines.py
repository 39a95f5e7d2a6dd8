"""The contenders, one function each: from shapes, dtype, device and options to a step to call.

All train with momentum 0.9 on normal random weights and gradients, never zeros. The learning rate is small
enough that hundreds of steps leave the weights what they are.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cges_kernels import ProxAdamW, ProxSGD
from cges_kernels.backends.extension import BUILT
from cges_kernels.core import reference
from cges_kernels.core.groups import has_groups, reduced_dims

from .workloads import Shapes, elements

LR, MOMENTUM = 1e-4, 0.9
COEFFICIENTS = {"group_lasso": 1e-3, "exclusive_lasso": 1e-6}
OPTIONS = {"lr": LR, "momentum": MOMENTUM, **COEFFICIENTS}
Made = tuple[Callable[[], Any], list[Tensor]]  # a step and its parameters
PAT_GROUPERS = {"feature": "Dim1Grouper", "filter": "Dim0Grouper"}  # from dimension 1 on, both flatten


class Contender(NamedTuple):
    step: Callable[[], Any]
    params: list[Tensor]
    idle: Callable[[], Callable[[], Any]]  # makes the same step with next to nothing to compute


def with_idle(make: Callable[..., Made]) -> Callable[..., Contender]:
    """``make`` as a maker of contenders; each one's idle twin has a tensor of one element for each of its."""

    @wraps(make)
    def contender(shapes: Shapes, *place: Any, **options: Any) -> Contender:
        ones: Shapes = [(1,) * len(shape) for shape in shapes]
        return Contender(*make(shapes, *place, **options), lambda: make(ones, *place, **options)[0])

    return contender


def parameters(shapes: Shapes, dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[Tensor]:
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device).to(dtype)
    return params


def torch_sgd(shapes: Shapes, place: dict[str, Any], **options: Any) -> Made:
    params = parameters(shapes, **place)
    return torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, **options).step, params


@with_idle
def fused_sgd(shapes: Shapes, **place: Any) -> Made:
    """torch.optim.SGD(fused=True): no proximal step at all; what an optimizer costs at the least."""
    return torch_sgd(shapes, place, fused=True)


@with_idle
def foreach_sgd(shapes: Shapes, **place: Any) -> Made:
    """torch.optim.SGD(foreach=True), torch's default on a GPU; no proximal step either."""
    return torch_sgd(shapes, place, foreach=True)


@with_idle
def for_loop_sgd(shapes: Shapes, **place: Any) -> Made:
    """torch.optim.SGD(foreach=False): tensor by tensor, without a proximal step."""
    return torch_sgd(shapes, place, foreach=False)


@with_idle
def fused_adamw(shapes: Shapes, **place: Any) -> Made:
    """torch.optim.AdamW(fused=True): no proximal step at all; what AdamW costs at the least."""
    params = parameters(shapes, **place)
    return torch.optim.AdamW(params, lr=LR, fused=True).step, params


def proximal(
    optimizer: type[ProxSGD] | type[ProxAdamW],
    shapes: Shapes,
    backend: str = "cpu",
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    **options: Any,
) -> Made:
    params = parameters(shapes, dtype, device)
    return optimizer(params, backend=backend, **options).step, params


@with_idle
def prox_adamw(shapes: Shapes, **options: Any) -> Made:
    return proximal(ProxAdamW, shapes, **{"lr": LR, **COEFFICIENTS, **options})


@with_idle
def prox_sgd(shapes: Shapes, **options: Any) -> Made:
    return proximal(ProxSGD, shapes, **{**OPTIONS, **options})


@with_idle
def eager(shapes: Shapes, **options: Any) -> Made:
    """The reference executor: the same step written as well as plain PyTorch allows, tensor by tensor."""
    return prox_sgd(shapes, backend="reference", **options)[:2]


@with_idle
def compiled(shapes: Shapes, dtype: torch.dtype = torch.float32, device: str = "cpu", **options: Any) -> Made:
    """torch.compile of the reference's step, tensor by tensor; a handful of graphs serves all shapes."""
    options = {**OPTIONS, **options}
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

    return step, params


@with_idle
def vectorised(
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    group_by: str = "feature",
    **options: Any,
) -> Made:
    """The step of the reference (sequential mode) as fast as plain PyTorch can: torch._foreach_* over all
    tensors, everything in place, tensor by tensor only for sums and clamps, of which foreach has none.
    """
    of = {"l1": 0.0, **OPTIONS, **options}
    lr, c = of["lr"], of["lr"] * of["l1"]
    a, b = lr * of["group_lasso"], lr * of["exclusive_lasso"]
    params = parameters(shapes, dtype, device)
    weights, grads, bufs = [p.detach() for p in params], [p.grad for p in params], []
    grouped = [has_groups(w.dim(), group_by) for w in weights]
    dims = [reduced_dims(w.dim(), group_by) for w, groups in zip(weights, grouped) if groups]

    def thresholds(u: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        if c:
            torch._foreach_sub_(u, c)
            torch._foreach_clamp_min_(u, 0.0)
        t = [x.sum(d, keepdim=True) for x, d in zip(u, dims)]
        torch._foreach_mul_(t, b)
        torch._foreach_add_(t, c)
        torch._foreach_mul_(u, u)
        s = [x.sum(d, keepdim=True) for x, d in zip(u, dims)]
        torch._foreach_rsqrt_(s)  # a zero group: infinity here, so 0 below
        torch._foreach_mul_(s, -a)
        torch._foreach_add_(s, 1.0)
        torch._foreach_clamp_min_(s, 0.0)
        return s, t

    @torch.no_grad()
    def step() -> None:
        if bufs:
            torch._foreach_mul_(bufs, of["momentum"])
            torch._foreach_add_(bufs, grads)
        else:
            bufs.extend(grad.clone() for grad in grads)
        torch._foreach_add_(weights, bufs, alpha=-lr)
        kept = [w for w, groups in zip(weights, grouped) if groups]
        if kept and (a or b or c):
            z = [w.to(reference.compute_dtype(dtype)) for w in kept]  # w itself, but for 16-bit types
            u = torch._foreach_abs(z)
            s, t = thresholds(u)
            for x, limit, memory in zip(z, t, u):
                torch.clamp(x, -limit, limit, out=memory)
            torch._foreach_sub_(z, u)  # soft(z, t)
            if a:
                torch._foreach_mul_(z, s)
            if z[0] is not kept[0]:
                torch._foreach_copy_(kept, z)
        rest = [w for w, groups in zip(weights, grouped) if not groups]
        if rest and c:
            torch._foreach_sub_(rest, [w.clamp(-c, c) for w in rest])

    return step, params


@with_idle
def pat(
    shapes: Shapes,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    group_by: str = "feature",
    reg_lambda: float = COEFFICIENTS["group_lasso"],
) -> Made:
    """torchao's prototype ``pat``: group lasso alone, around torch's fused SGD.

    Its threshold of a group of n is reg_lambda * sqrt(n) times the sum of all learning rates so far, and it
    applies it to weights that no step has shrunk (it keeps them apart). So its first step is ours at
    group_lasso = reg_lambda * sqrt(n), and the later ones are those of another method: dual averaging. At
    lr = 0 a group of zeros becomes NaN.
    """
    from torchao.prototype.pat.optim import PruneOptimizer

    params = parameters(shapes, dtype, device)
    grouped = [p for p in params if has_groups(p.dim(), group_by)]
    rest = [p for p in params if not has_groups(p.dim(), group_by)]
    kind = {"prox_type": "ProxGroupLasso", "group_type": f"dim.{PAT_GROUPERS[group_by]}"}
    groups = [{"params": grouped, **kind}, *([{"params": rest}] if rest else [])]
    inner = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, fused=True)
    return PruneOptimizer(inner, reg_lambda=reg_lambda).step, params


def others() -> dict[str, Callable[..., Contender]]:
    """What a user could pick instead, the slow ones first; torchao's where it is installed."""
    found = {"pat": pat} if importlib.util.find_spec("torchao") else {}
    return {**found, "eager": eager, "vectorised": vectorised, "compiled": compiled}


@with_idle
def copy(shapes: Shapes, dtype: torch.dtype = torch.float32, device: str = "cpu", states: int = 1) -> Made:
    """A plain copy of as many bytes as a step must move, by how many states it keeps: the speed of light."""
    source = torch.randn(elements(shapes), device=device).to(dtype)
    target = torch.empty_like(source)
    half = source.numel() // 2

    def step() -> None:  # one copy reads 4 and writes 4 bytes an element; 2.5 of them make 20, 3.5 make 28
        for i in range(1 + states):
            (target if i % 2 == 0 else source).copy_(source if i % 2 == 0 else target)
        target[:half].copy_(source[:half])

    return step, []


def plain_copy(size: int, device: str) -> Contender:
    """One copy of ``size`` bytes, which moves twice as many."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source), [], lambda: plain_copy(4, device).step)


@with_idle
def empty_step(shapes: Shapes, **place: Any) -> Made:
    """An optimizer that does nothing: torch's own overhead around every step()."""

    class Empty(torch.optim.Optimizer):
        def __init__(self, params: list[Tensor]) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            pass

    params = parameters(shapes, **place)
    return Empty(params).step, params


def rotating(make: Callable[[], Contender], sets: int) -> Contender:
    """``sets`` contenders of one kind that step in turn, so that none finds its tensors in a cache."""
    contenders = [make() for _ in range(sets)]
    turns = cycle(contenders)
    params = [p for c in contenders for p in c.params]
    return Contender(lambda: next(turns).step(), params, contenders[0].idle)


@contextmanager
def plans_in_python() -> Iterator[None]:
    """Triton plans that are built meanwhile check their tensors in Python, as without the C++ extension."""
    kept = BUILT.pop("cpu", None)
    try:
        yield
    finally:
        if kept is not None:
            BUILT["cpu"] = kept
