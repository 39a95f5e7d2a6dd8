"""The interface of plans: what steps the parameters of an optimizer's param groups, by one executor each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ..core.groups import GroupSpec
from ..core.hyperparameters import Hyperparameters

Spec = tuple[GroupSpec, Sequence[int] | None]  # group_by and view


class Plan(Protocol):
    """Parameters held from step to step; `params[i]` is [] where another plan serves param group i.

    A step takes two calls, so that whatever may fail does so before anything is written.
    """

    def set_hyperparameters(self, group: int, hyperparameters: Hyperparameters) -> None: ...

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool:
        """Check and collect what a step reads; False where the plan must be built again."""
        ...

    def run(self, *, grad_scale: Tensor | None = None, found_inf: Tensor | None = None) -> Tensor | None:
        """Step what was gathered, once; gradients are divided by `grad_scale`.

        Where `found_inf` is not 0 nothing changes, state included. Returns what that came to be where ranks
        had to agree on it.
        """
        ...
