"""What a fused step gathers of an optimizer's parameters: addresses, after checks, and each tensor's phase.

csrc/plan/step_plan.h does the same in C++; this is for installs without it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..core.checks import check_distinct, checked_inputs
from ..core.groups import GroupedLayout
from ..core.hyperparameters import SGD_STATE, Hyperparameters, Phase


def _place(p: Tensor) -> tuple[Any, ...]:
    return p.data_ptr(), p.dtype, p.shape, p.stride()


def in_memory_order_of(p: Tensor, x: Tensor) -> Tensor:
    """``x``, or a copy where its elements lie otherwise than p's; dims of size 1 move nothing."""
    strides = zip(p.shape, x.stride(), p.stride())
    if not x.is_neg() and (x.numel() == 0 or all(a == b for n, a, b in strides if n > 1)):
        return x
    return new_like(p).copy_(x.detach())


def new_like(p: Tensor) -> Tensor:
    """Uninitialised memory in p's memory order, whatever p's class."""
    return torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device=p.device)


@dataclass
class _Slot:
    """One parameter, and the momentum buffer that its last step left."""

    name: str
    param: Tensor
    group: int
    place: tuple[Any, ...]
    buf: Tensor | None = None


class StepPlan:
    """The parameters of param groups, held for a step in two calls: gather, which may fail, and run."""

    def __init__(self, params: Sequence[list[Tensor]], layouts: Sequence[Sequence[GroupedLayout]]) -> None:
        if len(params) != len(layouts):
            raise ValueError(f"StepPlan: expected layouts for {len(params)} param groups, got {len(layouts)}")
        self._sizes = [len(group) for group in params]
        self._keeps_state = [False] * len(params)
        self._slots: list[_Slot] = []
        self._gathered: tuple[dict[Tensor, Any], list[tuple[int, ...]], list[Any]] | None = None
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
        """Of a param group's hyperparameters only whether the rule keeps a state matters here."""
        self._keeps_state[group] = hyperparameters.keeps_state

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool:
        """Check and collect what a step reads, write nothing; False where the plan must be built again."""
        self._gathered = None
        if [len(group) for group in params] != self._sizes:
            return False
        for p, slot in zip(chain(*params), self._slots):
            if p is not slot.param or _place(p) != slot.place:
                return False
        table, kept, newcomers = [], [], False
        for slot in self._slots:
            phase, grad, buf = self._inputs(slot, state)
            newcomers |= phase is Phase.RUNNING and buf is not slot.buf
            kept.append((grad, buf))
            table.append((slot.place[0], *(0 if x is None else x.data_ptr() for x in (grad, buf)), phase))
        if newcomers:  # a buffer that shares memory with another, or a parameter, is written twice at once
            found = [(f"the {SGD_STATE} of {s.name}", b) for s, (_, b) in zip(self._slots, kept)]
            every = [(s.name, s.param) for s in self._slots] + [x for x in found if x[1] is not None]
            check_distinct(*zip(*every))
        self._gathered = state, table, kept
        return True

    def _inputs(self, slot: _Slot, state: dict[Tensor, Any]) -> tuple[Phase, Tensor | None, Tensor | None]:
        """The phase, and gradient and buffer in the parameter's memory order."""
        p, keeps_state = slot.param, self._keeps_state[slot.group]
        if p.grad is None:
            return Phase.SKIPPED, None, None
        grad, buf = checked_inputs(slot.name, p, state.get(p, {}), keeps_state, p.dtype)
        phase = Phase.of(keeps_state, begun=buf is not None)
        if phase is Phase.FIRST:
            buf = new_like(p)
        return phase, in_memory_order_of(p, grad), None if buf is None else in_memory_order_of(p, buf)

    def run(
        self,
        launch: Callable[[Tensor], Any],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None:
        """launch(table), a row (addresses of w, gradient, buffer; phase) per parameter; then keep buffers."""
        if self._gathered is None:
            raise RuntimeError("StepPlan.run: expected a gather that succeeded before it, got none")
        (state, table, kept), self._gathered = self._gathered, None
        new = found_inf is not None and any(phase == Phase.FIRST for *_, phase in table)
        if new and found_inf is not None and found_inf.item() != 0:
            return
        launch(torch.tensor(table, dtype=torch.int64, device="cpu").reshape(len(table), 4))
        for slot, (grad, buf) in zip(self._slots, kept):
            if grad is None:
                continue
            if buf is not None and buf is not slot.buf:
                state.setdefault(slot.param, {})[SGD_STATE] = slot.buf = buf
            increment_version([slot.param] if buf is None else [slot.param, buf])
