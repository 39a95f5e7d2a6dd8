"""Layers that pick the inputs that they read, for inputs of which other layers need all.

compact() makes them where an unread input channel cannot be removed; saving.py writes and restores them.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor, nn

from .layers import PLAIN_FORWARDS, WEIGHTED, Weighted, channel_dim, columns, sizes

GATHER_PAYS = 64  # picking was measured to be faster if it saves more multiply-adds per element copied


class Picking(Protocol):
    """The attributes that select_inputs adds to a layer."""

    read_inputs: Tensor  # indices of the channels that the layer reads
    given_inputs: int  # the number of channels of its input
    inputs_dim: int  # the dim of its input that holds the channels


def picking(layer: nn.Module) -> Picking:
    """`layer` itself, for type checkers, which take every attribute of a module for a tensor or a module."""
    return cast(Picking, layer)


def pick(self, input: tuple[Tensor]) -> Tensor:
    """The hook of a layer that picks its inputs, in the form that torch.jit.script takes."""
    return input[0].index_select(self.inputs_dim, self.read_inputs)


def select_inputs(layer: Weighted, read: Tensor, of: int) -> None:
    """Make `layer` read the input channels `read` (indices) of the `of` channels of its input."""
    layer.register_buffer("read_inputs", read)
    added = picking(layer)
    added.given_inputs, added.inputs_dim = of, channel_dim(layer)
    layer.register_forward_pre_hook(pick)


def set_columns(layer: Weighted, weights: Tensor) -> None:
    """Give `layer` the weight of which `weights` are the columns, and set its sizes."""
    dim = 0 if getattr(layer, "transposed", False) else 1
    layer.weight.data = laid_out_like(layer.weight, weights.movedim(0, dim))
    for name, size in sizes(layer).items():
        setattr(layer, name, size)


def laid_out_like(x: Tensor, cut: Tensor) -> Tensor:
    """`cut` in the memory order of `x`: channels last, or contiguous."""
    for format in (torch.channels_last, torch.channels_last_3d):
        if x.dim() == (4 if format == torch.channels_last else 5) and not x.is_contiguous():
            if x.is_contiguous(memory_format=format):
                return cut.contiguous(memory_format=format)
    return cut.contiguous()


def pick_inputs(model: nn.Module, among: set[str]) -> list[str]:
    """Cut, in place, the columns of weights that are zero for an input channel which could not be removed.

    The layer then picks the channels that it reads (`layer.read_inputs`, a buffer of indices) before it
    computes. This is done for the layers in `among` where it saves more than the copy costs.

    Returns:
        The names of these layers.
    """
    picked = []
    for name, layer in model.named_modules():
        if not isinstance(layer, WEIGHTED) or type(layer).forward not in PLAIN_FORWARDS:
            continue
        if getattr(layer, "groups", 1) > 1 or name not in among:
            continue
        weights = columns(layer)
        alive = (weights != 0).flatten(1).any(1)
        read = alive.nonzero().flatten()
        saved = (len(alive) - len(read)) * weights[0].numel()
        if len(read) and saved > GATHER_PAYS * len(read):
            set_columns(layer, weights[read])
            select_inputs(layer, read, len(alive))
            picked.append(name)
    return picked


def restore_inputs(model: nn.Module) -> None:
    """Undo select_inputs everywhere, in place; inputs that were not read get zero weights."""
    for layer in model.modules():
        if isinstance(layer, WEIGHTED) and hasattr(layer, "read_inputs"):
            weights, added = columns(layer), picking(layer)
            whole = weights.new_zeros(added.given_inputs, *weights.shape[1:])
            whole[added.read_inputs] = weights
            set_columns(layer, whole)
            for key in [key for key, hook in layer._forward_pre_hooks.items() if hook is pick]:
                del layer._forward_pre_hooks[key]
            del added.read_inputs, added.given_inputs, added.inputs_dim
