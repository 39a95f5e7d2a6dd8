"""Checks of user input: each error says what was expected and what came."""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import hyperparameters
from .groups import GroupedLayout, GroupSpec, check_spec, grouped_layout
from .hyperparameters import COEFFICIENTS, FREEZE_MODES, INITIAL, PROX_MODES, SGD_STATE, scalar
from .tensors import holds_values, is_freed

FLAGS = ("nesterov", "maximize", "differentiable", "capturable")
WISHES = ("foreach", "fused")
SCALARS = frozenset(hyperparameters.SCALARS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_coefficient(name: str, value: Any) -> None:
    """A finite number >= 0, or a tensor of one."""
    if type(value) is float and 0 <= value < math.inf:
        return  # nearly always, and quickly, as schedules change many
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a 1-element tensor, got shape {tuple(value.shape)}")
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise TypeError(f"{name}: expected a number or a floating-point tensor, got {value.dtype}")
    number = float(scalar(name, value))
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {number}")


def check_penalty(options: Mapping[str, Any]) -> None:
    """The penalty's part of a param group, or of a functional call."""
    for name in COEFFICIENTS:
        check_coefficient(name, options[name])
    check_spec(options["group_by"], options["view"])
    prox_mode = options.get("prox_mode", "sequential")
    if prox_mode not in PROX_MODES:
        raise ValueError(f"prox_mode: expected one of {PROX_MODES}, got {prox_mode!r}")


def _check_not_negative(name: str, value: Any) -> None:
    if not value >= 0:
        raise ValueError(f"Invalid {name}: {value} (expected a number >= 0)")


def check_changed(group: Mapping[str, Any], changed: Collection[str]) -> None:
    """check_param_group where all but the keys ``changed`` were checked before; cheap for SCALARS."""
    if not SCALARS.issuperset(changed):
        return check_param_group(group)
    for name in changed:
        if name == "lr":
            check_number(name, group[name])
            _check_not_negative("learning rate", scalar(name, group[name]))
        else:
            check_coefficient(name, group[name])


def check_number(name: str, value: Any) -> None:
    """TypeError unless it is a number, of Python or NumPy, or a tensor; text that spells one is none."""
    if not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_flags(group: Mapping[str, Any]) -> None:
    """TypeError where text stands for a bool: any text would count as True."""
    for names, expected in ((FLAGS, "a bool"), (WISHES, "a bool or None")):
        for name in names:
            if isinstance(group.get(name), (str, bytes)):
                raise TypeError(f"{name}: expected {expected}, got {group[name]!r}")


def check_param_group(group: Mapping[str, Any]) -> None:
    """The hyperparameters of one param group; the wording of bad values is torch.optim.SGD's."""
    for name in ("lr", "momentum", "dampening", "weight_decay"):
        check_number(name, group[name])
    check_flags(group)
    _check_not_negative("learning rate", scalar("lr", group["lr"]))
    _check_not_negative("momentum value", group["momentum"])
    _check_not_negative("weight_decay value", group["weight_decay"])
    if math.isnan(group["dampening"]):
        raise ValueError("Invalid dampening value: nan (expected a number)")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"got momentum={group['momentum']}, dampening={group['dampening']}"
        )
    check_penalty(group)
    for initial in INITIAL.values():
        if initial in group:
            check_coefficient(initial, group[initial])
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
    if torch.compiler.is_compiling():
        return  # what follows cannot be traced
    if is_lazy(w):
        raise ValueError(f"{name}: expected an initialised parameter, got a lazy one; run one batch first")
    if w.layout != torch.strided:
        raise ValueError(f"{name}: expected a dense tensor, got layout {w.layout}")
    if w.dtype not in DTYPES:
        served = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(f"{name}: expected a real floating-point tensor ({served}), got {w.dtype}")
    if w.device.type == "meta":
        raise ValueError(f"{name}: expected a tensor with memory, got one on the meta device")
    if w.is_neg():
        raise ValueError(f"{name}: expected a tensor that holds its values, got a lazily negated view")
    if is_freed(w):
        raise ValueError(f"{name}: expected a tensor with memory, got one whose memory is freed")


def check_distinct(names: Sequence[str], tensors: Sequence[Tensor]) -> None:
    """No tensor and no memory twice: two updates of it in one pass would race. The tensors are dense."""
    seen: dict[int, str] = {}
    for name, w in zip(names, tensors):
        if seen.setdefault(id(w), name) != name:
            raise ValueError(f"{name}: expected each tensor once, got the same as {seen[id(w)]} again")
    order = {name: i for i, name in enumerate(names)}
    ranges = sorted(
        (w.data_ptr(), w.data_ptr() + w.nbytes, name)
        for name, w in zip(names, tensors)
        if w.numel() and holds_values(w) and not is_traceable_wrapper_subclass(w)
    )
    for (_, end, name), (start, _, other) in itertools.pairwise(ranges):
        if start < end:
            first, second = sorted((name, other), key=order.__getitem__)
            raise ValueError(f"{second}: expected each tensor once, got memory that {first} has too")


def check_companion(what: str, name: str, param: Tensor, x: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A gradient or buffer: dense, of the parameter's shape and device, and of ``dtype`` where given."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor as its {what}, got {type(x).__name__}")
    if x.layout != torch.strided:
        raise RuntimeError(f"{name}: expected a dense {what}, got layout {x.layout}; sparse is not supported")
    dtype = dtype or x.dtype
    if x.shape != param.shape or x.dtype != dtype or x.device != param.device:
        raise RuntimeError(
            f"{name}: expected a {what} of shape {tuple(param.shape)}, {dtype} on {param.device}, "
            f"got {tuple(x.shape)}, {x.dtype} on {x.device}"
        )
    if is_traceable_wrapper_subclass(x) and not is_traceable_wrapper_subclass(param):
        raise RuntimeError(f"{name}: expected a plain tensor as its {what}, got {type(x).__name__}")
    if is_freed(x):
        raise RuntimeError(f"{name}: expected a {what} that holds memory, got none")
    return x


def checked_inputs(
    name: str, param: Tensor, entry: Mapping[str, Any], keeps_state: bool, dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor | None]:
    """A parameter's gradient, which is there, and the buffer that ``entry``, its optimizer state, may hold.

    Where the rule keeps no state there is none; with ``dtype`` both must be of that.
    """
    grad = check_companion("gradient", name, param, param.grad, dtype)
    buf = entry.get(SGD_STATE) if keeps_state else None
    if buf is not None:
        check_companion(SGD_STATE, name, param, buf, dtype)
    return grad, buf


def named_layouts(
    names: Sequence[str], tensors: Sequence[Tensor], group_by: GroupSpec, view: Sequence[int] | None
) -> list[GroupedLayout]:
    """grouped_layout of each tensor; an error names the tensor."""
    layouts = []
    for name, w in zip(names, tensors):
        check_tensor(name, w)
        try:
            layouts.append(grouped_layout(w, group_by, view))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return layouts
