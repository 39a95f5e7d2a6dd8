"""The step and the proximal map as operators of torch.library, which torch.compile calls in its graphs.

An operator keeps no plan, so it checks its inputs anew at each call. It cannot take an optimizer, so `step_`
takes lists:

    groups     the index of each parameter's param group
    numbers    for each param group the numbers that `numbers_of` makes
    sources    for each param group its SCALARS that are tensors, and None for those that are numbers
    options    for each param group the values of OPTIONS as text
    states     the states of parameters for which the rule keeps some, parameter by parameter
    steps      their counts of steps, if the rule counts
    first      for each parameter with states, whether they have not begun yet

`prox_` takes the arguments of functional.prox_.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..core.checks import check_companion, check_distinct, check_param_group, check_penalty, check_step
from ..core.groups import GroupedLayout, GroupSpec, from_text, grouped_layout, to_text
from ..core.hyperparameters import SCALARS, Hyperparameters, Phase, Reader
from ..core.rules import RULES, STEP, Rule
from .gathering import Row, in_memory_order_of, on_device, row_of
from .graphs import is_capturing
from .planner import kernel_device
from .reference_plan import reference_step, unscaled
from .registry import choose_backend
from .states import new_step
from .unplanned import prox_in_place, step_once

GROUP_OPTIONS = ("group_by", "view", "prox_mode", "freeze_zeros")
OPTIONS = ("backend", "fused", *GROUP_OPTIONS)
# A graph must not be captured around a call that keeps no plan: with this tag inductor leaves it outside.
TAGS = (torch.Tag.cudagraph_unsafe,)

torch.library.define(
    "cges_kernels::step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] states, Tensor(c!)[] steps, bool[] first, "
    "int[] groups, str rule, float[] numbers, Tensor?[] sources, str[] options, Tensor? grad_scale=None, "
    "Tensor? found_inf=None) -> ()",
    tags=TAGS,
)
torch.library.define(
    "cges_kernels::prox_",
    "(Tensor(a!)[] tensors, float group_lasso, float exclusive_lasso, float l1, str group_by, int[]? view, "
    "str prox_mode, str backend) -> ()",
    tags=TAGS,
)


class Collected(NamedTuple):
    """The parameters of one param group that have a gradient, and the other inputs of a compiled step."""

    options: Mapping[str, Any]  # the param group
    backend: str
    params: list[Tensor]
    grads: list[Tensor]
    states: list[Tensor | None]  # the states of Rule.states_with for each parameter; None if not begun
    steps: list[Tensor | None]


def step(
    rule: Rule, collected: Sequence[Collected], grad_scale: Tensor | None, found_inf: Tensor | None
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """An optimizer's step as torch.compile traces it: one operator. Returns parameters with new states."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    states: list[Tensor] = []
    steps: list[Tensor] = []
    new: list[tuple[Tensor, dict[str, Tensor]]] = []
    first: list[bool] = []
    groups: list[int] = []
    numbers: list[float] = []
    sources: list[Tensor | None] = []
    options: list[str] = []
    for index, (group, backend, mine, of_mine, found, counts) in enumerate(collected):
        params += mine
        grads += of_mine
        groups += [index] * len(mine)
        names = rule.states_with(group)
        for k, (p, count) in enumerate(zip(mine, counts)):
            if not names:
                continue
            begun = [x for x in found[k * len(names) : (k + 1) * len(names)] if x is not None]
            there = len(begun) + (count is not None)
            if there not in (0, len(names) + rule.counts):
                raise RuntimeError(
                    f"torch.compile: expected all of a parameter's {', '.join(names)}"
                    f"{' and step' if rule.counts else ''}, or none, got {there} of them"
                )
            first.append(not begun)
            if not begun:
                begun = [torch.empty_like(p) for _ in names]
                count = new_step(p, group) if rule.counts else None
                new.append((p, {**({} if count is None else {STEP: count}), **dict(zip(names, begun))}))
            states += begun
            steps += [] if count is None else [count]
        numbers += numbers_of(rule, group)
        sources += [group[key] if isinstance(group[key], Tensor) else None for key in SCALARS]
        fused = "fused" if group["fused"] else ""
        for value in (backend, fused, *(group[key] for key in GROUP_OPTIONS)):
            options.append(to_text(value))
    if found_inf is not None and new:
        raise RuntimeError(
            "expected the optimizer's state when a compiled step may overflow, found parameters without: "
            "take one step before torch.compile"
        )
    torch.ops.cges_kernels.step_(
        params,
        grads,
        states,
        steps,
        first,
        groups,
        rule.name,
        numbers,
        sources,
        options,
        grad_scale,
        found_inf,
    )
    return new


