"""Checks of user input: each error says what was expected and what came."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

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

FLAGS = (
    *("nesterov", "amsgrad", "decoupled_weight_decay", "maximize"),
    *("skip_dead", "differentiable", "capturable"),
)
WISHES = ("foreach", "fused")
SCALARS = frozenset(hyperparameters.SCALARS)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def check_penalty(options: Mapping[str, Any]) -> None:
    """The penalty's part of a param group, or of a functional call."""
    for name in COEFFICIENTS:
        check_coefficient(name, options[name])
    check_spec(options["group_by"], options["view"])
    prox_mode = options.get("prox_mode", "sequential")
    if prox_mode not in PROX_MODES:
        raise ValueError(f"prox_mode: expected one of {PROX_MODES}, got {prox_mode!r}")


def check_changed(rule: Rule, group: Mapping[str, Any], changed: Collection[str]) -> None:
    """check_param_group where all but the keys ``changed`` were checked before; cheap for SCALARS."""
    if not SCALARS.issuperset(changed):
        return check_param_group(rule, group)
    for name in changed:
        if name == "lr":
            check_number(name, group[name])
            check_not_negative("learning rate", scalar(name, group[name]))
        else:
            check_coefficient(name, group[name])


def check_flags(group: Mapping[str, Any]) -> None:
    """TypeError where text stands for a bool: any text would count as True."""
    for names, expected in ((FLAGS, "a bool"), (WISHES, "a bool or None")):
        for name in names:
            if isinstance(group.get(name), (str, bytes)):
                raise TypeError(f"{name}: expected {expected}, got {group[name]!r}")


def check_param_group(rule: Rule, group: Mapping[str, Any]) -> None:
    """The hyperparameters of one param group; the wording of bad values is torch.optim's."""
    check_number("lr", group["lr"])
    check_flags(group)
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


class Inputs(NamedTuple):
    """What a step of a parameter reads beside it: the gradient, and its states; (), None: not begun."""

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
    """A parameter's gradient, which is there, and what ``entry``, its optimizer state, holds of the rule's.

    Where the rule keeps no state there is none; with ``dtype`` gradient and states must be of that.
    """
    grad = check_companion("gradient", name, param, param.grad, dtype)
    names = rule.states_with(options)
    if not any(entry.get(key) is not None for key in (*names, *([STEP] if rule.counts else []))):
        return Inputs(grad)
    step = check_step(name, param, entry) if rule.counts else None
    return Inputs(grad, tuple(_check_state(key, name, param, entry, dtype) for key in names), step)


def check_begun(rule: str, name: str, param: Tensor, entry: Mapping[str, Any], dtype: torch.dtype) -> None:
    """Whatever a fused step would refuse of the states in ``entry``, of which there are some."""
    for key in RULES[rule].states:
        _check_state(key, name, param, entry, dtype)
    if RULES[rule].counts:
        check_step(name, param, entry)


def check_states(name: str, param: Tensor, entry: Mapping[str, Any], rule: Rule) -> None:
    """Whatever ``entry`` holds of the rule's states fits the parameter, and is this rule's at all."""
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
    """The count of a parameter's steps: a tensor of one element on the CPU, or where the parameter is."""
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
    if entry.get(key) is None:
        raise RuntimeError(f"{name}: expected its {key} beside {', '.join(sorted(entry))}, got none")
    return check_companion(key, name, param, entry[key], dtype)


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
