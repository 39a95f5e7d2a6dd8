"""Layers with a weight: Linear and convolutions, and how they are given channels."""

from __future__ import annotations

from typing import Any, TypeAlias

from torch import Tensor, nn

CONVOLUTION = nn.modules.conv._ConvNd
WEIGHTED = (nn.Linear, CONVOLUTION)
Weighted: TypeAlias = nn.Linear | CONVOLUTION  # one of them, for annotations
PLAIN_FORWARDS = {
    cls.forward
    for cls in (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
    )
}


def is_floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def channel_dim(layer: Weighted) -> int:
    """The dim of the input, counted from the end, along which a Linear or a convolution is given channels."""
    return -1 if isinstance(layer, nn.Linear) else -1 - len(layer.kernel_size)


def columns(layer: Weighted) -> Tensor:
    """The weight as [in / blocks, out, *kernel], a detached view: what each input channel is read with."""
    dim = 0 if getattr(layer, "transposed", False) else 1
    return layer.weight.detach().movedim(dim, 0)
