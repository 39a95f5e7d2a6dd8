"""Folds: constants that go into the biases of the layers that read them.

A filter whose every weight is zero still outputs its bias, and a batch norm its shift: a constant that later
layers read. If such a constant reaches a layer, the layer's output for it goes into the layer's bias.
shrinking.py chooses which folds are made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .channels import Channels
from .layers import WEIGHTED, bias_of


@dataclass
class Fold:
    """A layer's constant inputs, and the bias to which the layer's output for them is added."""

    layer: str
    weight: str  # the name of the parameter that reads them
    dim: int  # the dim along which it reads
    inputs: Tensor  # which inputs are folded: [in], bool
    values: Tensor  # the constants: [in]
    bias: str  # the name of the bias

    @torch.no_grad()
    def apply(self, model: nn.Module) -> None:
        """Fold in place: the weight no longer reads the constants."""
        columns = model.get_parameter(self.weight).data.movedim(self.dim, 0)  # [in, out, *kernel]
        taps = columns[self.inputs]
        columns[self.inputs] = 0
        shift = self.values[self.inputs] @ (taps.flatten(2).sum(2) if taps.dim() > 2 else taps)  # [out]
        if not shift.any():
            return
        layer = model.get_submodule(self.layer)
        name = self.bias.rpartition(".")[2]
        if (bias := getattr(layer, name, None)) is None:
            setattr(layer, name, nn.Parameter(shift))
        else:
            bias.data += shift


def _pads_with_zeros(layer: nn.Module) -> bool:
    """Whether a constant channel may give another result at the borders than inside."""
    if not isinstance(layer, nn.modules.conv._ConvNd):
        return False
    if layer.transposed:
        return True  # fewer taps of a transposed convolution reach the borders
    return layer.padding_mode == "zeros" and (
        layer.padding == "same" or (layer.padding != "valid" and any(layer.padding))
    )


@torch.no_grad()
def find_folds(
    model: nn.Module, channels: Channels, constants: Mapping[str, Tensor], fixed: Mapping[str, str]
) -> tuple[list[Fold], dict[str, str]]:
    """Finds the constants that can go into biases so that the outputs in eval mode stay the same.

    A constant other than 0 stays where it meets zero padding or where there is no bias to take it.

    Args:
        model: the model in eval mode.
        channels: the channels of the model.
        constants: {parameter name: the constant that each of its inputs has, NaN if it is none: [in]}.
        fixed: {layer name: why its weight must not change}.

    Returns:
        The folds, and {layer name: which constants it goes on reading, and why}.
    """
    folds: list[Fold] = []
    stayed: dict[str, str] = {}
    params = dict(model.named_parameters(remove_duplicate=False))
    for name, known in constants.items():
        weight = channels.weights.get(name)
        if weight is None or name not in params or len(weight.reads) != 1:
            continue
        if weight.uses not in (1, channels.called.get(weight.layer)):  # not each use adds the bias
            continue
        (dim,) = weight.reads
        columns = params[name].detach().movedim(dim, 0)  # [in, out, *kernel]
        if len(columns) != len(known):
            continue
        read = ~known.isnan() & (columns != 0).flatten(1).any(1)
        layer = model.get_submodule(weight.layer)
        bias = bias_of(name)
        takes = bias != name and (isinstance(params.get(bias), nn.Parameter) or isinstance(layer, WEIGHTED))
        plain = not _pads_with_zeros(layer) and takes
        fold = read if plain else read & (known == 0)
        reason = "what it makes of them differs at the borders (zero padding)" if takes else "it has no bias"
        if weight.layer in fixed:
            fold, reason = torch.zeros_like(read), fixed[weight.layer]
        if count := int((read & ~fold).sum()):
            stayed[weight.layer] = f"{weight.label}constant inputs that stay: {count}; {reason}"
        if fold.any():
            folds.append(Fold(weight.layer, name, dim, fold, known, bias))
    return folds, stayed
