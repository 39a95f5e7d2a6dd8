"""What a model is called with and what it gives: tensors in containers, dataclasses and other objects."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map

Given: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def arguments_of(example_input: Any, kwargs: Mapping[str, Any] | None = None) -> Given:
    """A mapping holds keyword arguments, a tuple positional ones; anything else is the one argument."""
    if isinstance(example_input, Mapping):
        return (), {**example_input, **(kwargs or {})}
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    return args, dict(kwargs or {})


def call(model: nn.Module, given: Given) -> Any:
    return model(*given[0], **given[1])


def _attributes(x: Any) -> dict[str, Any]:
    """What an object that torch does not know as a container holds, if it may hold tensors."""
    if isinstance(x, (Tensor, nn.Module, type)) or callable(x):
        return {}
    if isinstance(x, (set, frozenset)):
        return {str(i): value for i, value in enumerate(x)}
    if dataclasses.is_dataclass(x):
        return {f.name: getattr(x, f.name, None) for f in dataclasses.fields(x)}
    return dict(getattr(x, "__dict__", {}))


def leaves(x: Any) -> list[Any]:
    """What is in containers and other objects, in their order; an object without tensors is itself one."""

    def of(x: Any) -> list[Any]:
        found: list[Any] = []
        for leaf in tree_flatten(x)[0]:
            inside = {} if id(leaf) in seen else _attributes(leaf)
            if inside:
                seen[id(leaf)] = leaf  # held, so that no other object takes its address
            parts = of(list(inside.values()))
            found += parts if any(isinstance(y, Tensor) for y in parts) else [leaf]
        return found

    seen: dict[int, Any] = {}
    return of(x)


def tensors_in(x: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(x) if isinstance(leaf, Tensor)]


def mapped(function: Callable[[Tensor], Any], x: Any) -> Any:
    """``x`` with ``function`` of each tensor in its place, in the order of :func:`leaves`."""

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
