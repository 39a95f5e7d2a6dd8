"""Reorders a file's optimizer state by the names of parameters, if both the file and the optimizer have some.

`load_state_dict` in proximal.py uses it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim.optimizer import Optimizer

# The attributes under which DDP, torch.compile, FSDP and activation checkpointing keep the module they wrap.
WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def by_name(optimizer: Optimizer, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    """The state_dict with its parameters in the optimizer's order, group by group, if both have names.

    Returns None if the number of param groups differs: torch then raises the error. A param group without
    names, or with a wrong number of them, stays as it is.

    Raises:
        ValueError: names that are not those of the optimizer's parameters.
    """
    groups = list(state_dict["param_groups"])
    if len(groups) != len(optimizer.param_groups):
        return None
    for i, (ours, saved) in enumerate(zip(optimizer.param_groups, groups)):
        expected, got = (_plain_names(group.get("param_names") or ()) for group in (ours, saved))
        if not expected or len(expected) != len(got) or len(got) != len(saved["params"]):
            continue
        if str in map(type, saved["params"]):  # torch.distributed.checkpoint has already put it in our order
            groups[i] = {**saved, "param_names": ours["param_names"]}
            continue
        if expected == got:
            continue
        if sorted(expected) != sorted(got) or len(set(got)) != len(got):
            raise ValueError(
                f"state_dict: expected param_groups[{i}]['param_names'] to hold {expected} in some order, "
                f"got {got}; without 'param_names' state goes by the order of parameters"
            )
        place = {name: k for k, name in enumerate(got)}
        params = [saved["params"][place[name]] for name in expected]
        groups[i] = {**saved, "params": params, "param_names": ours["param_names"]}
    return {**state_dict, "param_groups": groups}


def _plain_names(names: Sequence[str]) -> list[str]:
    """Parameters' names without the parts that wrappers add; unchanged if two would become the same."""
    plain = [".".join(part for part in name.split(".") if part not in WRAPPERS) for name in names]
    return plain if len(set(plain)) == len(plain) else list(names)
