"""Checks of user input: each error says what was expected and what came."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .groups import check_spec
from .reference import FREEZE_MODES, PROX_MODES

COEFFICIENTS = ("group_lasso", "exclusive_lasso", "l1")


def check_coefficient(name: str, value: Any) -> None:
    """A finite number >= 0, or a 0-d tensor of one."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Tensor)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a 0-d tensor, got shape {tuple(value.shape)}")
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {float(value)}")


def check_penalty(options: Mapping[str, Any]) -> None:
    """The penalty's part of a param group, or of a functional call."""
    for name in COEFFICIENTS:
        check_coefficient(name, options[name])
    check_spec(options["group_by"], options["view"])
    prox_mode = options.get("prox_mode", "sequential")
    if prox_mode not in PROX_MODES:
        raise ValueError(f"prox_mode: expected one of {PROX_MODES}, got {prox_mode!r}")


def check_param_group(group: Mapping[str, Any]) -> None:
    """The hyperparameters of one param group; the wording of the first three is torch.optim.SGD's."""
    lr = group["lr"]
    if isinstance(lr, Tensor) and lr.numel() != 1:
        raise ValueError(f"Tensor lr must be 1-element, got shape {tuple(lr.shape)}")
    for name, value in (
        ("learning rate", lr),
        ("momentum value", group["momentum"]),
        ("weight_decay value", group["weight_decay"]),
    ):
        if not value >= 0:
            raise ValueError(f"Invalid {name}: {value} (expected a number >= 0)")
    if math.isnan(group["dampening"]):
        raise ValueError("Invalid dampening value: nan (expected a number)")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"got momentum={group['momentum']}, dampening={group['dampening']}"
        )
    check_penalty(group)
    if group["freeze_zeros"] not in FREEZE_MODES:
        raise ValueError(f"freeze_zeros: expected one of {FREEZE_MODES}, got {group['freeze_zeros']!r}")
    if group["fused"] and group["differentiable"]:
        raise RuntimeError("`fused` does not support `differentiable`")
    if group["fused"] and group["foreach"]:
        raise RuntimeError("`fused` and `foreach` cannot be `True` together.")


def check_tensor(name: str, w: Any) -> None:
    """A dense real floating-point tensor that holds memory."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(w).__name__}")
    if is_lazy(w):
        raise ValueError(f"{name}: expected an initialised parameter, got a lazy one; run one batch first")
    if w.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {w.layout}")
    if not w.is_floating_point():
        raise ValueError(f"{name}: expected a real floating-point tensor, got {w.dtype}")
    if w.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with memory, got one on the meta device")


def check_distinct(names: Iterable[str], tensors: Iterable[Tensor]) -> None:
    """No tensor twice: two updates of the same memory in one pass would race."""
    seen: dict[int, str] = {}
    for name, w in zip(names, tensors):
        key = w.data_ptr() if w.numel() else -id(w)
        if key in seen:
            raise ValueError(f"{name}: expected each tensor once, got the memory of {seen[key]} again")
        seen[key] = name


def check_grad(name: str, param: Tensor, grad: Tensor) -> None:
    """A dense gradient of the parameter's shape, dtype and device."""
    if grad.layout != torch.strided:
        raise RuntimeError(
            f"{name}: expected a dense gradient, got layout {grad.layout}; sparse gradients are not supported"
        )
    if grad.shape != param.shape or grad.dtype != param.dtype or grad.device != param.device:
        raise RuntimeError(
            f"{name}: expected a gradient of shape {tuple(param.shape)}, {param.dtype} on {param.device}, "
            f"got {tuple(grad.shape)}, {grad.dtype} on {grad.device}"
        )
