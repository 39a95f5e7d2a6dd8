"""The step and the proximal map as operators of torch.library: what torch.compile sees of this package.

Outside of torch.compile nothing comes this way. An operator keeps no plan, so it checks its inputs anew at
each call, and it has lists in place of an optimizer:

    step_   `groups`: of each parameter its param group. Of each param group: NUMBERS in `numbers`, SCALARS in
            `sources` (what is a tensor, None otherwise) and OPTIONS, as text, in `options`.
            `momentum_buffers` are those of parameters whose group has momentum; `first`: not begun yet.
    prox_   functional.prox_
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..core import reference
from ..core.checks import check_companion, check_distinct, check_param_group, check_penalty
from ..core.groups import GroupedLayout, GroupSpec, from_text, grouped_layout, to_text
from ..core.hyperparameters import SCALARS, SGD_OPTIONS, SGD_STATE, Hyperparameters, Phase, keeps_state
from .gathering import in_memory_order_of
from .graphs import is_capturing
from .planner import kernel_device
from .reference_plan import options_of, unscaled
from .registry import choose_backend
from .unplanned import Row, prox_in_place, step_once

NUMBERS = (*SCALARS, *SGD_OPTIONS)
GROUP_OPTIONS = ("group_by", "view", "prox_mode", "freeze_zeros")
OPTIONS = ("backend", "fused", *GROUP_OPTIONS)
# A graph must not be captured around a call that keeps no plan: inductor then leaves it outside of its own.
TAGS = (torch.Tag.cudagraph_unsafe,)

torch.library.define(
    "cges_kernels::step_",
    "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] momentum_buffers, bool[] first, int[] groups, "
    "float[] numbers, Tensor?[] sources, str[] options, Tensor? grad_scale=None, Tensor? found_inf=None) "
    "-> ()",
    tags=TAGS,
)
torch.library.define(
    "cges_kernels::prox_",
    "(Tensor(a!)[] tensors, float group_lasso, float exclusive_lasso, float l1, str group_by, int[]? view, "
    "str prox_mode, str backend) -> ()",
    tags=TAGS,
)


class Collected(NamedTuple):
    """What a compiled step finds of one param group: parameters with a gradient, and what goes with them."""

    options: Mapping[str, Any]  # the param group
    backend: str
    params: list[Tensor]
    grads: list[Tensor]
    buffers: list[Tensor | None]  # with momentum; None before the first step


def step(
    collected: Sequence[Collected], grad_scale: Tensor | None, found_inf: Tensor | None
) -> list[tuple[Tensor, Tensor]]:
    """An optimizer's step as torch.compile traces it, one operator; returns parameters with new buffers."""
    params: list[Tensor] = []
    grads: list[Tensor] = []
    buffers: list[Tensor] = []
    new: list[tuple[Tensor, Tensor]] = []
    first: list[bool] = []
    groups: list[int] = []
    numbers: list[float] = []
    sources: list[Tensor | None] = []
    options: list[str] = []
    for index, (group, backend, mine, of_mine, found) in enumerate(collected):
        params += mine
        grads += of_mine
        groups += [index] * len(mine)
        for p, buf in zip(mine, found):
            first.append(buf is None)
            if buf is None:
                buf = torch.empty_like(p)
                new.append((p, buf))
            buffers.append(buf)
        for key in NUMBERS:
            is_tensor = isinstance(group[key], Tensor)
            numbers.append(0.0 if is_tensor else float(group[key]))
            if key in SCALARS:
                sources.append(group[key] if is_tensor else None)
        fused = "fused" if group["fused"] else ""
        for value in (backend, fused, *(group[key] for key in GROUP_OPTIONS)):
            options.append(to_text(value))
    if found_inf is not None and new:
        raise RuntimeError(
            "expected momentum buffers when a compiled step may overflow, found parameters without: "
            "take one step before torch.compile"
        )
    torch.ops.cges_kernels.step_(
        params, grads, buffers, first, groups, numbers, sources, options, grad_scale, found_inf
    )
    return new


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
    return grouped_layout(torch.empty_strided(shape, stride, device="meta"), group_by, view)


@lru_cache(256)
def _checked(numbers: tuple[float, ...], options: tuple[str, ...]) -> Mapping[str, Any]:
    """A param group without its tensors."""
    group = dict(zip(NUMBERS, numbers), **dict(zip(OPTIONS, map(from_text, options))))
    group.update({key: bool(group[key]) for key in ("nesterov", "maximize", "fused")})
    check_param_group({**group, "foreach": None, "differentiable": False})
    return MappingProxyType(group)


