"""What is measured: lists of tensor shapes, under the names that the tables use."""

from __future__ import annotations

from typing import NamedTuple

import torch

Shapes = list[tuple[int, ...]]


class Case(NamedTuple):
    """Tensors stepped as one optimizer; ``percent`` of a copy's speed is the target, if there is one."""

    name: str
    group_by: str
    shapes: Shapes
    percent: float | None = None


def gpu_cases() -> list[Case]:
    """Weights of 64 MB and more at fp32: each way in which groups lie, short groups and long ones."""

    def one(group_by: str, rows: int, columns: int, percent: float | None = None) -> Case:
        return Case(f"{group_by} {rows}x{columns}", group_by, matrix(rows, columns), percent)

    return [
        one("filter", 4096, 4096, 90),
        one("filter", 16384, 1024, 90),
        one("feature", 256, 65536, 85),
        one("feature", 512, 32768, 85),
        one("feature", 1024, 16384, 70),
        one("feature", 4096, 4096, 55),
        one("feature", 8192, 4096, 55),
        one("feature", 50257, 1024, 55),  # an embedding, or the head over a vocabulary
        Case("channel 8 of 512x512x3x3", "channel", [(512, 512, 3, 3)] * 8),
        one("tensor", 4096, 4096),
    ]


def models() -> list[Case]:
    return [
        Case("ResNet-50 feature", "feature", resnet50()),
        Case("transformer of 1.02e9 feature", "feature", transformer()),
    ]


def resnet50() -> Shapes:
    """The 161 parameters of ResNet-50 (He et al. 2016; 1,000 classes), in registration order."""

    def batch_norm(channels: int) -> Shapes:
        return [(channels,), (channels,)]

    shapes: Shapes = [(64, 3, 7, 7), *batch_norm(64)]
    channels = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, channels, 1, 1), *batch_norm(width)]
            shapes += [(width, width, 3, 3), *batch_norm(width)]
            shapes += [(4 * width, width, 1, 1), *batch_norm(4 * width)]
            if block == 0:
                shapes += [(4 * width, channels, 1, 1), *batch_norm(4 * width)]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def transformer(width: int = 1792, layers: int = 24, vocabulary: int = 50257, context: int = 2048) -> Shapes:
    """A decoder like GPT-2 (Radford et al. 2019), its head tied: 1,019,137,280 parameters in 292 tensors."""
    norm: Shapes = [(width,), (width,)]
    block: Shapes = [
        *norm,
        *[(3 * width, width), (3 * width,), (width, width), (width,)],  # attention
        *norm,
        *[(4 * width, width), (4 * width,), (width, 4 * width), (width,)],  # feed-forward
    ]
    return [(vocabulary, width), (context, width), *(block * layers), *norm]


def matrix(rows: int, columns: int) -> Shapes:
    return [(rows, columns)]


def small(count: int, elements: int) -> Shapes:
    """``count`` square matrices of ``elements`` elements."""
    side = int(elements**0.5)
    return [(side, elements // side)] * count


def elements(shapes: Shapes) -> int:
    total = 0
    for shape in shapes:
        n = 1
        for size in shape:
            n *= size
        total += n
    return total


def bytes_moved(shapes: Shapes, dtype: torch.dtype, momentum: bool = True) -> int:
    """What a step must move: w and gradient in, w out; with momentum the buffer in and out as well."""
    return (5 if momentum else 3) * dtype.itemsize * elements(shapes)
