"""What a model is called with: positional and keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

from torch import nn

Given: TypeAlias = tuple[tuple[Any, ...], dict[str, Any]]


def arguments_of(example_input: Any, kwargs: Mapping[str, Any] | None = None) -> Given:
    """A mapping holds keyword arguments, a tuple positional ones; anything else is the one argument."""
    if isinstance(example_input, Mapping):
        return (), {**example_input, **(kwargs or {})}
    args = example_input if isinstance(example_input, tuple) else (example_input,)
    return args, dict(kwargs or {})


def call(model: nn.Module, given: Given) -> Any:
    return model(*given[0], **given[1])