def numbers_of(rule: Rule, group: Mapping[str, Any]) -> list[float]:
    """SCALARS (0 for tensors) and the rule's options as floats, equally many for all its param groups."""
    numbers = [0.0 if isinstance(group[key], Tensor) else float(group[key]) for key in SCALARS]
    for key, default in rule.options.items():
        if key != "fused":  # which is among OPTIONS
            numbers += [float(x) for x in (group[key] if isinstance(default, tuple) else (group[key],))]
    return numbers


def _named(rule: Rule, numbers: Sequence[float]) -> dict[str, Any]:
    """The hyperparameters by name, from the numbers that `numbers_of` has made."""
    left = iter(numbers)
    named: dict[str, Any] = {key: next(left) for key in SCALARS}
    for key, default in rule.options.items():
        if isinstance(default, tuple):
            named[key] = tuple(next(left) for _ in default)
        elif key != "fused":
            named[key] = type(default)(next(left))
    return named


def prox_(
    tensors: list[Tensor],
    h: Hyperparameters,
    group_by: GroupSpec,
    view: Sequence[int] | None,
    backend: str,
) -> None:
    """functional.prox_ as torch.compile traces it."""
    coefficients = float(h.group_lasso), float(h.exclusive_lasso), float(h.l1)
    spec = to_text(group_by), None if view is None else list(view)
    torch.ops.cges_kernels.prox_(tensors, *coefficients, *spec, h.prox_mode, backend)


@lru_cache(4096)
def _layout(
    shape: torch.Size, stride: tuple[int, ...], group_by: GroupSpec, view: Sequence[int] | None
) -> GroupedLayout:
    """The layout of a tensor with this shape and stride under a spec."""
    return grouped_layout(torch.empty_strided(shape, stride, device="meta"), group_by, view)


@lru_cache(256)
def _checked(rule: str, numbers: tuple[float, ...], options: tuple[str, ...]) -> Mapping[str, Any]:
    """A param group's hyperparameters by name, after checks; SCALARS that are tensors are 0 in it."""
    group = {**_named(RULES[rule], numbers), **dict(zip(OPTIONS, map(from_text, options)))}
    group["fused"] = bool(group["fused"])
    group["skip_dead"] = False  # the dead groups would have to be remembered between calls
    check_param_group(RULES[rule], {"foreach": None, "differentiable": False, **group})
    return MappingProxyType(group)


def _chunks(values: Sequence[Any], n: int) -> Iterator[tuple[Any, ...]]:
    return zip(*[iter(values)] * n)


class Member(NamedTuple):
    """A parameter with the other inputs of its step."""

    param: Tensor
    grad: Tensor
    states: tuple[Tensor, ...]
    step: Tensor | None
    first: bool


def on_host_counted(member: Member) -> bool:
    """Whether the host counts a parameter's steps: kernels do not see parameters without elements."""
    return member.step is not None and (not on_device(member.step) or member.param.numel() == 0)


Served = Sequence[tuple[dict[str, Any], list[Member]]]


