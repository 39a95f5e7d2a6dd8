"""The update rules in plain PyTorch: what torch.optim.SGD and torch.optim.AdamW do to one tensor.

Each is a function of the weights, the gradient and the rule's states (None: not begun). It returns z, which
the prox takes next, and the new states. It runs torch's operations in torch's order, so that its bits are
those of torch's for-loop (`foreach=False`). It changes nothing in place and is differentiable. rules.py adds
each rule's options, states and checks.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

Scalar: TypeAlias = float | Tensor  # a tensor where autograd follows a hyperparameter


def sgd_update(
    w: Tensor,
    grad: Tensor,
    buf: Tensor | None = None,
    *,
    lr: Scalar,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`(z, new momentum buffer)` of torch.optim.SGD."""
    if maximize:
        grad = -grad
    if weight_decay != 0:
        grad = grad.add(w, alpha=weight_decay)
    if momentum != 0:
        buf = grad.detach().clone() if buf is None else buf.mul(momentum).add_(grad, alpha=1 - dampening)
        grad = grad.add(buf, alpha=momentum) if nesterov else buf
    if isinstance(lr, Tensor) and lr.requires_grad:
        return w.addcmul(grad, lr, value=-1), buf
    return w.add(grad, alpha=-float(lr)), buf


def adamw_update(
    w: Tensor,
    grad: Tensor,
    exp_avg: Tensor | None = None,
    exp_avg_sq: Tensor | None = None,
    max_exp_avg_sq: Tensor | None = None,
    *,
    step: Scalar,
    lr: Scalar,
    betas: tuple[Scalar, Scalar] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: Scalar = 1e-2,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = True,
) -> tuple[Tensor, ...]:
    """`(z, new exp_avg, new exp_avg_sq)` of torch.optim.AdamW or Adam; with amsgrad also the new
    max_exp_avg_sq.

    `step` counts the tensor's steps, this one included. A tensor as `step` selects the formula that torch
    uses for `capturable=True` and `differentiable=True`, which rounds differently.
    """
    beta1, beta2 = betas
    if exp_avg is None or exp_avg_sq is None:
        exp_avg, exp_avg_sq = torch.zeros_like(w), torch.zeros_like(w)
    if maximize:
        grad = -grad
    if weight_decay != 0 and decoupled_weight_decay:
        w = w.mul(1 - lr * weight_decay).to(w.dtype)
    elif weight_decay != 0:
        if isinstance(weight_decay, Tensor) and weight_decay.requires_grad:
            grad = grad.addcmul(w, weight_decay)
        else:
            grad = grad.add(w, alpha=float(weight_decay))
    exp_avg = exp_avg.lerp(grad, 1 - beta1.to(w) if isinstance(beta1, Tensor) else float(1 - beta1))
    if isinstance(beta2, Tensor) and beta2.requires_grad:
        exp_avg_sq = exp_avg_sq.lerp(grad.square(), 1 - beta2)
    else:
        exp_avg_sq = exp_avg_sq.mul(beta2).to(w.dtype).addcmul_(grad, grad, value=float(1 - beta2))
    states: tuple[Tensor, ...] = (exp_avg, exp_avg_sq)
    largest = exp_avg_sq
    if amsgrad:
        before = torch.zeros_like(w) if max_exp_avg_sq is None else max_exp_avg_sq
        largest = torch.maximum(before, exp_avg_sq)
        states = (exp_avg, exp_avg_sq, largest)
    correction1, correction2 = 1 - beta1**step, 1 - beta2**step
    step_size = lr / correction1
    if isinstance(step, Tensor):
        negative = -step_size
        denominator = (largest.sqrt() / (correction2.sqrt() * negative)).add_(eps / negative)
        return w.addcdiv(exp_avg, denominator), *states
    denominator = (largest.sqrt() / correction2**0.5).add_(eps)
    if isinstance(step_size, Tensor) and step_size.requires_grad:
        return w - step_size * (exp_avg / denominator), *states
    return w.addcdiv(exp_avg, denominator, value=-float(step_size)), *states
