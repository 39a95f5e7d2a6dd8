"""The update rules in Triton, and the scalars that they read from the tables.

The functions have the names of core/updates.py and csrc/common/sgd.h and adamw.h. Kernels are compiled for
the two functions of one of RULES: as LOAD and UPDATE.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import triton
import triton.language as tl

from ...core.rules import ADAMW, SGD
from .tables import (
    ADDRESS_LR,
    FIRST,
    HYPER_BETA2,
    HYPER_COLUMNS,
    HYPER_COUPLED_DECAY,
    HYPER_DECOUPLED_DECAY,
    HYPER_EPS,
    HYPER_GRAD_SIGN,
    HYPER_LR,
    HYPER_MOMENTUM,
    HYPER_NESTEROV,
    HYPER_NUMBERS,
    HYPER_ONE_MINUS_BETA1,
    HYPER_ONE_MINUS_BETA2,
    HYPER_ONE_MINUS_DAMPENING,
    HYPER_WEIGHT_DECAY,
    PROX_ALONE,
    RUNNING,
    SHAPE_COLUMNS,
    SHAPE_HYPER,
    SKIPPED,
    TENSOR_COLUMNS,
    TENSOR_PHASE,
    TENSOR_RATIO,
    TENSOR_ROOT,
)


@triton.jit
def divide(x, y):
    """x / y, correctly rounded."""
    if y.dtype == tl.float64:
        return x / y
    else:
        return tl.div_rn(x, y)


@triton.jit
def square_root(x):
    """The square root of x, correctly rounded."""
    if x.dtype == tl.float64:
        return tl.sqrt(x)
    else:
        return tl.sqrt_rn(x)


@triton.jit
def hyper_row(hyper, shape):
    """The row of `hyper` that a tensor takes."""
    return hyper + tl.load(shape + SHAPE_HYPER) * HYPER_COLUMNS


@triton.jit
def load_number(row, column: tl.constexpr, source: tl.constexpr):
    """The number in a column of the row, or the float32 at the row's address `source`, if there is one."""
    value = tl.load(row + column)
    address = tl.load((row + HYPER_NUMBERS).to(tl.pointer_type(tl.int64)) + source)
    there = tl.load(address.to(tl.pointer_type(tl.float32)), mask=address != 0, other=0.0)
    return tl.where(address != 0, there.to(value.dtype), value)


@triton.jit
def load_grad_sign(row, grad_scale):
    """The factor on gradients: 1, or -1 to maximize, divided by the gradient scale."""
    sign = tl.load(row + HYPER_GRAD_SIGN)
    return divide(sign, tl.load(grad_scale).to(sign.dtype))


# SGD


def fill_sgd(row: np.ndarray, options: Mapping[str, Any]) -> None:
    """Write SGD's numbers into a row of `hyper`."""
    row[HYPER_MOMENTUM] = options["momentum"]
    row[HYPER_ONE_MINUS_DAMPENING] = 1 - options["dampening"]
    row[HYPER_WEIGHT_DECAY] = options["weight_decay"]
    row[HYPER_NESTEROV] = options["nesterov"]


@triton.jit
def load_sgd(tensor, row, grad_scale):
    """The scalars of sgd_update."""
    lr, momentum = load_number(row, HYPER_LR, ADDRESS_LR), tl.load(row + HYPER_MOMENTUM)
    one_minus_dampening, nesterov = tl.load(row + HYPER_ONE_MINUS_DAMPENING), tl.load(row + HYPER_NESTEROV)
    weight_decay, grad_sign = tl.load(row + HYPER_WEIGHT_DECAY), load_grad_sign(row, grad_scale)
    return lr, momentum, one_minus_dampening, weight_decay, grad_sign, nesterov


@triton.jit
def sgd_update(w, grad, states, phase, sgd):
    """(z, (new momentum buffer,)) of torch.optim.SGD."""
    lr, momentum, one_minus_dampening, weight_decay, grad_sign, nesterov = sgd
    g = grad_sign * grad
    g = tl.where(weight_decay != 0, g + weight_decay * w, g)
    new = tl.where(phase == RUNNING, momentum * states[0] + one_minus_dampening * g, g)
    step = tl.where(phase >= FIRST, tl.where(nesterov != 0, g + momentum * new, new), g)
    return tl.where(phase == PROX_ALONE, w, w - lr * step), (new,)


# AdamW


@triton.jit
def lerp(start, end, weight):
    """start + weight * (end - start), from whichever end is nearer, as in torch.lerp."""
    apart = end - start
    return tl.where(weight < 0.5, start + weight * apart, end - (1 - weight) * apart)


