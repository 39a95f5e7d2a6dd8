"""Checks of hyperparameters that are numbers of Python or NumPy, or tensors of one element.

core/checks.py and the update rules' own checks use them.
"""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

from torch import Tensor


def scalar(name: str, value: Any) -> Any:
    """The number in a tensor hyperparameter; anything else unchanged."""
    if not isinstance(value, Tensor):
        return value
    if value.numel() != 1:
        shape = tuple(value.shape)
        raise ValueError(
            f"Tensor {name} must be 1-element: expected a number or one element, got shape {shape}"
        )
    if value.device.type == "meta":
        raise ValueError(f"{name}: expected a number or a tensor with memory, got one on the meta device")
    return value.detach().item()


def check_number(name: str, value: Any) -> None:
    """Raise a TypeError unless it is a number of Python or NumPy, or a tensor; text is refused."""
    if not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name}: expected a number, got {value!r}")


def check_not_negative(name: str, value: Any) -> None:
    """Raise a ValueError below 0 and for NaN, in torch.optim's words."""
    if not value >= 0:
        raise ValueError(f"Invalid {name}: {value} (expected a number >= 0)")


def check_coefficient(name: str, value: Any) -> None:
    """Raise a TypeError or ValueError unless it is a finite number >= 0, or a float tensor of one."""
    if type(value) is float and 0 <= value < math.inf:
        return  # the usual case comes first, because schedules change coefficients in every step
    if isinstance(value, bool) or not isinstance(value, (Real, Tensor)):
        raise TypeError(f"{name}: expected a number, got {value!r}")
    if isinstance(value, Tensor) and value.numel() != 1:
        raise ValueError(f"{name}: expected a number or a 1-element tensor, got shape {tuple(value.shape)}")
    if isinstance(value, Tensor) and not value.is_floating_point():
        raise TypeError(f"{name}: expected a number or a floating-point tensor, got {value.dtype}")
    try:
        number = float(scalar(name, value))
    except OverflowError:
        number = math.inf
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{name}: expected a finite number >= 0, got {number}")
