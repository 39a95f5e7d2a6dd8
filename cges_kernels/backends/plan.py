"""The interface of plans: a plan steps those of an optimizer's parameters that one executor serves.

The planner (planner.py) drives plans. They are ReferencePlan (reference_plan.py), the extension's StepPlan,
TritonPlan (triton/executor.py) and ShardedPlan (distributed/sharded.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..core.groups import GroupSpec
from ..core.hyperparameters import Hyperparameters

Spec = tuple[GroupSpec, Sequence[int] | None]  # group_by and view


class Plan(Protocol):
    """Parameters held from step to step; `params[i]` is [] where another plan serves param group i.

    A step takes two calls, gather and run, so that whatever may fail does so before anything is written.
    """

    def set_hyperparameters(self, group: int, hyperparameters: Hyperparameters) -> None: ...

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool:
        """Check and collect all inputs of a step; False if the plan must be built again."""
        ...

    def run(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Tensor | None:
        """Run the gathered step, once; gradients are divided by `grad_scale`.

        If `found_inf` is not 0 nothing changes, state included. Returns the `found_inf` that ranks have
        agreed on, or None if they did not have to agree.
        """
        ...
