"""The update rules for the rest of the package: their options, states, checks and update functions.

A rule computes z from weights, gradients and states; the prox takes z and knows no rule. For C++ the rules
are defined in csrc/common/sgd.h and adamw.h, for Triton's kernels in backends/triton/updates.py.
docs/design/a-step.md says how to add one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .numbers import check_not_negative, check_number, scalar
from .updates import adamw_update, sgd_update

STEP = "step"  # the key under which torch.optim keeps the count of a parameter's steps


@dataclass(frozen=True, eq=False)
class Rule:
    """An update rule.

    Attributes:
        name: the name by which C++ and Triton find their code for the rule.
        options: the rule's keys in a param group beside lr, each with the value that has no effect.
        states: the names of the states that fused executors keep for a parameter, tensors like it.
        states_with: the names of the states that the rule keeps with given options, possibly none.
        update: the function of updates.py.
        check: raises an error for bad options of a param group, in torch.optim's words.
        counts: whether the rule also keeps the number of a parameter's steps, a tensor of one element, which
            its update takes as `step`.
        untold: options that say how a step is run, and are not passed to `update`.
        reference_only: options that only the reference executor has.
    """

    name: str
    options: Mapping[str, Any]
    states: tuple[str, ...]
    states_with: Callable[[Mapping[str, Any]], tuple[str, ...]]
    update: Callable[..., tuple[Any, ...]]
    check: Callable[[Mapping[str, Any]], None]
    counts: bool = False
    untold: frozenset[str] = field(default_factory=frozenset)
    reference_only: tuple[str, ...] = ()

    def keeps_state(self, options: Mapping[str, Any]) -> bool:
        """Whether the rule keeps any state with these options: SGD keeps none without momentum."""
        return bool(self.states_with(options))

    def told(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options that are passed to `update`, by name."""
        return {key: options[key] for key in self.options if key not in self.untold}


def _check_sgd(group: Mapping[str, Any]) -> None:
    """Raise an error for bad options of SGD, in torch.optim's words."""
    for name in ("momentum", "dampening", "weight_decay"):
        check_number(name, group[name])
    check_not_negative("momentum value", scalar("momentum", group["momentum"]))
    check_not_negative("weight_decay value", scalar("weight_decay", group["weight_decay"]))
    if math.isnan(group["dampening"]):
        raise ValueError("Invalid dampening value: nan (expected a number)")
    if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
        raise ValueError(
            "Nesterov momentum requires a momentum and zero dampening, "
            f"got momentum={group['momentum']}, dampening={group['dampening']}"
        )


def _check_adamw(group: Mapping[str, Any]) -> None:
    """Raise an error for bad options of AdamW, in torch.optim's words."""
    betas = group["betas"]
    if not isinstance(betas, (tuple, list)) or len(betas) != 2:
        raise TypeError(f"betas: expected two numbers, got {betas!r}")
    for i, beta in enumerate(betas):
        check_number(f"betas[{i}]", beta)
        if not 0 <= scalar(f"betas[{i}]", beta) < 1:
            raise ValueError(f"Invalid beta parameter at index {i}: {beta} (expected a number in [0, 1))")
    for name in ("eps", "weight_decay"):
        check_number(name, group[name])
    check_not_negative("epsilon value", scalar("eps", group["eps"]))
    check_not_negative("weight_decay value", scalar("weight_decay", group["weight_decay"]))
    if group["foreach"] and not group["capturable"]:
        for name, value in {"lr": group["lr"], "betas[0]": betas[0], "betas[1]": betas[1]}.items():
            if isinstance(value, Tensor):
                raise ValueError(f"{name} as a Tensor is not supported for capturable=False and foreach=True")


def _states_of_sgd(options: Mapping[str, Any]) -> tuple[str, ...]:
    return ("momentum_buffer",) if options["momentum"] != 0 else ()


def _states_of_adamw(options: Mapping[str, Any]) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if options["amsgrad"] else ("exp_avg", "exp_avg_sq")


SGD = Rule(
    name="sgd",
    options={"momentum": 0.0, "dampening": 0.0, "weight_decay": 0.0, "nesterov": False, "maximize": False},
    states=("momentum_buffer",),
    states_with=_states_of_sgd,
    update=sgd_update,
    check=_check_sgd,
)
ADAMW = Rule(
    name="adamw",
    options={
        "betas": (0.0, 0.0),
        "eps": 0.0,
        "weight_decay": 0.0,
        "amsgrad": False,
        "maximize": False,
        "decoupled_weight_decay": True,
        "capturable": False,
        "differentiable": False,
        "fused": None,
    },
    states=("exp_avg", "exp_avg_sq"),
    states_with=_states_of_adamw,
    update=adamw_update,
    check=_check_adamw,
    counts=True,
    untold=frozenset({"capturable", "differentiable", "fused"}),
    reference_only=("amsgrad",),
)
RULES = {rule.name: rule for rule in (SGD, ADAMW)}
