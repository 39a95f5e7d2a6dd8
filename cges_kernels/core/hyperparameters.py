"""What a step is told: the hyperparameters of a param group, and the phase of each tensor.

This owns them in Python, csrc/common/step.h in C++, and backends/triton/tables.py for Triton's kernels;
docs/design/a-step.md follows them from a param group to a kernel. What belongs to the update rule, SGD,
stands apart from what belongs to the prox, which other rules share.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from enum import IntEnum
from operator import itemgetter
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .reference import SGDOptions, Thresholds, form_thresholds

# The update rule: what torch.optim.SGD takes besides lr, and the state that it keeps of a parameter.
SGD_OPTIONS = tuple(SGDOptions.__annotations__)
SGD_STATE = "momentum_buffer"


def keeps_state(group: Mapping[str, Any]) -> bool:
    """Whether the rule has a state to keep of a param group's parameters: SGD with momentum."""
    return bool(group["momentum"] != 0)


# The prox.
COEFFICIENTS = ("group_lasso", "exclusive_lasso", "l1")
INITIAL = {key: f"initial_{key}" for key in COEFFICIENTS}  # schedules keep full values in param groups there
PROX_MODES = ("sequential", "exact")
FREEZE_MODES = (None, "group", "element")

SCALARS = ("lr", *COEFFICIENTS)  # those that kernels may read from tensors


class Phase(IntEnum):
    """What a step does with one tensor, by what it has; the same numbers as in csrc/common/phase.h."""

    SKIPPED = -1  # no gradient: left alone
    PROX_ALONE = 0  # no update: z is w
    STATELESS = 1  # the rule keeps no state of it: SGD without momentum
    FIRST = 2  # the state is written, but holds nothing yet
    RUNNING = 3  # the state is read and written

    @classmethod
    def of(cls, keeps_state: bool, begun: bool) -> Phase:
        """Of a tensor with a gradient, by whether the rule keeps a state of it, and that has begun."""
        if not keeps_state:
            return cls.STATELESS
        return cls.RUNNING if begun else cls.FIRST


class At(NamedTuple):
    """A float32 that a kernel reads itself, at this address of its device's memory."""

    address: int


class Hyperparameters(NamedTuple):
    """A param group's, by their names there. SCALARS are numbers or At; for autograd they may be tensors."""

    # the update rule's
    lr: Any = 0.0
    momentum: float = 0.0
    dampening: float = 0.0
    weight_decay: float = 0.0
    nesterov: bool = False
    maximize: bool = False
    # the prox's
    group_lasso: Any = 0.0
    exclusive_lasso: Any = 0.0
    l1: Any = 0.0
    prox_mode: str = "sequential"
    freeze_zeros: str | None = None

    @classmethod
    def of(cls, group: Mapping[str, Any], device: torch.device | None = None) -> Hyperparameters:
        """A param group's; tensors as ``number`` has them, the first of SCALARS' by kernels on ``device``."""
        return cls(
            **{key: number(key, group[key], device if key in SCALARS else None) for key in cls._fields}
        )

    @classmethod
    def of_prox(
        cls, group_lasso: float, exclusive_lasso: float, l1: float, prox_mode: str
    ) -> Hyperparameters:
        """Of a step that is the prox alone; the coefficients contain the step size already, so lr is 1."""
        coefficients: dict[str, Any] = dict(zip(COEFFICIENTS, map(float, (group_lasso, exclusive_lasso, l1))))
        return cls(lr=1.0, prox_mode=prox_mode, **coefficients)

    @property
    def keeps_state(self) -> bool:
        return keeps_state({"momentum": self.momentum})

    @property
    def exact(self) -> bool:
        return self.prox_mode == "exact"

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of SCALARS, where kernels read them: 0 for those that are numbers here."""
        return tuple(x.address if isinstance(x, At) else 0 for x in self._scalars)

    @property
    def on_device(self) -> bool:
        """Whether some are numbers on the device alone, so that only a kernel can form the thresholds."""
        return At in map(type, self)

    def sgd(self) -> SGDOptions:
        """sgd_update's options, but for lr."""
        return cast(SGDOptions, {key: getattr(self, key) for key in SGD_OPTIONS})

    def thresholds(self) -> Thresholds:
        """reference.form_thresholds of numbers that the host knows."""
        return form_thresholds(*(x if isinstance(x, Tensor) else float(x) for x in self._scalars))

    @property
    def _scalars(self) -> tuple[Any, ...]:
        return tuple(getattr(self, key) for key in SCALARS)


# The values of a param group in the order of Hyperparameters; cheap enough for each step.
values_of: Callable[[Mapping[str, Any]], tuple[Any, ...]] = itemgetter(*Hyperparameters._fields)


def scalar(name: str, value: Any) -> Any:
    """A tensor hyperparameter as a number; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(
            f"Tensor {name} must be 1-element: expected a number or one element, got shape {shape}"
        )
    return value.detach().item()


def can_be_read(x: Tensor, device: torch.device | None) -> bool:
    """Whether kernels on ``device`` can read it as At."""
    return x.device == device and x.dtype == torch.float32 and x.numel() == 1


def number(name: str, value: Any, device: torch.device | None) -> Any:
    """A hyperparameter without its tensor: its number, or At where kernels on ``device`` read it."""
    if isinstance(value, Tensor) and can_be_read(value, device):
        return At(value.data_ptr())
    return scalar(name, value)
