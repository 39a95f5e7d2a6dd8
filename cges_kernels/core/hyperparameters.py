"""What a step is told: the hyperparameters of a param group, and the phase of each tensor.

This owns them in Python, csrc/common/step.h in C++, and backends/triton/tables.py for Triton's kernels;
docs/design/a-step.md follows them from a param group to a kernel. What belongs to the update rule (rules.py)
stands apart from what belongs to the prox.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import IntEnum
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .numbers import scalar
from .reference import Thresholds, form_thresholds
from .rules import RULES, SGD, Rule

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

    lr: Any = 0.0
    group_lasso: Any = 0.0
    exclusive_lasso: Any = 0.0
    l1: Any = 0.0
    prox_mode: str = "sequential"
    freeze_zeros: str | None = None
    skip_dead: bool = False
    rule: Rule = SGD
    options: tuple[Any, ...] = tuple(SGD.options.values())  # the rule's, in its order

    @classmethod
    def make(cls, rule: Rule = SGD, **named: Any) -> Hyperparameters:
        """By their names, those of the rule's options too; what is not named asks for nothing."""
        options = tuple(named.pop(key, default) for key, default in rule.options.items())
        return cls(rule=rule, options=options, **named)

    @classmethod
    def of_values(cls, rule: Rule, values: tuple[Any, ...]) -> Hyperparameters:
        """Of what ``values_of`` the rule has read."""
        return cls._make((*values[: len(OWN)], rule, values[len(OWN) :]))

    @classmethod
    def of_prox(
        cls, group_lasso: float, exclusive_lasso: float, l1: float, prox_mode: str
    ) -> Hyperparameters:
        """Of a step that is the prox alone; the coefficients contain the step size already, so lr is 1."""
        return cls(1.0, float(group_lasso), float(exclusive_lasso), float(l1), prox_mode)

    @property
    def chosen(self) -> dict[str, Any]:
        """The rule's options by name."""
        return dict(zip(self.rule.options, self.options))

    @property
    def exact(self) -> bool:
        return self.prox_mode == "exact"

    @property
    def addresses(self) -> tuple[int, ...]:
        """Of SCALARS, where kernels read them: 0 for those that are numbers here."""
        return tuple(x.address if isinstance(x, At) else 0 for x in self[: len(SCALARS)])

    @property
    def on_device(self) -> bool:
        """Whether some are numbers on the device alone, so that only a kernel can form the thresholds."""
        return At in map(type, self)

    def thresholds(self) -> Thresholds:
        """reference.form_thresholds of numbers that the host knows."""
        scalars: tuple[Any, ...] = self[: len(SCALARS)]
        return form_thresholds(*(x if isinstance(x, Tensor) else float(x) for x in scalars))


OWN = Hyperparameters._fields[: Hyperparameters._fields.index("rule")]  # of any rule


SEVERAL = {key for rule in RULES.values() for key, x in rule.options.items() if isinstance(x, tuple)}


class Reader:
    """Reads a rule's hyperparameters out of param groups; cheap enough for each step."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.keys = (*OWN, *rule.options)
        self.values_of = itemgetter(*self.keys)
        self._several = [i for i, key in enumerate(self.keys) if key in SEVERAL]

    def are_lasting(self, values: tuple[Any, ...]) -> bool:
        """Whether what holds several values, such as betas, cannot change in place: a tuple of numbers."""
        several = [values[i] for i in self._several]
        return all(type(x) is tuple and not any(isinstance(y, Tensor) for y in x) for x in several)

    def numbers_of(self, group: Mapping[str, Any], device: torch.device | None = None) -> tuple[Any, ...]:
        """values_of; tensors as ``number`` has them, the first of SCALARS' by kernels on ``device``."""
        return tuple(number(key, group[key], device if key in SCALARS else None) for key in self.keys)

    def read(self, group: Mapping[str, Any], device: torch.device | None = None) -> Hyperparameters:
        """The Hyperparameters of a param group, as numbers_of has them."""
        return Hyperparameters.of_values(self.rule, self.numbers_of(group, device))


def can_be_read(x: Tensor, device: torch.device | None) -> bool:
    """Whether kernels on ``device`` can read it as At."""
    return x.device == device and x.dtype == torch.float32 and x.numel() == 1


def number(name: str, value: Any, device: torch.device | None) -> Any:
    """A hyperparameter without its tensor: its number, or At where kernels on ``device`` read it.

    The number of a float32 tensor is one of NumPy's, with which the reference computes as torch.optim does
    with the tensor: AdamW forms its step size in float32 then.
    """
    if isinstance(value, (list, tuple)) and name in SEVERAL:
        return tuple(number(name, x, None) for x in value)
    if not isinstance(value, Tensor):
        return value
    if can_be_read(value, device):
        return At(value.data_ptr())
    plain = scalar(name, value)
    return np.float32(plain) if value.dtype == torch.float32 else plain
