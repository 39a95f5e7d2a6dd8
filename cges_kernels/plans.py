"""The reference executor behind the interface that all plans share.

A plan holds the parameters of an optimizer's param groups (``params[i]`` is [] where another plan serves
group i) and steps them in two calls, so that whatever may fail does so before anything is written:

    set_hyperparameters(group, lr=, momentum=, dampening=, weight_decay=, nesterov=, maximize=,
                        a=, b=, c=, exact=, freeze=, device=)
    gather(params, state) -> bool                   checks and collects; False: build the plan again
    run(grad_scale=None, found_inf=None)            steps what was gathered, once

a, b and c are lr times the coefficients. ``device`` holds the addresses of lr, a, b and c that a kernel is to
read itself (0: none); if any is there, a, b and c are bare coefficients, and the kernel multiplies. Gradients
are divided by ``grad_scale``; where ``found_inf`` is not 0 nothing changes, state included.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any, Protocol

from torch import Tensor

from . import reference
from .checks import checked_inputs
from .groups import GroupSpec
from .reference import Scalar

Spec = tuple[GroupSpec, Sequence[int] | None]  # group_by and view


class Plan(Protocol):
    """The interface; run returns what ``found_inf`` came to be where ranks had to agree on it."""

    def set_hyperparameters(self, group: int, **values: Any) -> None: ...

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool: ...

    def run(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Tensor | None: ...


def unscaled(grad: Tensor, grad_scale: Tensor | None) -> Tensor:
    """A gradient over a gradient scaler's number, by the host."""
    return grad if grad_scale is None else grad / grad_scale.item()


class ReferencePlan:
    """Steps by reference.py; ``specs[i][j]`` says how params[i][j] is grouped."""

    def __init__(self, params: Sequence[list[Tensor]], specs: Sequence[Sequence[Spec]]) -> None:
        self._params = [list(group) for group in params]
        self._specs = [list(group) for group in specs]
        self._values: list[dict[str, Any]] = [{} for _ in params]
        self._gathered: list[tuple[dict[str, Any], Tensor, Tensor, Tensor | None]] | None = None
        self._state: dict[Tensor, Any] = {}

    def set_hyperparameters(
        self,
        group: int,
        *,
        a: Scalar = 0.0,
        b: Scalar = 0.0,
        c: Scalar = 0.0,
        exact: bool = False,
        freeze: str = "",
        **sgd: Any,
    ) -> None:
        self._values[group] = dict(
            thresholds=reference.Thresholds(a, b, c),
            prox_mode="exact" if exact else "sequential",
            freeze_zeros=freeze or None,
            **sgd,
        )

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
                options = dict(self._values[g], group_by=group_by, view=view)
                name = f"param_groups[{g}]['params'][{i}]"
                inputs = checked_inputs(name, p, state.get(p, {}), options["momentum"])
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
                state["momentum_buffer"] = new_buf if buf is None else buf.copy_(new_buf)
