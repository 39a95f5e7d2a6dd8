"""Schedules of the coefficients, used like those of torch.optim.lr_scheduler and beside them.

Each multiplies group_lasso, exclusive_lasso and l1 of every param group by one factor that changes from step
to step. The full values are kept in the param groups as `initial_group_lasso` and so on, as
torch.optim.lr_scheduler keeps `initial_lr`.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from ..core.hyperparameters import COEFFICIENTS, INITIAL


def check_steps(name: str, value: Any, least: int = 0) -> None:
    """Raise a ValueError unless `value` is a whole number >= `least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}: expected an int >= {least}, got {value!r}")


def check_density(name: str, value: Any) -> None:
    """Raise a ValueError unless `value` is a number in (0, 1]."""
    if not isinstance(value, Real) or isinstance(value, bool) or not 0 < float(value) <= 1:
        raise ValueError(f"{name}: expected a fraction of nonzero weights in (0, 1], got {value!r}")


def check_no_epoch(epoch: int | None) -> None:
    """Raise a ValueError unless `epoch`, an argument of LRScheduler.step, is None."""
    if epoch is not None:
        raise ValueError(f"epoch: expected None, as a schedule moves on step by step, got {epoch}")


def _place(x: Tensor) -> tuple[Any, int]:
    """A key that is the same for two coefficients if they are one tensor or share its memory.

    DTensors have no address of their own, so they are known by identity.
    """
    return x.device, x.data_ptr() or id(x)


def cubic(t: float) -> float:
    """1 - (1 - t)^3 for t in [0, 1], 0 below and 1 above: steep first, level at the end."""
    return 1 - (1 - min(max(t, 0.0), 1.0)) ** 3


# The schedule that was made last for each optimizer.
_newest: weakref.WeakKeyDictionary[Optimizer, weakref.ref[CoefficientScheduler]] = weakref.WeakKeyDictionary()


class CoefficientScheduler(LRScheduler):
    """The base of the schedules of coefficients; a subclass defines the factor in `get_factor`.

    Build it, then call `step()` after each `optimizer.step()`. A coefficient that is a tensor is changed in
    place, also where several param groups share it; it may not be in two optimizers. An optimizer takes one
    schedule of coefficients, the one that was made last, beside those of lr, also in a ChainedScheduler.

    It is an LRScheduler of torch's, so trainers step it and keep it in their checkpoints as they do those. It
    changes no lr; `get_last_lr` returns the optimizer's.
    """

    _state: tuple[str, ...] = ("last_epoch",)  # the attributes that state_dict holds
    _optional: tuple[str, ...] = ()  # those that files of older versions lack
    _least_steps = 1

    def __init__(self, optimizer: Optimizer, last_epoch: int = -1) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(f"optimizer: expected an Optimizer, got {type(optimizer).__name__}")
        check_steps("last_epoch", last_epoch, -1)
        needed = [*COEFFICIENTS] + [*(INITIAL.values() if last_epoch != -1 else ())]
        for i, group in enumerate(optimizer.param_groups):
            if missing := [key for key in needed if key not in group]:
                raise ValueError(
                    f"optimizer with last_epoch={last_epoch}: expected param groups with {needed}, "
                    f"got {type(optimizer).__name__} without {missing} in param_groups[{i}]"
                )
        # LRScheduler.__init__ is not called, because all that it does concerns lr.
        self.optimizer, self._last_epoch, self._step_count = optimizer, last_epoch, 0
        self.base_lrs = self.get_lr()
        _newest[optimizer] = weakref.ref(self)
        self.step()

    @property
    def last_epoch(self) -> int:
        """The index of the last step taken."""
        return self._last_epoch

    @last_epoch.setter
    def last_epoch(self, value: int) -> None:
        if value < self._last_epoch:
            raise RuntimeError(
                f"last_epoch: expected {self._last_epoch} or more, got {value}. SequentialLR, which sets "
                f"schedules back, does not serve {type(self).__name__}: step it beside"
            )
        self._last_epoch = value

    def get_factor(self) -> float:
        """The factor by which the full values are multiplied at `last_epoch`."""
        raise NotImplementedError

    def step(self, epoch: int | None = None) -> None:
        """Move on by one optimizer step, and set the coefficients.

        Args:
            epoch: an argument of LRScheduler's; it must be None.

        Raises:
            ValueError: `epoch` that is not None.
            RuntimeError: a newer schedule of coefficients has been made for the optimizer.
        """
        check_no_epoch(epoch)
        self._check_newest()
        self.last_epoch += 1
        self._step_count += 1
        self._apply()

    def _check_newest(self) -> None:
        """Raise a RuntimeError if the optimizer has a newer schedule, because each would undo the other."""
        newest = _newest.get(self.optimizer, lambda: None)()
        if newest is not None and newest is not self:
            raise RuntimeError(
                f"{type(self).__name__}: expected to be the optimizer's only schedule of coefficients, got a "
                f"newer {type(newest).__name__}, which sets the same ones: step that alone"
            )

    def get_lr(self) -> list[Any]:
        """The optimizer's lr in force, one per param group; tensors are copied."""
        lrs = (group["lr"] for group in self.optimizer.param_groups)
        return [lr.clone() if isinstance(lr, Tensor) else lr for lr in lrs]

    get_last_lr = get_lr

    @torch.no_grad()
    def _apply(self) -> None:
        """Scale every coefficient. A tensor that several param groups hold is one coefficient, written once.

        Therefore all full values are read before the first one is written.
        """
        factor, groups = self.get_factor(), self.optimizer.param_groups
        for group in groups:
            for key, initial in INITIAL.items():
                if initial not in group:
                    group[initial] = self._full_value(group[key])
        written = set()
        for group in groups:
            for key, initial in INITIAL.items():
                if not isinstance(group[key], Tensor):
                    group[key] = group[initial] * factor
                elif _place(group[key]) not in written:
                    written.add(_place(group[key]))
                    group[key].copy_(group[initial] * factor)

    def _full_value(self, now: Any) -> Any:
        """The full value of a coefficient whose param group does not hold one yet.

        That is its present value, unless another param group shares the tensor and holds the full value.
        """
        if not isinstance(now, Tensor):
            return now
        for group in self.optimizer.param_groups:
            for key, initial in INITIAL.items():
                known = group.get(initial)
                if (
                    isinstance(known, Tensor)
                    and isinstance(group[key], Tensor)
                    and _place(group[key]) == _place(now)
                ):
                    return known.clone()
        return now.clone()

    def get_last_coefficients(self) -> list[dict[str, float]]:
        """The three coefficients in force, as plain numbers.

        Returns:
            One dict per param group, with the keys group_lasso, exclusive_lasso and l1. They do not contain
                lr.
        """
        return [{key: float(group[key]) for key in COEFFICIENTS} for group in self.optimizer.param_groups]

    def state_dict(self) -> dict[str, Any]:
        """The schedule's position, as plain numbers.

        The full values of the coefficients are in the optimizer's state_dict, so save and load that as well.

        Returns:
            A dict for `load_state_dict`.
        """
        return {key: getattr(self, key) for key in self._state}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from `state_dict`, and set the coefficients to match.

        Load the optimizer's state_dict first, because it holds the full values.

        Args:
            state_dict: a result of `state_dict()`.

        Raises:
            ValueError: a state_dict that lacks some of this schedule's keys, or a value that the schedule
                could not have. Nothing is loaded then.
            TypeError: a value of the wrong type. Nothing is loaded then.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        needed = [key for key in self._state if key not in self._optional]
        if missing := [key for key in needed if key not in state_dict]:
            raise ValueError(f"state_dict: expected {needed}, got one without {missing}")
        state = {key: state_dict[key] for key in self._state if key in state_dict}
        self._check_state(state)
        for key, value in state.items():
            setattr(self, "_last_epoch" if key == "last_epoch" else key, value)
        self._apply()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Raise an error unless the schedule could have saved these values."""
        check_steps("last_epoch", state["last_epoch"])
        if "steps" in state:
            check_steps("steps", state["steps"], self._least_steps)


class CoefficientWarmup(CoefficientScheduler):
    """Raises group_lasso, exclusive_lasso and l1 of every param group linearly from 0 to their full values.

    Use it like a learning-rate scheduler, and beside one: build it, then call `step()` after each
    `optimizer.step()`. Optimizer step k = 0, 1, ... runs with `initial * min(k / steps, 1)`.

    Args:
        optimizer: one whose param groups have the three coefficients, such as
            [`ProxSGD`][cges_kernels.ProxSGD].
        steps: the number of optimizer steps to full strength, >= 0; 0 is full strength at once.
        last_epoch: the index of the last step taken, -1 (default) at the start. Another index needs the keys
            `initial_group_lasso` and so on in the param groups, as an optimizer's state_dict restores them.

    Raises:
        ValueError: `steps` that is not a whole number >= 0, or param groups that lack a needed key.

    Examples:
        >>> optimizer = ProxSGD(cges_param_groups(model, lam=1e-2, scale="size"), lr=0.1, momentum=0.9)
        >>> warmup = CoefficientWarmup(optimizer, steps=1000)
        >>> for x, y in batches:
        ...     optimizer.zero_grad()
        ...     loss_fn(model(x), y).backward()
        ...     optimizer.step()
        ...     warmup.step()
    """

    _state = ("steps", "last_epoch")
    _least_steps = 0

    def __init__(self, optimizer: Optimizer, steps: int, last_epoch: int = -1) -> None:
        check_steps("steps", steps)
        self.steps = steps
        super().__init__(optimizer, last_epoch)

    def get_factor(self) -> float:
        """`min(last_epoch / steps, 1)`, or 1 where steps is 0."""
        return min(self.last_epoch / self.steps, 1.0) if self.steps else 1.0


class CubicRamp(CoefficientScheduler):
    """Raises the coefficients as gradual pruning raises sparsity: fast first, then ever slower.

    Optimizer step k = 0, 1, ... runs with `initial * (1 - (1 - (k - begin) / steps)^3)`, with 0 before
    `begin`, and at full strength from `begin + steps` on (Zhu and Gupta, To prune, or not to prune, 2017, Eq.
    1). It is used as [`CoefficientWarmup`][cges_kernels.CoefficientWarmup] is.

    Args:
        optimizer: one whose param groups have the three coefficients, such as
            [`ProxSGD`][cges_kernels.ProxSGD].
        steps: the number of optimizer steps from 0 to full strength, >= 1.
        begin: the number of optimizer steps without any penalty, >= 0 (default 0).
        last_epoch: as for [`CoefficientWarmup`][cges_kernels.CoefficientWarmup].

    Raises:
        ValueError: `steps` or `begin` that is not such a whole number, or param groups that lack a needed
            key.
    """

    _state = ("steps", "begin", "last_epoch")

    def __init__(self, optimizer: Optimizer, steps: int, begin: int = 0, last_epoch: int = -1) -> None:
        check_steps("steps", steps, 1)
        check_steps("begin", begin)
        self.steps, self.begin = steps, begin
        super().__init__(optimizer, last_epoch)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        super()._check_state(state)
        check_steps("begin", state["begin"])

    def get_factor(self) -> float:
        """The cubic of `(last_epoch - begin) / steps`, held between 0 and 1."""
        return cubic((self.last_epoch - self.begin) / self.steps)
