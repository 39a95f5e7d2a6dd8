"""The workloads of the benchmarks: lists of tensor shapes, under the names that the tables use."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch

Shapes = list[tuple[int, ...]]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
Percents = tuple[
    float | None, float | None
]  # targets in percent of a copy's speed, for fp32 and 16-bit weights


class Case(NamedTuple):
    """Tensors stepped as one optimizer, and the targets of the backends that have any."""

    name: str
    group_by: str
    shapes: Shapes
    percent: Mapping[str, Percents] = {}
    slow: bool = False  # eager, foreach and compiled optimizers are measured on it too

    def target(self, backend: str, dtype: torch.dtype) -> float | None:
        """The most that a step may take, as a multiple of the time that a copy of the same bytes takes."""
        percent = self.percent.get(backend, (None, None))[dtype.itemsize == 2]
        return None if percent is None else 100 / percent


def gpu_cases() -> list[Case]:
    """Weights of 64 MB and more in fp32: each group spec, with short groups and long ones."""

    def one(group_by: str, rows: int, columns: int, **percent: Percents) -> Case:
        return Case(f"{group_by} {rows}x{columns}", group_by, matrix(rows, columns), percent)

    return [
        one("filter", 4096, 4096, triton=(90, 90), cuda=(88, 88)),
        one("filter", 16384, 1024, triton=(90, 90), cuda=(91, 91)),
        one("feature", 256, 65536, triton=(85, 85), cuda=(88, 80)),
        one("feature", 512, 32768, triton=(85, 85), cuda=(88, 72)),
        one("feature", 1024, 16384, triton=(70, 70), cuda=(83, None)),
        one("feature", 4096, 4096, triton=(55, 55), cuda=(78, 56)),
        one("feature", 8192, 4096, triton=(55, 55), cuda=(78, 56)),
        one("feature", 50257, 1024, triton=(55, 55), cuda=(70, 45)),  # an embedding, or a vocabulary's head
        Case("channel 8 of 512x512x3x3", "channel", [(512, 512, 3, 3)] * 8, {"cuda": (75, 60)}),
        one("tensor", 4096, 4096, cuda=(60, None)),
    ]


def models() -> list[Case]:
    """Four networks of the CGES paper and thesis, then larger ones; shapes alone, no trained weights."""
    return [
        Case("MNIST net feature", "feature", mnist_net()),
        Case("LeNet feature", "feature", lenet()),
        Case("ResNet-50 feature", "feature", resnet50(), slow=True),
        Case("WRN-16-10 feature", "feature", wide_resnet()),
        Case("AlexNet feature", "feature", alexnet()),
        Case("ViT-L/16 feature", "feature", vision_transformer()),
        Case("transformer of 1.02e9 feature", "feature", transformer(), slow=True),
    ]


def with_biases(weights: Shapes) -> Shapes:
    return [shape for weight in weights for shape in (weight, weight[:1])]


def mnist_net() -> Shapes:
    """The thesis's net for MNIST: 3,274,634 parameters."""
    return with_biases([(32, 1, 5, 5), (64, 32, 5, 5), (1024, 3136), (10, 1024)])


def lenet() -> Shapes:
    """LeNet-5 (LeCun et al. 1998) on the three colours of CIFAR-10: 62,006 parameters."""
    return with_biases([(6, 3, 5, 5), (16, 6, 5, 5), (120, 400), (84, 120), (10, 84)])


def batch_norm(channels: int) -> Shapes:
    return [(channels,), (channels,)]


def resnet50() -> Shapes:
    """The 161 parameters of ResNet-50 (He et al. 2016; 1,000 classes), in registration order."""
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


def wide_resnet(blocks: int = 2, widen: int = 10) -> Shapes:
    """WRN-16-10 (Zagoruyko and Komodakis 2016; CIFAR-10), pre-activation blocks: 17,116,634 parameters."""
    shapes: Shapes = [(16, 3, 3, 3)]
    channels = 16
    for width in (16 * widen, 32 * widen, 64 * widen):
        for _ in range(blocks):
            shapes += [*batch_norm(channels), (width, channels, 3, 3)]
            shapes += [*batch_norm(width), (width, width, 3, 3)]
            if channels != width:
                shapes += [(width, channels, 1, 1)]
            channels = width
    return [*shapes, *batch_norm(channels), (10, channels), (10,)]


def alexnet() -> Shapes:
    """AlexNet as torchvision has it (Krizhevsky 2014; 1,000 classes): 61,100,840 parameters."""
    weights: Shapes = [
        *[(64, 3, 11, 11), (192, 64, 5, 5), (384, 192, 3, 3), (256, 384, 3, 3), (256, 256, 3, 3)],
        *[(4096, 256 * 6 * 6), (4096, 4096), (1000, 4096)],
    ]
    return with_biases(weights)


def layers(width: int, count: int) -> Shapes:
    """``count`` layers of a transformer, each attention and then a feed-forward net, both after a norm."""
    attention = [(3 * width, width), (3 * width,), (width, width), (width,)]
    feed_forward = [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    return [(width,), (width,), *attention, (width,), (width,), *feed_forward] * count


def transformer(width: int = 1792, depth: int = 24, vocabulary: int = 50257, context: int = 2048) -> Shapes:
    """A decoder like GPT-2 (Radford et al. 2019), its head tied: 1,019,137,280 parameters in 292 tensors."""
    return [(vocabulary, width), (context, width), *layers(width, depth), (width,), (width,)]


def vision_transformer(width: int = 1024, depth: int = 24, patch: int = 16, side: int = 14) -> Shapes:
    """ViT-L/16 (Dosovitskiy et al. 2021; images of 224x224, 1,000 classes): 304,326,632 parameters."""
    positions = side**2 + 1  # one for each patch, and one for the class token
    embedding: Shapes = [(1, 1, width), (width, 3, patch, patch), (width,), (1, positions, width)]
    return [*embedding, *layers(width, depth), (width,), (width,), (1000, width), (1000,)]


def matrix(rows: int, columns: int) -> Shapes:
    return [(rows, columns)]


def small(count: int, elements: int) -> Shapes:
    """``count`` square matrices of ``elements`` elements."""
    side = int(elements**0.5)
    return [(side, elements // side)] * count


def of_group(group_by: str, rows: int, columns: int) -> Shapes:
    """A weight of about rows x columns elements.

    For "channel" it has 3x3 kernels, because on a matrix the groups would be those of "feature".
    """
    return [(rows, max(columns // 9, 1), 3, 3)] if group_by == "channel" else matrix(rows, columns)


def elements(shapes: Shapes) -> int:
    return sum(math.prod(shape) for shape in shapes)


def bytes_moved(shapes: Shapes, dtype: torch.dtype, states: int = 1) -> int:
    """The bytes that a step must move: w and gradient in, w out, states in and out (SGD has 1, AdamW 2)."""
    return (3 + 2 * states) * dtype.itemsize * elements(shapes)


def held_bytes(shapes: Shapes, dtype: torch.dtype) -> int:
    """The size of weights, gradients and momentum buffers."""
    return 3 * dtype.itemsize * elements(shapes)
