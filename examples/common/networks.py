"""The networks that --net can name."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional as F


class LeNet(nn.Module):
    """Two convolutions without padding and two fully connected layers; images above 16x16 are pooled.

    With ``norm`` a batch norm follows each convolution.
    """

    def __init__(self, size: int, channels: int = 1, classes: int = 10, norm: bool = False) -> None:
        super().__init__()
        self.pool = 2 if size > 16 else 1
        side = ((size - 4) // self.pool - 2) // self.pool
        self.conv1 = nn.Conv2d(channels, 20, 5)
        self.conv2 = nn.Conv2d(20, 40, 3)
        self.norm1, self.norm2 = (nn.BatchNorm2d(n) if norm else nn.Identity() for n in (20, 40))
        self.fc1 = nn.Linear(40 * side * side, 100)
        self.fc2 = nn.Linear(100, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in ((self.conv1, self.norm1), (self.conv2, self.norm2)):
            x = F.relu(norm(conv(x)))
            x = F.max_pool2d(x, self.pool) if self.pool > 1 else x
        return self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))


class MnistNet(nn.Module):
    """The thesis's network for MNIST: two convolutions of 5x5, each pooled, and 1,024 hidden units."""

    def __init__(self, size: int, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32, 5, padding=2)
        self.conv2 = nn.Conv2d(32, 64, 5, padding=2)
        self.fc1 = nn.Linear(64 * (size // 4) ** 2, 1024)
        self.fc2 = nn.Linear(1024, classes)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        for conv in (self.conv1, self.conv2):
            x = F.max_pool2d(F.relu(conv(x)), 2)
        return self.fc2(self.dropout(F.relu(self.fc1(x.flatten(1)))))


class Block(nn.Module):
    """A residual block: two 3x3 convolutions, each after a batch norm, whose result is added to the input."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(channels), nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if channels != width else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        x = x if self.shortcut is None else self.shortcut(y)
        return x + self.conv2(F.relu(self.norm2(self.conv1(y))))


class WideResNet(nn.Module):
    """The wide residual network of Zagoruyko and Komodakis 2016; the defaults give WRN-16-10."""

    def __init__(self, channels: int, classes: int, blocks: int = 2, widen: int = 10) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16, 3, padding=1, bias=False)
        widths = [16, *(width * widen for width in (16, 32, 64))]
        self.blocks = nn.Sequential(
            *(
                Block(widths[i] if j == 0 else widths[i + 1], widths[i + 1], 2 if i and not j else 1)
                for i in range(3)
                for j in range(blocks)
            )
        )
        self.norm = nn.BatchNorm2d(widths[-1])
        self.fc = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.blocks(self.conv(x)))).mean((2, 3)))


NETS: dict[str, Callable[[int, int, int], nn.Module]] = {  # called with size, channels, classes
    "lenet": LeNet,
    "lenet_bn": lambda size, channels, classes: LeNet(size, channels, classes, norm=True),
    "mnist": MnistNet,
    "wrn-16-10": lambda size, channels, classes: WideResNet(channels, classes),
}
# {network: its variant with batch norm}
NORMED = {"lenet": "lenet_bn", "lenet_bn": "lenet_bn", "wrn-16-10": "wrn-16-10"}


def scaled(model: nn.Module) -> list[tuple[nn.Conv2d, nn.BatchNorm2d]]:
    """The convolutions whose outputs go to a batch norm and nowhere else, each with that norm."""
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    pairs: list[tuple[nn.Conv2d, nn.Module]] = [(block.conv1, block.norm2) for block in blocks]
    if isinstance(model, LeNet):
        pairs = [(model.conv1, model.norm1), (model.conv2, model.norm2)]
    return [(conv, norm) for conv, norm in pairs if isinstance(norm, nn.BatchNorm2d)]


def build(name: str, image: Tensor, classes: int) -> nn.Module:
    """The network for images like ``image`` [channels, size, size], with weights drawn by torch."""
    return NETS[name](image.shape[-1], image.shape[0], classes).to(image.device)
