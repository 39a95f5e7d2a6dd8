"""The C++ extension as Python sees it: csrc/bindings.cpp in types, and the module where it was built."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from .groups import LayoutTuple


class StepPlan(Protocol):
    """The parameters of param groups, held for a step in two calls; csrc/plan/step_plan.h says how."""

    def set_hyperparameters(self, group: int, **values: Any) -> None: ...

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool: ...

    def run(
        self,
        launch: Callable[[Tensor], Any] | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None: ...


class Extension(Protocol):
    """The module, as far as this package uses it; what is left out is there for tests."""

    cuda: bool  # whether the CUDA executor is in it
    emulated: bool  # whether that runs its kernels on the CPU, as the tests build it

    def Hyperparameters(self, **values: Any) -> Any: ...

    def StepPlan(
        self,
        params: Sequence[list[Tensor]],
        layouts: Sequence[Sequence[LayoutTuple]],
        executor: str = "",
    ) -> StepPlan: ...

    def step_(
        self,
        tensors: Sequence[Tensor],
        layouts: Sequence[LayoutTuple],
        rows: Sequence[Sequence[int]],
        groups: Sequence[int],
        hyperparameters: Sequence[Any],
        executor: str,
        capturing: bool = False,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None: ...

    def check_device(self, index: int) -> None: ...


def load() -> Extension | None:
    """The extension, or None where it was installed without a C++ compiler."""
    try:
        return import_module("._C", __package__)
    except ImportError:
        return None
