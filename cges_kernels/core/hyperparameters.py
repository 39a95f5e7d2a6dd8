"""The arguments of a step: the hyperparameters of a param group, and the phase of each tensor.

This file defines them for Python, csrc/common/step.h for C++, and backends/triton/tables.py for Triton's
kernels. docs/design/a-step.md follows them from a param group to a kernel. The options of the update rule
(rules.py) are kept apart from those of the prox.
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
from .rules import RULES, SGD, Rule
from .shrinkage import Thresholds, form_thresholds

COEFFICIENTS = ("group_lasso", "exclusive_lasso", "l1")
INITIAL = {key: f"initial_{key}" for key in COEFFICIENTS}  # the keys for the full values of schedules
PROX_MODES = ("sequential", "exact")
FREEZE_MODES = (None, "group", "element")

SCALARS = ("lr", *COEFFICIENTS)  # the hyperparameters that kernels can read from tensors on their device


class Phase(IntEnum):
    """The kind of a tensor's step; the numbers are those of csrc/common/phase.h."""

    SKIPPED = -1  # the tensor has no gradient and is left as it is
    PROX_ALONE = 0  # there is no update: z is w
    STATELESS = 1  # the rule keeps no state: SGD without momentum
    FIRST = 2  # the state is written, but holds nothing yet that could be read
    RUNNING = 3  # the state is read and written

    @classmethod
    def of(cls, keeps_state: bool, begun: bool) -> Phase:
        """The phase of a tensor with a gradient, given whether the rule keeps a state and has begun it."""
        if not keeps_state:
            return cls.STATELESS
        return cls.RUNNING if begun else cls.FIRST


class At(NamedTuple):
    """The address, in the device's memory, of a float32 that a kernel reads itself."""

    address: int


class Hyperparameters(NamedTuple):
    """The hyperparameters of a param group, under their names in it.

    Those in SCALARS are numbers or At; if autograd follows them they may be tensors. lr and the coefficients
    are not yet multiplied with each other: `thresholds` does that.
    """

    lr: Any = 0.0
    group_lasso: Any = 0.0
    exclusive_lasso: Any = 0.0
    l1: Any = 0.0
    prox_mode: str = "sequential"
    freeze_zeros: str | None = None
    skip_dead: bool = False
    rule: Rule = SGD
    options: tuple[Any, ...] = tuple(SGD.options.values())  # values of the rule's options, in its order

    @classmethod
    def make(cls, rule: Rule = SGD, **named: Any) -> Hyperparameters:
        """The hyperparameters with these names, options of the rule included; all others have no effect."""
        options = tuple(named.pop(key, default) for key, default in rule.options.items())
        return cls(rule=rule, options=options, **named)

    @classmethod
    def of_values(cls, rule: Rule, values: tuple[Any, ...]) -> Hyperparameters:
        """The hyperparameters with the values that a Reader of the rule has read, in its keys' order."""
        return cls._make((*values[: len(OWN)], rule, values[len(OWN) :]))

    @classmethod
    def of_prox(
        cls, group_lasso: float, exclusive_lasso: float, l1: float, prox_mode: str
    ) -> Hyperparameters:
        """The hyperparameters of a step without an update, whose coefficients contain lr, so lr is 1 here."""
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
        """The address at which kernels read each of SCALARS; 0 for those that are numbers."""
        return tuple(x.address if isinstance(x, At) else 0 for x in self[: len(SCALARS)])

    @property
    def on_device(self) -> bool:
        """Whether some of SCALARS are known on the device only, so that only a kernel can form thresholds."""
        return At in map(type, self)

    def thresholds(self) -> Thresholds:
        """lr times each coefficient, if the host knows all of them; see shrinkage.form_thresholds."""
        scalars: tuple[Any, ...] = self[: len(SCALARS)]
        followed = (isinstance(x, Tensor) and x.requires_grad for x in scalars)
        return form_thresholds(*(x if follow else float(x) for x, follow in zip(scalars, followed)))


OWN = Hyperparameters._fields[: Hyperparameters._fields.index("rule")]  # the keys that every rule has


# Options that hold several values, such as betas.
SEVERAL = {key for rule in RULES.values() for key, x in rule.options.items() if isinstance(x, tuple)}
AS_TENSORS = {"lr", *SEVERAL}  # options with which torch.optim computes in the tensors' dtype


class Reader:
    """Reads a rule's hyperparameters out of param groups, cheaply enough for each step.

    `values_of(group)` gives the values of `keys` as they are.
    """

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self.keys = (*OWN, *rule.options)
        self.values_of = itemgetter(*self.keys)
        self._several = [i for i, key in enumerate(self.keys) if key in SEVERAL]

    def are_lasting(self, values: tuple[Any, ...]) -> bool:
        """Whether each option with several values holds a tuple of numbers, which cannot change in place."""
        several = [values[i] for i in self._several]
        return all(type(x) is tuple and not any(isinstance(y, Tensor) for y in x) for x in several)

    def numbers_of(
        self, group: Mapping[str, Any], device: torch.device | None = None, for_reference: bool = False
    ) -> tuple[Any, ...]:
        """The values of `keys` with tensors replaced as `number` does.

        `device` is the device whose kernels read SCALARS; other options always become numbers. The reference
        gets copies of the tensors in AS_TENSORS, because torch.optim computes with these as they are.
        """
        return tuple(
            _copied(group[key])
            if for_reference and key in AS_TENSORS
            else number(key, group[key], device if key in SCALARS else None)
            for key in self.keys
        )

    def read(
        self, group: Mapping[str, Any], device: torch.device | None = None, for_reference: bool = False
    ) -> Hyperparameters:
        """The Hyperparameters of a param group, with tensors replaced as in `numbers_of`."""
        return Hyperparameters.of_values(self.rule, self.numbers_of(group, device, for_reference))


def _copied(value: Any) -> Any:
    """A copy without dims or history of a tensor of one element, or of those in a list or tuple."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_copied, value))
    return value.detach().clone().squeeze() if isinstance(value, Tensor) else value


def can_be_read(x: Tensor, device: torch.device | None) -> bool:
    """Whether kernels on `device` can read the tensor through its address: one float32 there."""
    return x.device == device and x.dtype == torch.float32 and x.numel() == 1


def number(name: str, value: Any, device: torch.device | None) -> Any:
    """The value of a hyperparameter without a tensor: a number, or At where kernels on `device` read it.

    The number in a float32 tensor is returned as NumPy's float32. With it the reference computes what
    torch.optim does with the tensor: AdamW then multiplies lr by such a weight decay in float32.
    """
    if isinstance(value, (list, tuple)) and name in SEVERAL:
        return tuple(number(name, x, None) for x in value)
    if not isinstance(value, Tensor):
        return value
    if can_be_read(value, device):
        return At(value.data_ptr())
    plain = scalar(name, value)
    return np.float32(plain) if value.dtype == torch.float32 else plain
