"""The schedule that finds the strength for a wanted density, and then freezes the zeros.

It is a CoefficientScheduler (schedules.py) whose factor is set by a feedback loop.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch

from ..core.hyperparameters import COEFFICIENTS, INITIAL
from .schedules import CoefficientScheduler, check_density, check_no_epoch, check_steps, cubic


class TargetDensity(CoefficientScheduler):
    """Finds the strength at which a wanted fraction of the weights is left, to within one percentage point.

    It counts the exact nonzeros of all parameters in param groups that have a penalty. The coefficients keep
    their ratios: one factor, by which their initial values are multiplied, is controlled, beginning at 0.01.

    - Approach: at optimizer step k the density is to be `1 - (1 - density) * (1 - (1 - k / steps)^3)`, the
      curve of [`CubicRamp`][cges_kernels.CubicRamp]. A hundred times on the way the factor moves by a
      proportional and an integral part of log(density now / density wanted).
    - Landing (`freeze=True`): with momentum, zeros come and go by some percent from step to step. So once
      `steps` are over and the density is near the one wanted, zeros are frozen (`freeze_zeros="element"` in
      those param groups) and the rest is removed ever more gently. When the density is within half a point
      the coefficients become 0. What is left trains on without a penalty, as after pruning.

    Where single groups hold more than a point of all weights, it cannot land within a point. Large groups,
    such as whole channels, shrink for some hundred steps before they die, all at about the same time. With a
    few hundred `steps` the factor may have grown too far by then, so that whole layers die.

    Args:
        optimizer: a [`ProxSGD`][cges_kernels.ProxSGD] or [`ProxAdamW`][cges_kernels.ProxAdamW] with a penalty
            in some param group. Make it rather too weak than too strong: the factor finds its size, but units
            that an early blow has killed do not come back.
        density: the fraction of weights to be left nonzero, in (0, 1].
        steps: the number of optimizer steps for the approach, >= 1. Half of the training does well.
        freeze: False leaves out the landing; the coefficients stay in force, and the density fluctuates.
        last_epoch: as for [`CoefficientWarmup`][cges_kernels.CoefficientWarmup].

    Raises:
        ValueError: a density outside (0, 1], `steps` below 1, no param group with a penalty, or param groups
            that lack a needed key.
        TypeError: `freeze` that is not a bool.

    Warns:
        UserWarning: once, where the density stays more than a point away though the factor is at an end of
            its range of 1e-6 to 1e6; and once, where a weight of two or more dims has become zero as a whole,
            which cuts the network in two.

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
        *("target", "steps", "freeze", "last_epoch", "density", "factor", "landing", "frozen"),
        *("_error", "_warned"),
    )
    TOLERANCE = 0.01  # the target counts as reached within one percentage point
    BAND = 0.1  # the landing begins when the density is no more than this above the target
    START = 0.01  # the initial factor
    FACTORS = (1e-6, 1e6)  # the range of the factor
    PROPORTIONAL, INTEGRAL, LANDING = 1.0, 0.2, 0.5  # the gains of the feedback loop, per measurement
    LARGEST = 0.5  # the largest change of log(factor) per measurement

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
        self.factor = self.START  # of the initial coefficients, which the landing may weaken further
        self.landing = self.frozen = self._warned = self._told = False
        self._error = 0.0
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

    def _groups(self) -> list[dict[str, Any]]:
        """The param groups that have a penalty at full strength."""
        return [
            group
            for group in self.optimizer.param_groups
            if any(float(group.get(INITIAL[key], group[key])) > 0 for key in COEFFICIENTS)
        ]

    def step(self, epoch: int | None = None) -> None:
        """Measure the density if a measurement is due, and move on by one optimizer step.

        Args:
            epoch: an argument of LRScheduler's; it must be None.

        Raises:
            ValueError: `epoch` that is not None.
        """
        check_no_epoch(epoch)
        k = self.last_epoch + 1
        every = max(1, self.steps // 100)
        landed = self.frozen and self.density <= self.target + self.TOLERANCE / 2
        if k % every == 0 or (k >= self.steps and self.freeze and not landed):
            self.density = self.measure()
            self._warn_of_dead_weights()
            self._control(k, every)
        super().step(epoch)

    @torch.no_grad()
    def measure(self) -> float:
        """Count the nonzero weights now.

        Returns:
            Their fraction of all weights in param groups with a penalty.
        """
        params = [p for group in self._groups() for p in group["params"]]
        counts: list[Any] = [torch.count_nonzero(p) for p in params]
        return float(sum(counts)) / max(sum(p.numel() for p in params), 1)

    def _control(self, k: int, every: int) -> None:
        """Begin the landing, freeze zeros and move the factor, after a measurement at optimizer step k.

        `every` is the number of steps between two measurements of the approach.
        """
        wanted = 1 - (1 - self.target) * cubic(k / self.steps)
        error = math.log(max(self.density, 1e-9) / wanted)
        self.landing |= self.freeze and k >= self.steps and self.density <= self.target + self.BAND
        if self.landing and not self.frozen and self.density >= self.target - self.TOLERANCE / 2:
            self.frozen = True
            for group in self._groups():
                group["freeze_zeros"] = "element"
        if self.landing:
            within = self.frozen and self.density <= self.target + self.TOLERANCE / 2
            change = 0.0 if within else self.LANDING * error
        elif k % every == 0:
            change = self.PROPORTIONAL * (error - self._error) + self.INTEGRAL * error
            self._error = error
        else:
            change = 0.0
        change = min(max(change, -self.LARGEST), self.LARGEST)
        low, high = self.FACTORS
        self.factor = min(max(self.factor * math.exp(change), low), high)
        if k >= self.steps and not self._warned:
            self._warn_if_stuck(low, high)

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

    def _warn_if_stuck(self, low: float, high: float) -> None:
        """Warn, once, if the density cannot come nearer to the target."""
        above = self.density - self.target
        reason = None
        if above < -self.TOLERANCE and (self.factor == low or self.frozen):
            reason = "zeros do not come back: begin with weaker coefficients, or take more steps"
        elif above > self.TOLERANCE and self.factor == high:
            reason = "is the learning rate 0, or the initial coefficient far too small?"
        if reason:
            self._warned = True
            warnings.warn(
                f"density {self.target}: not reached; {100 * self.density:.1f}% of the weights are nonzero "
                f"with the coefficients at {self.factor:.0e} of their initial values ({reason})",
                stacklevel=4,
            )

    def get_factor(self) -> float:
        """The controlled factor; once zeros are frozen it falls with the distance to the target, to 0."""
        if not self.frozen:
            return self.factor
        above = self.density - self.target
        if above <= self.TOLERANCE / 2:
            return 0.0
        return self.factor * min(above / self.BAND, 1.0)
