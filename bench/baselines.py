"""The contenders of the benchmarks. A maker takes shapes, dtype, device and options, and returns a Contender.

All train on normal random weights and gradients, never zeros. SGD has momentum 0.9. The learning rate is so
small that hundreds of steps hardly change the weights.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cges_kernels import ProxAdamW, ProxSGD
from cges_kernels.core import reference, shrinkage
from cges_kernels.core.groups import has_groups, reduced_dims

from .workloads import Shapes

FP32 = torch.float32
LR, MOMENTUM = 1e-4, 0.9
COEFFICIENTS = {"group_lasso": 1e-3, "exclusive_lasso": 1e-6}
PAT_GROUPERS = {"feature": "Dim1Grouper", "filter": "Dim0Grouper"}  # both flatten dimensions 1 and up


class Contender(NamedTuple):
    step: Callable[[], Any]
    params: list[Tensor]


Maker = Callable[..., Contender]  # takes shapes, then dtype and device by name


def parameters(shapes: Shapes, dtype: torch.dtype = FP32, device: str = "cpu") -> list[Tensor]:
    params = [torch.nn.Parameter(torch.randn(shape, device=device).to(dtype)) for shape in shapes]
    for p in params:
        p.grad = torch.randn(p.shape, device=device).to(dtype)
    return params


def torch_sgd(shapes: Shapes, dtype: torch.dtype = FP32, device: str = "cpu", **options: Any) -> Contender:
    """torch.optim.SGD, which does no proximal step at all."""
    params = parameters(shapes, dtype, device)
    return Contender(torch.optim.SGD(params, lr=LR, momentum=MOMENTUM, **options).step, params)


fused_sgd = partial(torch_sgd, fused=True)  # the cheapest step without a penalty
foreach_sgd = partial(torch_sgd, foreach=True)  # torch's default on a GPU
for_loop_sgd = partial(torch_sgd, foreach=False)


def fused_adamw(shapes: Shapes, dtype: torch.dtype = FP32, device: str = "cpu") -> Contender:
    """torch.optim.AdamW(fused=True), which does no proximal step: the cheapest AdamW without a penalty."""
    params = parameters(shapes, dtype, device)
    return Contender(torch.optim.AdamW(params, lr=LR, fused=True).step, params)


def proximal(
    optimizer: type[ProxSGD] | type[ProxAdamW],
    shapes: Shapes,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
    backend: str = "cpu",
    **options: Any,
) -> Contender:
    params = parameters(shapes, dtype, device)
    return Contender(optimizer(params, backend=backend, **{"lr": LR, **COEFFICIENTS, **options}).step, params)


prox_sgd = partial(proximal, ProxSGD, momentum=MOMENTUM)
prox_adamw = partial(proximal, ProxAdamW)
# The reference executor: the same step written as well as plain PyTorch allows, tensor by tensor.
eager = partial(prox_sgd, backend="reference")
eager_adamw = partial(prox_adamw, backend="reference")


def compiled(shapes: Shapes, dtype: torch.dtype = FP32, device: str = "cpu", **options: Any) -> Contender:
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


def vectorised(
    shapes: Shapes, dtype: torch.dtype = FP32, device: str = "cpu", group_by: str = "feature", **options: Any
) -> Contender:
    """The reference's step in sequential mode and without l1, written to be as fast as plain PyTorch allows.

    It calls torch._foreach_* over all tensors and works in place. Sums along dimensions and clamps between
    tensors go tensor by tensor, because foreach has no such operations.
    """
    of = {"lr": LR, **COEFFICIENTS, **options}
    a, b = of["lr"] * of["group_lasso"], of["lr"] * of["exclusive_lasso"]
    params = parameters(shapes, dtype, device)
    weights, grads, bufs = [p.detach() for p in params], [p.grad for p in params], []
    kept = [w for w in weights if has_groups(w.dim(), group_by)]
    dims = [reduced_dims(w.dim(), group_by) for w in kept]

    @torch.no_grad()
    def step() -> None:
        if bufs:
            torch._foreach_mul_(bufs, MOMENTUM)
            torch._foreach_add_(bufs, grads)
        else:
            bufs.extend(grad.clone() for grad in grads)
        torch._foreach_add_(weights, bufs, alpha=-of["lr"])
        if not kept:
            return
        z = [w.to(shrinkage.compute_dtype(dtype)) for w in kept]  # w itself, unless w is of a 16-bit type
        u = torch._foreach_abs(z)
        t = [x.sum(d, keepdim=True) for x, d in zip(u, dims)]
        torch._foreach_mul_(t, b)
        torch._foreach_mul_(u, u)
        s = [x.sum(d, keepdim=True) for x, d in zip(u, dims)]
        torch._foreach_rsqrt_(s)  # a zero group: infinity here, so 0 below
        torch._foreach_mul_(s, -a)
        torch._foreach_add_(s, 1.0)
        torch._foreach_clamp_min_(s, 0.0)
        for x, limit, memory in zip(z, t, u):
            torch.clamp(x, -limit, limit, out=memory)
        torch._foreach_sub_(z, u)  # soft(z, t)
        if a:
            torch._foreach_mul_(z, s)
        if z[0] is not kept[0]:
            torch._foreach_copy_(kept, z)

    return Contender(step, params)


def pat(
    shapes: Shapes,
    dtype: torch.dtype = FP32,
    device: str = "cpu",
    group_by: str = "feature",
    reg_lambda: float = COEFFICIENTS["group_lasso"],
) -> Contender:
    """torchao's prototype ``pat``: group lasso alone, around torch's fused SGD.

    Its threshold for a group of n is reg_lambda * sqrt(n) times the sum of all learning rates so far, and it
    applies it to weights that it keeps apart and that no step has shrunk. So its first step is ours at
    group_lasso = reg_lambda * sqrt(n), and the later ones are those of another method, dual averaging. At
    lr = 0 a group of zeros becomes NaN.
    """
    from torchao.prototype.pat.optim import PruneOptimizer

    params = parameters(shapes, dtype, device)
    kind = {"prox_type": "ProxGroupLasso", "group_type": f"dim.{PAT_GROUPERS[group_by]}"}
    grouped, rest = ([p for p in params if has_groups(p.dim(), group_by) == wish] for wish in (True, False))
    groups = [{"params": grouped, **kind}, *([{"params": rest}] if rest else [])]
    inner = torch.optim.SGD(groups, lr=LR, momentum=MOMENTUM, fused=True)
    return Contender(PruneOptimizer(inner, reg_lambda=reg_lambda).step, params)


def others() -> dict[str, Maker]:
    """The alternatives that a user could pick, fast ones first, with torchao's if it is installed."""
    found = {"foreach": foreach_sgd, "compiled": compiled, "vectorised": vectorised, "eager": eager}
    return {**found, "pat": pat} if importlib.util.find_spec("torchao") else found


def plain_copy(size: int, device: str) -> Contender:
    """One copy of ``size`` bytes, which moves twice as many."""
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return Contender(lambda: target.copy_(source), [])


def empty_step(shapes: Shapes, dtype: torch.dtype = FP32, device: str = "cpu") -> Contender:
    """An optimizer that does nothing: torch's own overhead around every step()."""

    class Empty(torch.optim.Optimizer):
        def __init__(self, params: list[Tensor]) -> None:
            super().__init__(params, {})

        def step(self, closure: Any = None) -> None:
            pass

    params = parameters(shapes, dtype, device)
    return Contender(Empty(params).step, params)