@torch.library.impl("cges_kernels::step_", "default")
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    states: list[Tensor],
    steps: list[Tensor],
    first: list[bool],
    groups: list[int],
    rule: str,
    numbers: list[float],
    sources: list[Tensor | None],
    options: list[str],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    """The operator `step_`: check all arguments, choose executors, and step."""
    the_rule, of_group = RULES[rule], len(OPTIONS)
    chunks = zip(
        _chunks(numbers, len(numbers) * of_group // len(options) if options else 1),
        _chunks(options, of_group),
        _chunks(sources, len(SCALARS)),
    )
    param_groups = [
        {**_checked(rule, n, o), **{key: x for key, x in zip(SCALARS, s) if x is not None}}
        for n, o, s in chunks
    ]
    names = [f"params[{i}]" for i in range(len(params))]
    kinds = {"states": states, "steps": steps}
    rest = [f"{kind}[{i}]" for kind, tensors in kinds.items() for i in range(len(tensors))]
    check_distinct([*names, *rest], [*params, *states, *steps])
    members: list[list[Member]] = [[] for _ in param_groups]
    left, counts, begun = iter(states), iter(steps), iter(first)
    for name, p, grad, index in zip(names, params, grads, groups):
        check_companion("gradient", name, p, grad, p.dtype)
        kept = the_rule.states_with(param_groups[index])
        mine = tuple(check_companion(key, name, p, next(left), p.dtype) for key in kept)
        count = check_step(name, p, {STEP: next(counts)}) if kept and the_rule.counts else None
        members[index].append(Member(p, grad, mine, count, bool(kept) and next(begun)))
    served: dict[str, list[tuple[dict[str, Any], list[Member]]]] = {}
    for group, of_members in zip(param_groups, members):
        tensors = [member.param for member in of_members]
        executor = choose_backend(group["backend"], tensors, group["fused"])
        served.setdefault(executor, []).append((group, of_members))
    host_counts = [on_host_counted(x) for x in itertools.chain(*members)]
    if any(host_counts) and found_inf is not None and found_inf.item() != 0:
        return  # the host counts steps here, so it must know of an overflow
    for executor, of_executor in served.items():
        if executor == "reference":
            _reference_step(the_rule, of_executor, grad_scale, found_inf)
        else:
            _fused_step(the_rule, executor, of_executor, grad_scale, found_inf)
    increment_version([*params, *states])


def _reference_step(rule: Rule, served: Served, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    for group, members in served:
        h = Reader(rule).read(group, for_reference=True)
        for p, grad, states, step, first in members:
            # `capturable` cannot decide this, because torch.compile sets it to True for every optimizer.
            count = None if step is None else step + 1 if on_device(step) else step.item() + 1
            begun = [None] * len(states) if first else states
            spec = group["group_by"], group["view"]
            new, *new_states = reference_step(h, spec, p, unscaled(grad, grad_scale), begun, count)
            p.copy_(new)
            for state, value in zip(states, new_states):
                state.copy_(value)
            if step is not None:
                step.add_(1)


def _fused_step(
    rule: Rule, executor: str, served: Served, grad_scale: Tensor | None, found_inf: Tensor | None
) -> None:
    if is_capturing():
        raise RuntimeError(
            "expected optimizer.step itself in a graph, got a compiled one, which keeps nothing for replays"
        )
    tensors: list[Tensor] = []
    layouts: list[GroupedLayout] = []
    rows: list[Row] = []
    groups: list[int] = []
    hyperparameters = []
    kept, moved = [], []  # gradients and states in the parameters' memory order
    for index, (group, members) in enumerate(served):
        device = kernel_device(executor, [member.param for member in members])
        hyperparameters.append(Reader(rule).read(group, device))
        for p, grad, of_p, step, first in members:
            grad = in_memory_order_of(p, grad)
            in_order = tuple(in_memory_order_of(p, x) for x in of_p)
            moved += [(x, y) for x, y in zip(of_p, in_order) if x is not y]
            kept.append((grad, in_order))
            tensors.append(p)
            layouts.append(_layout(p.shape, p.stride(), group["group_by"], group["view"]))
            phase = Phase.of(keeps_state=bool(of_p), begun=not first)
            rows.append(row_of(p, grad, in_order, phase, step))
            groups.append(index)
    step_once(executor, tensors, layouts, rows, groups, hyperparameters, grad_scale, found_inf)
    for to, moved_to in moved:
        to.copy_(moved_to)
    for _, members in served:
        for member in members:
            if member.step is not None and on_host_counted(member):
                member.step.add_(1)


@torch.library.impl("cges_kernels::prox_", "default")
def _prox(
    tensors: list[Tensor],
    group_lasso: float,
    exclusive_lasso: float,
    l1: float,
    group_by: str,
    view: list[int] | None,
    prox_mode: str,
    backend: str,
) -> None:
    """The operator `prox_`: check all arguments, and call prox_in_place."""
    h, spec = Hyperparameters.of_prox(group_lasso, exclusive_lasso, l1, prox_mode), from_text(group_by)
    check_penalty({**h._asdict(), "group_by": spec, "view": view})
    with torch.no_grad():
        prox_in_place(tensors, h, spec, view, backend)


torch.library.register_fake("cges_kernels::step_", lambda *args, **kwargs: None)
torch.library.register_fake("cges_kernels::prox_", lambda *args, **kwargs: None)
