"""Removal of constants from the layers that read them.

A filter whose every weight is zero still gives its bias, and a batch norm its shift: a constant that later
layers read. Where such a constant reaches a layer, what the layer makes of it goes into the layer's bias.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from .layers import WEIGHTED, Weighted, columns
from .unknown import Branches, inputs_of_layers


def _pads_with_zeros(layer: Weighted) -> bool:
    """Whether a constant channel may give something else at the borders than inside."""
    if isinstance(layer, nn.Linear):
        return False
    if layer.transposed:
        return True  # fewer taps reach the borders
    return layer.padding_mode == "zeros" and (
        layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    )


def fold_constants(
    model: nn.Module, args: tuple[Any, ...], fixed: Mapping[str, str], check: Callable[[str], None]
) -> dict[str, str]:
    """Move what each layer makes of constant inputs into its bias, and set the weights that read them to 0.

    In place; the outputs in eval mode stay. A constant other than 0 stays too where it meets zero padding, a
    grouped convolution or a ``fixed`` layer.

    Args:
        model: in eval mode.
        args: an example of its arguments; of tensors only the shapes matter.
        fixed: {layer name: why its weight must not change}.
        check: called with the layer's name after each change.

    Returns:
        {layer name: which constants it goes on reading, and why}.
    """
    stayed: dict[str, str] = {}
    modules = dict(model.named_modules())
    try:
        found = inputs_of_layers(model, args)
    except Branches as error:
        return {type(model).__name__: f"constants stay: {error}"}
    except Exception as error:
        told = f"{type(error).__name__}: {error}".partition("\n")[0]
        return {type(model).__name__: f"constants stay: its forward pass fails on NaN or Inf with {told}"}
    for name, constants in found.items():
        layer = modules[name]
        if not isinstance(layer, WEIGHTED) or getattr(layer, "groups", 1) > 1:
            continue
        weights = columns(layer)
        known = ~constants.isnan() & (weights != 0).flatten(1).any(1)
        fold = known & (constants == 0) if _pads_with_zeros(layer) else known
        if name in fixed:
            fold = torch.zeros_like(known)
        if count := int((known & ~fold).sum()):
            reason = fixed.get(name, "what it makes of them differs at the borders (zero padding)")
            stayed[name] = f"constant inputs that stay: {count}; {reason}"
        if fold.any():
            with torch.no_grad():
                shift = constants[fold] @ weights[fold].reshape(int(fold.sum()), weights.shape[1], -1).sum(
                    2
                )  # [out]
                weights[fold] = 0
                if layer.bias is not None:
                    layer.bias += shift
                elif shift.any():
                    layer.bias = nn.Parameter(shift)
            check(name)
    return stayed
