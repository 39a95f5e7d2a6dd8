"""Gathers for a fused step, after checks, the addresses and the phase of each of an optimizer's tensors.

csrc/plan/step_plan.h does the same in C++. The Triton executor uses this StepPlan in installs without the
extension; other plans and operators.py use the functions.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..core.checks import check_distinct, checked_inputs
from ..core.groups import GroupedLayout
from ..core.hyperparameters import Hyperparameters, Phase
from ..core.rules import RULES, SGD, STEP
from .states import new_like, new_step


class Row(NamedTuple):
    """The numbers that an executor gets for a tensor in a step: addresses (0: none), phase, count of steps.

    `steps` includes this step. A count on the tensor's device is not known here. It is a float32 that does
    not include this step yet, and kernels read it at `steps_address`.
    """

    w: int
    grad: int = 0
    state_0: int = 0
    state_1: int = 0
    phase: int = int(Phase.PROX_ALONE)
    steps: int = 0
    steps_address: int = 0


def _place(p: Tensor) -> tuple[Any, ...]:
    """The properties of a parameter that a plan relies on; if they differ, it has moved or changed."""
    return p.data_ptr(), p.dtype, p.shape, p.stride()


def in_memory_order_of(p: Tensor, x: Tensor) -> Tensor:
    """`x`, or a copy in the memory order of `p` if the order of `x` is another one.

    The strides of dims of size 1 do not count.
    """
    strides = zip(p.shape, x.stride(), p.stride())
    if not x.is_neg() and (x.numel() == 0 or all(a == b for n, a, b in strides if n > 1)):
        return x
    return new_like(p).copy_(x.detach())


def row_of(
    p: Tensor, grad: Tensor | None, states: Sequence[Tensor], phase: Phase, step: Tensor | None
) -> Row:
    """The row of a tensor whose gradient and states have its memory order."""
    grad_at, state_0, state_1 = (
        0 if x is None else x.data_ptr() for x in (grad, *states, *[None] * (2 - len(states)))
    )
    counted = (0, 0)
    if step is not None:
        counted = (0, step.data_ptr()) if on_device(step) else (int(step.item()) + 1, 0)
    return Row(p.data_ptr(), grad_at, state_0, state_1, int(phase), *counted)


def on_device(step: Tensor) -> bool:
    """Whether kernels read and write the count of steps themselves."""
    return step.device.type != "cpu"


@dataclass
class _Slot:
    """One parameter, and the states that its last step left."""

    name: str
    param: Tensor
    group: int
    place: tuple[Any, ...]
    states: tuple[Tensor, ...] = ()


class _Gathered(NamedTuple):
    """The data that `gather` hands to `run`: the optimizer's state, a Row per parameter, and their tensors.

    The tensors are kept so that the addresses in the rows stay valid.
    """

    state: dict[Tensor, Any]
    rows: list[Row]
    kept: list[tuple[Tensor | None, tuple[Tensor, ...], Tensor | None]]  # gradient, states, step


class StepPlan:
    """Holds the parameters of param groups and steps them by two calls: gather, which may fail, and run."""

    def __init__(
        self,
        params: Sequence[list[Tensor]],
        layouts: Sequence[Sequence[GroupedLayout]],
        rule: str = SGD.name,
    ) -> None:
        if len(params) != len(layouts):
            raise ValueError(f"StepPlan: expected layouts for {len(params)} param groups, got {len(layouts)}")
        self._rule = RULES[rule]
        self._sizes = [len(group) for group in params]
        self._options = [Hyperparameters.make(self._rule).chosen] * len(params)
        self._slots: list[_Slot] = []
        self._gathered: _Gathered | None = None
        for g, (group, rows) in enumerate(zip(params, layouts)):
            if len(group) != len(rows):
                raise ValueError(
                    f"StepPlan: expected {len(group)} layouts in param group {g}, got {len(rows)}"
                )
            for i, (p, (k1, r1, k2, r2, _)) in enumerate(zip(group, rows)):
                if k1 * r1 * k2 * r2 != p.numel():
                    raise ValueError(
                        f"StepPlan: expected a layout of {p.numel()} elements, got {k1 * r1 * k2 * r2}"
                    )
                self._slots.append(_Slot(f"param_groups[{g}]['params'][{i}]", p, g, _place(p)))

    def set_hyperparameters(self, group: int, hyperparameters: Hyperparameters) -> None:
        """Take the rule's options, which decide which states exist; no other hyperparameter matters here."""
        self._options[group] = hyperparameters.chosen

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool:
        """Check and collect all inputs of a step, writing nothing; False if the plan must be built again."""
        self._gathered = None
        if [len(group) for group in params] != self._sizes:
            return False
        for p, slot in zip(chain(*params), self._slots):
            if p is not slot.param or _place(p) != slot.place:
                return False
        gathered, newcomers = _Gathered(state, [], []), False
        for slot in self._slots:
            phase, grad, states, step = self._inputs(slot, state)
            newcomers |= phase is Phase.RUNNING and any(
                x is not y for x, y in zip(states, slot.states or [None] * 2)
            )
            gathered.kept.append((grad, states, step))
            gathered.rows.append(row_of(slot.param, grad, states, phase, step))
        if newcomers:  # a new state may share memory with another, or with a parameter: writes would race
            names = (*self._rule.states, STEP)
            found = [
                (f"the {name} of {slot.name}", x)
                for slot, (_, states, step) in zip(self._slots, gathered.kept)
                for name, x in zip(names, states if step is None else (*states, step))
            ]
            check_distinct(*zip(*[(s.name, s.param) for s in self._slots], *found))
        self._gathered = gathered
        return True

    def _inputs(
        self, slot: _Slot, state: dict[Tensor, Any]
    ) -> tuple[Phase, Tensor | None, tuple[Tensor, ...], Tensor | None]:
        """The phase, gradient, states and count of a parameter, all in the parameter's memory order."""
        p, options = slot.param, self._options[slot.group]
        if p.grad is None:
            return Phase.SKIPPED, None, (), None
        grad, states, step = checked_inputs(slot.name, p, state.get(p, {}), self._rule, options, p.dtype)
        keeps_state = self._rule.keeps_state(options)
        phase = Phase.of(keeps_state, begun=bool(states))
        if phase is Phase.FIRST:
            states = tuple(new_like(p) for _ in self._rule.states)
            step = new_step(p, options) if self._rule.counts else None
        return phase, in_memory_order_of(p, grad), tuple(in_memory_order_of(p, x) for x in states), step

    def run(
        self,
        launch: Callable[[Tensor], Any],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """Call launch(table), with a Row per parameter; then keep new states, and count steps."""
        if self._gathered is None:
            raise RuntimeError("StepPlan.run: expected a gather that succeeded before it, got none")
        (state, rows, kept), self._gathered = self._gathered, None
        # The host must know whether the step overflows if it begins states or counts steps itself. Otherwise
        # it does not wait for the device.
        new = any(row.phase == Phase.FIRST or row.steps > 0 for row in rows) or any(
            slot.param.numel() == 0 for slot in self._slots if self._rule.counts
        )
        if found_inf is not None and new and found_inf.item() != 0:
            return
        launch(torch.tensor(rows, dtype=torch.int64, device="cpu").reshape(len(rows), len(Row._fields)))
        for slot, (grad, states, step) in zip(self._slots, kept):
            if grad is None:
                continue
            if states:
                entry = state.setdefault(slot.param, {})
                if step is not None:
                    entry[STEP] = step
                entry.update(zip(self._rule.states, states))
                slot.states = states
            if step is not None and (not on_device(step) or slot.param.numel() == 0):
                step += 1
            increment_version([slot.param, *states])
