"""What is measured: lists of tensor shapes, under the names that the tables use."""

from __future__ import annotations

Shapes = list[tuple[int, ...]]


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