def _chunks(values: Sequence[Any], of: Sequence[str]) -> Iterator[tuple[Any, ...]]:
    return zip(*[iter(values)] * len(of))


class Member(NamedTuple):
    """A parameter with what a step of it takes."""

    param: Tensor
    grad: Tensor
    buf: Tensor | None
    first: bool


@torch.library.impl("cges_kernels::step_", "default")
def _step(
    params: list[Tensor],
    grads: list[Tensor],
    momentum_buffers: list[Tensor],
    first: list[bool],
    groups: list[int],
    numbers: list[float],
    sources: list[Tensor | None],
    options: list[str],
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    param_groups = [
        {**_checked(n, o), **{key: x for key, x in zip(SCALARS, s) if x is not None}}
        for n, o, s in zip(_chunks(numbers, NUMBERS), _chunks(options, OPTIONS), _chunks(sources, SCALARS))
    ]
    names = [f"params[{i}]" for i in range(len(params))]
    buffer_names = [f"momentum_buffers[{i}]" for i in range(len(momentum_buffers))]
    check_distinct([*names, *buffer_names], [*params, *momentum_buffers])
    members: list[list[Member]] = [[] for _ in param_groups]
    begun = iter(zip(momentum_buffers, first))
    for name, p, grad, index in zip(names, params, grads, groups):
        check_companion("gradient", name, p, grad, p.dtype)
        buf, is_first = next(begun) if keeps_state(param_groups[index]) else (None, False)
        if buf is not None:
            check_companion(SGD_STATE, name, p, buf, p.dtype)
        members[index].append(Member(p, grad, buf, is_first))
    served: dict[str, list[tuple[dict[str, Any], list[Member]]]] = {}
    for group, of_group in zip(param_groups, members):
        executor = choose_backend(group["backend"], [member.param for member in of_group], group["fused"])
        served.setdefault(executor, []).append((group, of_group))
    for executor, of_executor in served.items():
        if executor == "reference":
            _reference_step(of_executor, grad_scale, found_inf)
        else:
            _fused_step(executor, of_executor, grad_scale, found_inf)
    increment_version([*params, *momentum_buffers])


def _reference_step(
    served: Sequence[tuple[dict[str, Any], list[Member]]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    if found_inf is not None and found_inf.item() != 0:
        return
    for group, members in served:
        options = dict(options_of(Hyperparameters.of(group)), group_by=group["group_by"], view=group["view"])
        for p, grad, buf, first in members:
            started = None if first else buf
            new, new_buf = reference.proximal_step(p, unscaled(grad, grad_scale), started, **options)
            p.copy_(new)
            if buf is not None and new_buf is not None:
                buf.copy_(new_buf)


def _fused_step(
    executor: str,
    served: Sequence[tuple[dict[str, Any], list[Member]]],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
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
    kept, moved = [], []  # gradients and buffers in the parameters' memory order
    for index, (group, members) in enumerate(served):
        device = kernel_device(executor, [member.param for member in members])
        hyperparameters.append(Hyperparameters.of(group, device))
        for p, grad, buf, first in members:
            grad, in_order = in_memory_order_of(p, grad), buf
            if buf is not None:
                in_order = in_memory_order_of(p, buf)
                if in_order is not buf:
                    moved.append((buf, in_order))
            kept.append((grad, in_order))
            tensors.append(p)
            layouts.append(_layout(p.shape, p.stride(), group["group_by"], group["view"]))
            at = 0 if in_order is None else in_order.data_ptr()
            phase = Phase.of(keeps_state=buf is not None, begun=not first)
            rows.append((p.data_ptr(), grad.data_ptr(), at, int(phase)))
            groups.append(index)
    step_once(executor, tensors, layouts, rows, groups, hyperparameters, grad_scale, found_inf)
    for buf, in_order in moved:
        buf.copy_(in_order)


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
    h, spec = Hyperparameters.of_prox(group_lasso, exclusive_lasso, l1, prox_mode), from_text(group_by)
    check_penalty({**h._asdict(), "group_by": spec, "view": view})
    with torch.no_grad():
        prox_in_place(tensors, h, spec, view, backend)


torch.library.register_fake("cges_kernels::step_", lambda *args, **kwargs: None)
torch.library.register_fake("cges_kernels::prox_", lambda *args, **kwargs: None)
