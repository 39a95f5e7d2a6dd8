"""The plan of the reference executor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from ..core import reference
from ..core.checks import checked_inputs
from ..core.hyperparameters import SGD_STATE, Hyperparameters
from ..core.tensors import is_freed
from .plan import Spec


def unscaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    """A gradient over a gradient scaler's number, by the host."""
    return grad if grad_scale is None else grad / grad_scale.item()


def options_of(h: Hyperparameters) -> dict[str, Any]:
    """What reference.proximal_step takes of a param group."""
    return dict(
        h.sgd(), lr=h.lr, thresholds=h.thresholds(), prox_mode=h.prox_mode, freeze_zeros=h.freeze_zeros
    )


class ReferencePlan:
    """Steps by reference.py; ``specs[i][j]`` says how params[i][j] is grouped."""

    def __init__(self, params: Sequence[list[Tensor]], specs: Sequence[Sequence[Spec]]) -> None:
        self._params = [list(group) for group in params]
        self._specs = [list(group) for group in specs]
        self._options: list[dict[str, Any]] = [{} for _ in params]
        self._keeps_state = [False] * len(params)
        self._gathered: list[tuple[dict[str, Any], Tensor, Tensor, Tensor | None]] | None = None
        self._state: dict[Tensor, Any] = {}

    def set_hyperparameters(self, group: int, hyperparameters: Hyperparameters) -> None:
        self._options[group] = options_of(hyperparameters)
        self._keeps_state[group] = hyperparameters.keeps_state

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool:
        self._gathered = None
        here, expected = chain(*params), chain(*self._params)
        if [len(x) for x in params] != [len(x) for x in self._params] or any(
            p is not q for p, q in zip(here, expected)
        ):
            return False
        gathered = []
        for g, (group, specs) in enumerate(zip(self._params, self._specs)):
            for i, (p, (group_by, view)) in enumerate(zip(group, specs)):
                if p.grad is None:
                    continue
                options = dict(self._options[g], group_by=group_by, view=view)
                name = f"param_groups[{g}]['params'][{i}]"
                if is_freed(p):
                    raise RuntimeError(f"{name}: expected a parameter that holds memory, got none")
                inputs = checked_inputs(name, p, state.get(p, {}), self._keeps_state[g])
                gathered.append((options, p, *inputs))
        self._gathered, self._state = gathered, state
        return True

    def run(self, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> None:
        if self._gathered is None:
            raise RuntimeError("ReferencePlan.run: expected a gather that succeeded before it, got none")
        gathered, self._gathered = self._gathered, None
        if found_inf is not None and found_inf.item() != 0:
            return
        for options, p, grad, buf in gathered:
            new, new_buf = reference.proximal_step(p, unscaled(grad, grad_scale), buf, **options)
            p.copy_(new)
            if new_buf is not None:
                state = self._state.setdefault(p, {})
                state[SGD_STATE] = new_buf if buf is None else buf.copy_(new_buf)
