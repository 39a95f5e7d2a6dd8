"""Calls models, and finds the tensors inside their arguments and outputs.

Arguments and outputs may be containers, dataclasses or other objects that hold tensors. The report
(reporting/) and compact() (compaction/) use this.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

Given: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def arguments_of(example_input: Any, kwargs: Mapping[str, Any] | None = None) -> Given:
    """The `(args, kwargs)` to call a model with.

    A mapping holds keyword arguments, a tuple holds positional ones, and anything else is the only argument.
    `kwargs` are further keyword arguments.
    """
    if isinstance(example_input, Mapping):
        return (), {**example_input, **(kwargs or {})}
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    return args, dict(kwargs or {})


def call(model: nn.Module, given: Given) -> Any:
    return model(*given[0], **given[1])


def _attributes(x: Any) -> dict[str, Any]:
    """The attributes of an object that torch does not know as a container; {} if it holds no tensors."""
    if isinstance(x, (Tensor, nn.Module, type)) or callable(x):
        return {}
    if isinstance(x, (set, frozenset)):
        return {str(i): value for i, value in enumerate(x)}
    if dataclasses.is_dataclass(x):
        return {f.name: getattr(x, f.name, None) for f in dataclasses.fields(x)}
    return dict(getattr(x, "__dict__", {}))


def leaves(x: Any) -> list[Any]:
    """Everything inside containers and other objects, in order; an object without tensors is a leaf."""

    def of(x: Any) -> list[Any]:
        found: list[Any] = []
        for leaf in tree_flatten(x)[0]:
            inside = {} if id(leaf) in seen else _attributes(leaf)
            if inside:
                seen[id(leaf)] = leaf  # keeps the object alive, or another could get its id
            parts = of(list(inside.values()))
            found += parts if any(isinstance(y, Tensor) for y in parts) else [leaf]
        return found

    seen: dict[int, Any] = {}
    return of(x)


def tensors_in(x: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]


def mapped(function: Callable[[Tensor], Any], x: Any) -> Any:
    """A copy of `x` with `function(tensor)` in place of each tensor, called in the order of `leaves`."""

    def of(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if id(leaf) in made:
            return made[id(leaf)][1]
        inside = _attributes(leaf)
        if not tensors_in(list(inside.values())):
            return leaf
        if isinstance(leaf, (set, frozenset)):
            return type(leaf)(tree_map(of, value) for value in leaf)
        new = copy.copy(leaf)
        made[id(leaf)] = leaf, new
        for name, value in inside.items():
            object.__setattr__(new, name, tree_map(of, value))
        return new

    made: dict[int, tuple[Any, Any]] = {}
    return tree_map(of, x)
