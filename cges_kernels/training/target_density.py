"""The schedule that finds the strength for a wanted density, and then cuts to it and holds the zeros.

It is a CoefficientScheduler (schedules.py) whose factor is set by a feedback loop.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch

from ..core.tensors import count_nonzero
from .removal import Weight, cut, full_coefficients, left, sampled, strength_to_leave, within_reach
from .schedules import CoefficientScheduler, check_density, check_no_epoch, check_steps, cubic


class TargetDensity(CoefficientScheduler):
    """Finds the strength at which a wanted fraction of the weights is left, and lands on that fraction.

    It counts the exact nonzeros of all parameters in param groups that have a penalty. The coefficients keep
    their ratios: one factor, by which their initial values are multiplied, is controlled, beginning at 0.01.

    - Approach: at optimizer step k the density is to be `1 - (1 - density) * (1 - (1 - k / steps)^3)`, the
      curve of [`CubicRamp`][cges_kernels.CubicRamp]. A hundred times on the way the factor moves by a
      proportional and an integral part of log(density now / density wanted).
    - Bounds: weights shrink for long before the first one dies, and until then the density says nothing. So
      the factor stays below what would remove the weights within a twentieth of the approach if no gradient
      held them. While some weight has lost half of its scale, the factor falls instead of rising; not so
      with `freeze=False`, where no landing makes up for it.
    - Landing (`freeze=True`): once `steps` are over, what is too much is set to zero in the order in which
      the penalty would remove it, the same share of each weight, and what is left keeps its value. Zeros are
      then held (`freeze_zeros="element"` in those param groups), the coefficients become 0, and the rest
      trains on without a penalty, as after pruning.

    The fewer the `steps`, the less does the penalty choose and the more does the cut. Where single groups
    hold more than a point of all weights, it cannot land within a point. Each weight keeps one group at
    least.

    Args:
        optimizer: a [`ProxSGD`][cges_kernels.ProxSGD] or [`ProxAdamW`][cges_kernels.ProxAdamW] with a penalty
            in some param group. Its strength matters little, because the factor finds its size.
        density: the fraction of weights to be left nonzero, in (0, 1].
        steps: the number of optimizer steps for the approach, >= 1. Half of the training does well.
        freeze: False leaves out the landing; the coefficients stay in force, and the density fluctuates.
        last_epoch: as for [`CoefficientWarmup`][cges_kernels.CoefficientWarmup].

    Raises:
        ValueError: a density outside (0, 1], `steps` below 1, no param group with a penalty, or param groups
            that lack a needed key.
        TypeError: `freeze` that is not a bool.

    Warns:
        UserWarning: once, where the density stays more than a point away after `steps`; and once, where a
            weight of two or more dims has become zero as a whole, which cuts the network in two.

    Examples:
        >>> optimizer = ProxSGD(cges_param_groups(model, 1e-3, scale="size"), lr=0.05, momentum=0.9)
        >>> control = TargetDensity(optimizer, 0.1, steps=5000)
        >>> for x, y in batches:  # 10,000 of them
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        ...     control.step()
    """

    _state = (
        *("target", "steps", "freeze", "last_epoch", "density", "factor", "frozen"),
        *("_error", "_warned", "_scales"),
    )
    _optional = ("_scales",)
    TOLERANCE = 0.01  # the target counts as reached within one percentage point
    START = 0.01  # the initial factor
    FACTORS = (1e-6, 1e6)  # the range of the factor
    PROPORTIONAL, INTEGRAL = 1.0, 0.2  # the gains of the feedback loop, per measurement
    LARGEST = 0.5  # the largest change of log(factor) per measurement
    FASTEST = 0.05  # the largest part of the way to the target that weights may shrink per measurement
    WEAKEST = 0.5  # the part of its initial scale below which no weight is to shrink

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        density: float,
        steps: int,
        *,
        freeze: bool = True,
        last_epoch: int = -1,
    ) -> None:
        check_density("density", density)
        check_steps("steps", steps, 1)
        if not isinstance(freeze, bool):
            raise TypeError(f"freeze: expected a bool, got {freeze!r}")
        self.target, self.steps, self.freeze = float(density), steps, freeze
        self.density = 1.0  # as last measured
        self.factor = self.START  # of the initial coefficients
        self.frozen = self._warned = self._told = False
        self._error = 0.0
        # Of each weight: the strength that would have left the target at first.
        self._scales: list[float] = []
        super().__init__(optimizer, last_epoch)
        groups = self._groups()
        if not any(p.numel() for group in groups for p in group["params"]):
            raise ValueError(
                f"{type(optimizer).__name__}: expected a param group with group_lasso, exclusive_lasso or l1 "
                f"> 0 to reach a density of {density} with, got none"
            )
        if freeze and any("freeze_zeros" not in group for group in groups):
            raise ValueError(
                "freeze=True: expected an optimizer whose param groups have freeze_zeros, got "
                f"{type(optimizer).__name__}"
            )

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        check_density("target", state["target"])
        for key in ("freeze", "frozen", "_warned"):
            if not isinstance(state[key], bool):
                raise TypeError(f"{key}: expected a bool, got {state[key]!r}")
        ranges = {"density": (0, 1), "factor": self.FACTORS, "_error": (-1e9, 1e9), "_scales": (0, math.inf)}
        for key, (low, high) in ranges.items():
            for value in state.get(key, []) if key == "_scales" else [state[key]]:
                if not isinstance(value, Real) or not low <= float(value) <= high:
                    raise ValueError(f"{key}: expected a number in [{low}, {high}], got {value!r}")

    def _groups(self) -> list[dict[str, Any]]:
        """The param groups that have a penalty at full strength."""
        return [group for group in self.optimizer.param_groups if any(full_coefficients(group))]

    def _weights(self) -> list[Weight]:
        """The parameters under a penalty, each with its param group."""
        return [(p, group) for group in self._groups() for p in group["params"] if p.numel()]

    def step(self, epoch: int | None = None) -> None:
        """Measure the density if a measurement is due, and move on by one optimizer step.

        Args:
            epoch: an argument of LRScheduler's; it must be None.

        Raises:
            ValueError: `epoch` that is not None.
            RuntimeError: a newer schedule of coefficients has been made for the optimizer.
        """
        check_no_epoch(epoch)
        self._check_newest()
        k = self.last_epoch + 1
        every = max(1, self.steps // 100)
        landing = self.freeze and k >= self.steps
        if not self.frozen and (k % every == 0 or landing):
            self.density = self.measure()
            if landing and self.density >= self.target - self.TOLERANCE / 2:
                self._land()
            else:
                self._control(k, every)
            self._warn_of_dead_weights()
            if k >= self.steps and not self._warned:
                self._warn_if_stuck()
        super().step(epoch)

    @torch.no_grad()
    def measure(self) -> float:
        """Count the nonzero weights now.

        Returns:
            Their fraction of all weights in param groups with a penalty. For DTensors it is the fraction over
                all ranks, so every rank must call it.
        """
        params = [p for p, _ in self._weights()]
        return sum(map(count_nonzero, params)) / max(sum(p.numel() for p in params), 1)

    def _land(self) -> None:
        """Cut what is above the target, and hold all zeros."""
        if self.density > self.target + self.TOLERANCE / 2:
            weights = self._weights()
            cut(weights, self.target * sum(p.numel() for p, _ in weights))
            self.density = self.measure()
        self.frozen = True
        for group in self._groups():
            group["freeze_zeros"] = "element"

    def _control(self, k: int, every: int) -> None:
        """Move the factor after a measurement at optimizer step k; `every` steps lie between two of them.

        The factor itself is the integral, so a bound that holds it leaves nothing to unwind.
        """
        wanted = 1 - (1 - self.target) * cubic(k / self.steps)
        error = math.log(max(self.density, 1e-9) / wanted)
        change = self.PROPORTIONAL * (error - self._error) + self.INTEGRAL * error
        self._error = error
        weights = [sampled(weight) for weight in self._weights()]
        if len(self._scales) != len(weights):
            self._scales = [self._scale(weight) for weight in weights]
        if self.freeze and any(self._is_weak(*pair) for pair in zip(weights, self._scales)):
            change = -self.LARGEST
        change = min(max(change, -self.LARGEST), self.LARGEST)
        lrs = [float(group["lr"]) for _, group in weights]
        bounds = [self.FASTEST * s / (lr * every) for lr, s in zip(lrs, self._scales) if lr > 0]
        low, high = self.FACTORS
        self.factor = min(max(min(self.factor * math.exp(change), *bounds, high), low), high)

    def _scale(self, weight: Weight) -> float:
        """The strength that would leave the target of a weight now; infinite where no more is left anyway."""
        wanted = within_reach(weight, self.target * weight[0].numel())
        return strength_to_leave(weight, wanted) if count_nonzero(weight[0]) > wanted else math.inf

    def _is_weak(self, weight: Weight, scale: float) -> bool:
        """Whether less than the target of a weight has kept half the scale that it had at first."""
        if math.isinf(scale):
            return False
        wanted = within_reach(weight, self.target * weight[0].numel())
        return count_nonzero(left(weight, self.WEAKEST * scale)) <= wanted

    def _warn_of_dead_weights(self) -> None:
        """Warn, once, where all of a weight is zero: nothing passes through its layer any more."""
        for group in [] if self._told else self._groups():
            for i, p in enumerate(group["params"]):
                if p.dim() > 1 and p.numel() and not p.any():
                    self._told = True
                    name = group["param_names"][i] if "param_names" in group else f"a weight {tuple(p.shape)}"
                    warnings.warn(
                        f"density {self.target}: {name} is zero as a whole (the coefficients are at "
                        f"{self.factor:.2g} of their initial values): take more steps, a greater density, or "
                        "smaller groups",
                        stacklevel=3,
                    )
                    return

    def _warn_if_stuck(self) -> None:
        """Warn, once, if the density does not come nearer to the target."""
        above = self.density - self.target
        reason = None
        if self.frozen and above > self.TOLERANCE:
            reason = "the groups are too large, or a coefficient of 0 or exclusive lasso alone leaves some"
        elif above < -self.TOLERANCE and self.factor == self.FACTORS[0]:
            reason = "zeros do not come back: begin with weaker coefficients, or take more steps"
        elif above > self.TOLERANCE and self.factor == self.FACTORS[1]:
            reason = "is the learning rate 0, or the initial coefficient far too small?"
        if reason:
            self._warned = True
            warnings.warn(
                f"density {self.target}: not reached; {100 * self.density:.1f}% of the weights are nonzero "
                f"with the coefficients at {self.factor:.0e} of their initial values ({reason})",
                stacklevel=3,
            )

    def get_factor(self) -> float:
        """The controlled factor; 0 once zeros are held."""
        return 0.0 if self.frozen else self.factor