def fill_adamw(row: np.ndarray, options: Mapping[str, Any]) -> None:
    """Write AdamW's numbers into a row of `hyper`."""
    beta1, beta2 = map(float, options["betas"])
    row[HYPER_ONE_MINUS_BETA1] = 1 - beta1
    row[HYPER_BETA2], row[HYPER_ONE_MINUS_BETA2] = beta2, 1 - beta2
    row[HYPER_EPS] = options["eps"]
    decoupled = options["decoupled_weight_decay"]
    row[HYPER_DECOUPLED_DECAY if decoupled else HYPER_COUPLED_DECAY] = options["weight_decay"]


@triton.jit
def load_adamw(tensor, row, grad_scale):
    """The scalars of adamw_update; see csrc/common/adamw.h."""
    lr = load_number(row, HYPER_LR, ADDRESS_LR)
    ratio = tl.load(tensor + TENSOR_RATIO).to(tl.float64, bitcast=True)
    root = tl.load(tensor + TENSOR_ROOT).to(tl.float64, bitcast=True)
    step_size = (lr.to(tl.float64) * ratio).to(lr.dtype)
    eps = (tl.load(row + HYPER_EPS).to(tl.float64) * root).to(lr.dtype)
    kept = 1 - lr * tl.load(row + HYPER_DECOUPLED_DECAY)
    weight, decay = tl.load(row + HYPER_ONE_MINUS_BETA1), tl.load(row + HYPER_COUPLED_DECAY)
    beta2, one_minus_beta2 = tl.load(row + HYPER_BETA2), tl.load(row + HYPER_ONE_MINUS_BETA2)
    return step_size, eps, kept, decay, weight, beta2, one_minus_beta2, load_grad_sign(row, grad_scale)


@triton.jit
def adamw_update(w, grad, states, phase, adamw):
    """(z, (new exp_avg, new exp_avg_sq)) of torch.optim.AdamW."""
    step_size, eps, kept, decay, weight, beta2, one_minus_beta2, grad_sign = adamw
    g = grad_sign * grad
    g = tl.where(decay != 0, g + decay * w, g)
    exp_avg = tl.where(phase == RUNNING, states[0], 0.0)
    exp_avg_sq = tl.where(phase == RUNNING, states[1], 0.0)
    exp_avg = lerp(exp_avg, g, weight)
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * g * g
    z = kept * w - divide(step_size * exp_avg, square_root(exp_avg_sq) + eps)
    return tl.where(phase == PROX_ALONE, w, z), (exp_avg, exp_avg_sq)


@triton.jit
def count_steps(tensors, shapes, hyper, counts, found_inf, n, by, BLOCK: tl.constexpr):
    """Count the steps of tensors whose counts lie on the device, and write AdamW's numbers for these counts.

    `counts` holds for each tensor the address of a float32, or 0 where the host counts. An overflow is no
    step. `by` is 1.0, or -1.0 to take the count back if no other kernel could be launched.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tensor, address = tensors + i * TENSOR_COLUMNS, tl.load(counts + i, i < n, other=0)
    counted = (address != 0) & (tl.load(tensor + TENSOR_PHASE, i < n, other=-1) > SKIPPED)
    at = address.to(tl.pointer_type(tl.float32))
    count = tl.load(at, counted, other=0.0) + tl.where(tl.load(found_inf) != 0, 0.0, by)
    tl.store(at, count, counted)
    row = hyper + tl.load(shapes + i * SHAPE_COLUMNS + SHAPE_HYPER, i < n, other=0) * HYPER_COLUMNS
    c1 = come_so_far(tl.load(row + HYPER_ONE_MINUS_BETA1), count)
    root = tl.sqrt(come_so_far(tl.load(row + HYPER_ONE_MINUS_BETA2), count))
    tl.store(tensor + TENSOR_RATIO, (root / c1).to(tl.int64, bitcast=True), counted)
    tl.store(tensor + TENSOR_ROOT, root.to(tl.int64, bitcast=True), counted)


@triton.jit
def come_so_far(one_minus_beta, count):
    """1 - beta^count in float64, given 1 - beta, which is not 0."""
    beta = 1 - one_minus_beta.to(tl.float64)
    log = tl.log(tl.where(beta > 0, beta, 1.0))
    return tl.where(beta > 0, 1 - tl.exp(count.to(tl.float64) * log), 1.0)


class KernelRule(NamedTuple):
    """An update rule as the Triton executor takes it."""

    fill: Callable[[np.ndarray, Mapping[str, Any]], None]  # writes the rule's options into a row of `hyper`
    load: Any  # load(tensor, row, grad_scale): the scalars that `update` takes
    update: Any  # update(w, grad, states, phase, scalars): (z, new states)


RULES = {
    SGD.name: KernelRule(fill_sgd, load_sgd, sgd_update),
    ADAMW.name: KernelRule(fill_adamw, load_adamw, adamw_update),
}
