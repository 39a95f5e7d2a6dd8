"""Scenarios of training loops and their optimizers, as functions that take a constructor.

Each makes an optimizer, trains with it, and returns the tensors by which two optimizers are compared.
"""

from helpers.scenarios import loops, options, tensors
from helpers.scenarios.registry import SCENARIOS

__all__ = ["SCENARIOS", "loops", "options", "tensors"]
