"""Checks of user input: each error says what was expected and what was given.

The optimizers, the planner, the plans and the functional calls use them before anything is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from . import hyperparameters
from .groups import GroupedLayout, GroupSpec, check_spec, grouped_layout
from .hyperparameters import COEFFICIENTS, FREEZE_MODES, INITIAL, PROX_MODES
from .numbers import check_coefficient, check_not_negative, check_number, scalar
from .rules import RULES, STEP, Rule
from .tensors import holds_values, is_freed

FLAGS = ("skip_dead", "differentiable", "capturable")  # beside those of the rule
WISHES = ("foreach", "fused")  # like FLAGS, but None leaves the choice to the package
BOOLS = (bool, np.bool_)
SCALARS = frozenset(hyperparameters.SCALARS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_penalty(options: Mapping[str, Any]) -> None:
    """Check the penalty's keys in a param group, or the arguments of a functional call."""
    for name in COEFFICIENTS:
        check_coefficient(name, options[name])
    check_spec(options["group_by"], options["view"])
    prox_mode = options.get("prox_mode", "sequential")
    if prox_mode not in PROX_MODES:
        raise ValueError(f"prox_mode: expected one of {PROX_MODES}, got {prox_mode!r}")


def check_changed(rule: Rule, group: Mapping[str, Any], changed: Collection[str]) -> None:
    """check_param_group, given that all keys but `changed` were checked before; cheap for SCALARS."""
    if not SCALARS.issuperset(changed):
        return check_param_group(rule, group)
    for name in changed:
        if name == "lr":
            check_number(name, group[name])
            check_not_negative("learning rate", scalar(name, group[name]))
        else:
            check_coefficient(name, group[name])


def check_flags(rule: Rule, group: Mapping[str, Any]) -> None:
    """Raise a TypeError for a flag that is no bool, because "no" or [] would count as one of the two."""
    of_rule = [key for key, default in rule.options.items() if isinstance(default, bool)]
    for names, served, expected in (
        ((*FLAGS, *of_rule), BOOLS, "a bool"),
        (WISHES, (*BOOLS, type(None)), "a bool or None"),
    ):
        for name in names:
            if not isinstance(group.get(name, False), served):
                raise TypeError(f"{name}: expected {expected}, got {group[name]!r}")


def check_param_group(rule: Rule, group: Mapping[str, Any]) -> None:
    """Check the hyperparameters of one param group; errors for bad values are in torch.optim's words."""
    check_number("lr", group["lr"])
    check_flags(rule, group)
    check_not_negative("learning rate", scalar("lr", group["lr"]))
    rule.check(group)
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
    for key in rule.reference_only:
        if group["fused"] and group[key]:
            raise RuntimeError(f"fused=True: expected {key}=False, which the reference alone has, got True")


def check_tensor(name: str, w: Any) -> None:
    """Raise an error unless `w` is a dense, real floating-point tensor that holds memory."""
    if not isinstance(w, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(w).__name__}")
    if torch.compiler.is_compiling():
        return  # torch.compile cannot trace the checks below
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
    """Raise a ValueError if two tensors are the same or share memory, because their updates would race.

    The tensors must be dense.
    """
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
    """Check a gradient or state `x` of `param`, and return it.

    It must be dense and have the parameter's shape and device, and `dtype` where that is given. `what` names
    it in errors.
    """
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


class Inputs(NamedTuple):
    """The inputs of a parameter's step besides its weights: the gradient, its states and its count of steps.

    `states` is () and `step` is None if they have not begun.
    """

    grad: Tensor
    states: tuple[Tensor, ...] = ()
    step: Tensor | None = None


def checked_inputs(
    name: str,
    param: Tensor,
    entry: Mapping[str, Any],
    rule: Rule,
    options: Mapping[str, Any],
    dtype: torch.dtype | None = None,
) -> Inputs:
    """A parameter's gradient and the rule's states in `entry`, its optimizer state, after checks.

    The gradient must exist. Where the rule keeps no state with these `options`, none is returned. Where
    `dtype` is given, gradient and states must have it.
    """
    grad = check_companion("gradient", name, param, param.grad, dtype)
    names = rule.states_with(options)
    if not any(entry.get(key) is not None for key in (*names, *([STEP] if rule.counts else []))):
        return Inputs(grad)
    step = check_step(name, param, entry) if rule.counts else None
    return Inputs(grad, tuple(_check_state(key, name, param, entry, dtype) for key in names), step)


def check_begun(rule: str, name: str, param: Tensor, entry: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Raise the errors of a fused step for the states in `entry`, if the rule's states have begun."""
    for key in RULES[rule].states:
        _check_state(key, name, param, entry, dtype)
    if RULES[rule].counts:
        check_step(name, param, entry)


def check_states(name: str, param: Tensor, entry: Mapping[str, Any], rule: Rule) -> None:
    """Check that the states in `entry` fit the parameter, and that they are not another rule's."""
    begun = [key for key in rule.states if entry.get(key) is not None]
    for key in begun:
        _check_state(key, name, param, entry)
    if rule.counts and (begun or STEP in entry):
        check_step(name, param, entry)
    others = {key for other in RULES.values() for key in other.states if key not in rule.states}
    if not begun and any(entry.get(key) is not None for key in others):
        raise RuntimeError(
            f"{name}: expected {', '.join(rule.states)} as its state, got {', '.join(sorted(entry))}, "
            "another optimizer's"
        )


def check_step(name: str, param: Tensor, entry: Mapping[str, Any]) -> Tensor:
    """A parameter's count of steps after checks: one element, on the CPU or the parameter's device."""
    step = entry.get(STEP)
    if not isinstance(step, Tensor):
        raise TypeError(f"{name}: expected a tensor as its {STEP}, got {type(step).__name__}")
    if step.numel() != 1 or step.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(
            f"{name}: expected a {STEP} of one element, torch.float32 or torch.float64, "
            f"got {tuple(step.shape)}, {step.dtype}"
        )
    if step.device not in (torch.device("cpu"), param.device):
        raise RuntimeError(f"{name}: expected its {STEP} on cpu or {param.device}, got it on {step.device}")
    if step.device.type != "cpu" and step.dtype != torch.float32:
        raise RuntimeError(f"{name}: expected its {STEP} in torch.float32 on {step.device}, got {step.dtype}")
    return step


def _check_state(
    key: str, name: str, param: Tensor, entry: Mapping[str, Any], dtype: torch.dtype | None = None
) -> Tensor:
    """One state of a parameter after checks; a RuntimeError if it is missing."""
    if entry.get(key) is None:
        raise RuntimeError(f"{name}: expected its {key} beside {', '.join(sorted(entry))}, got none")
    return check_companion(key, name, param, entry[key], dtype)


def named_layouts(
    names: Sequence[str], tensors: Sequence[Tensor], group_by: GroupSpec, view: Sequence[int] | None
) -> list[GroupedLayout]:
    """The layout of each tensor under a spec; an error names the tensor."""
    layouts = []
    for name, w in zip(names, tensors):
        check_tensor(name, w)
        try:
            layouts.append(grouped_layout(w, group_by, view))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    return layouts
