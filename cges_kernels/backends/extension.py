"""The C++ extension as Python sees it: the types of csrc/bindings.cpp, and the module if it was built.

The registry and the calls without a plan (unplanned.py) look it up in BUILT.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any, Protocol

from torch import Tensor

from ..core.groups import GroupedLayout
from ..core.hyperparameters import Hyperparameters
from .gathering import Row


class StepPlan(Protocol):
    """Holds the parameters of param groups and steps them by two calls; see csrc/plan/step_plan.h."""

    def set_hyperparameters(self, group: int, hyperparameters: Hyperparameters) -> None: ...

    def gather(self, params: Sequence[list[Tensor]], state: dict[Tensor, Any]) -> bool: ...

    def run(
        self,
        launch: Callable[[Tensor], Any] | None = None,
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None: ...


class Executor(Protocol):
    """Steps tensors whose shapes were given at its construction; see csrc/plan/executor.h."""

    def step(
        self,
        rows: Sequence[Row],
        hyperparameters: Sequence[Hyperparameters],
        grad_scale: Tensor | None = None,
        found_inf: Tensor | None = None,
    ) -> None: ...


class Extension(Protocol):
    """The module, as far as this package uses it; the tests use more of it."""

    cuda: bool  # whether the CUDA executor was built
    emulated: bool  # whether it runs its kernels on the CPU, as in the tests' build

    def StepPlan(
        self,
        params: Sequence[list[Tensor]],
        layouts: Sequence[Sequence[GroupedLayout]],
        rule: str = "sgd",
        executor: str = "",
    ) -> StepPlan: ...

    def Executor(
        self,
        name: str,
        tensors: Sequence[Tensor],
        layouts: Sequence[GroupedLayout],
        param_groups: Sequence[int],
        rule: str = "sgd",
    ) -> Executor: ...

    def check_device(self, index: int) -> None: ...


def _load() -> dict[str, Extension]:
    """The executors that the extension was built with, by name; {} where there is no extension."""
    try:
        built: Extension = import_module("._C", __package__)
    except ImportError:  # installed without a C++ compiler
        return {}
    return {"cpu": built, "cuda": built} if built.cuda else {"cpu": built}


# The C++ executors that were built, by name. The tests put in a module whose CUDA kernels run on the CPU.
BUILT = _load()
