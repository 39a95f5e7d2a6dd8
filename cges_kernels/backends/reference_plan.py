"""The plan of the reference executor: an optimizer's parameters, stepped one by one by core/reference.py.

operators.py uses its functions for compiled steps on the reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..core import reference
from ..core.checks import Inputs, checked_inputs
from ..core.hyperparameters import Hyperparameters
from ..core.rules import STEP, Rule
from ..core.tensors import is_freed
from .plan import Spec
from .states import new_step


def unscaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    """A gradient divided by a gradient scaler's number, which the host reads."""
    return grad if grad_scale is None else grad / grad_scale.item()


def reference_step(
    h: Hyperparameters,
    spec: Spec,
    p: Tensor,
    grad: Tensor,
    states: Sequence[Tensor | None],
    count: float | Tensor | None = None,
) -> tuple[Any, ...]:
    """`(new w, new states ...)` of one step by core/reference.py.

    `count` is the number of p's steps, this one included, for a rule that counts them.
    """
    counted = {} if count is None else {STEP: count}
    update = partial(h.rule.update, lr=h.lr, **h.rule.told(h.chosen), **counted)
    return reference.proximal_step(
        update,
        p,
        grad,
        states,
        h.thresholds(),
        group_by=spec[0],
        view=spec[1],
        prox_mode=h.prox_mode,
        freeze_zeros=h.freeze_zeros,
    )


class ReferencePlan:
    """Steps by core/reference.py; `specs[i][j]` is the spec of params[i][j]."""

    def __init__(self, rule: Rule, params: Sequence[list[Tensor]], specs: Sequence[Sequence[Spec]]) -> None:
        self._rule = rule
        self._params = [list(group) for group in params]
        self._specs = [list(group) for group in specs]
        self._hyperparameters = [Hyperparameters.make(rule)] * len(params)
        self._gathered: list[tuple[Hyperparameters, Spec, Tensor, Inputs]] | None = None
        self._state: dict[Tensor, Any] = {}

    def set_hyperparameters(self, group: int, hyperparameters: Hyperparameters) -> None:
        self._hyperparameters[group] = hyperparameters

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool:
        self._gathered = None
        here, expected = chain(*params), chain(*self._params)
        if [len(x) for x in params] != [len(x) for x in self._params] or any(
            p is not q for p, q in zip(here, expected)
        ):
            return False
        gathered = []
        for g, (h, group, specs) in enumerate(zip(self._hyperparameters, self._params, self._specs)):
            for i, (p, spec) in enumerate(zip(group, specs)):
                if p.grad is None:
                    continue
                name = f"param_groups[{g}]['params'][{i}]"
                if is_freed(p):
                    raise RuntimeError(f"{name}: expected a parameter that holds memory, got none")
                inputs = checked_inputs(name, p, state.get(p, {}), self._rule, h.chosen)
                gathered.append((h, spec, p, inputs))
        self._gathered, self._state = gathered, state
        return True

    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        if self._gathered is None:
            raise RuntimeError("ReferencePlan.run: expected a gather that succeeded before it, got none")
        gathered, self._gathered = self._gathered, None
        if found_inf is not None and found_inf.item() != 0:
            return
        for h, spec, p, (grad, states, step) in gathered:
            begun = bool(states)
            if self._rule.counts:
                step = new_step(p, h.chosen) if step is None else step
            count = None if step is None else _count(h, step)
            grad = unscaled(grad, grad_scale)
            follows = torch.is_grad_enabled()  # differentiable=True: do not write to what autograd follows
            new, *new_states = reference_step(h, spec, p.clone() if follows else p, grad, states, count)
            p.copy_(new)
            names = self._rule.states_with(h.chosen)
            if not names:
                continue
            entry = self._state.setdefault(p, {})
            if step is not None:
                entry[STEP] = step.add_(1)
            for k, (name, x) in enumerate(zip(names, new_states)):
                entry[name] = states[k].copy_(x) if begun and not follows else x


def _count(h: Hyperparameters, step: Tensor) -> float | Tensor:
    """The number of the step that is being made; a tensor where torch.optim's formula takes one."""
    if h.chosen["capturable"] or h.chosen["differentiable"]:
        return step + 1
    return float(step.item() + 1)
