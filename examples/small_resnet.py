"""From dense to small: a ResNet-18 of torchvision loses channels in training, and is made smaller.

Group lasso with `group_by="channel"` makes one group of all weights by which a convolution reads one of its
input channels. A channel that no convolution reads any more can leave, together with the filter that made it.
After 60% of the training the penalty ends, what is zero is held at zero, and the rest trains on. `compact`
then makes the smaller network, which is checked, saved and loaded again.

    python examples/small_resnet.py
    python examples/small_resnet.py --data DIR --weights DEFAULT --group-lasso X

It begins with random weights and learns scikit-learn's digits, enlarged to 3x32x32. With --data it learns a
folder of images, which has a folder for each class. Other images and weights need another strength: double or
halve it until the table says what you want. Needs torchvision and scikit-learn. It takes about two
minutes on two CPU cores.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, Dataset, TensorDataset, random_split
from torchvision import datasets, models, transforms

from cges_kernels import (
    CoefficientWarmup,
    ProxSGD,
    compact,
    load_compacted,
    save_compacted,
    sparsity_param_groups,
    sparsity_report,
)

LR = 0.05
PENALISED = 0.6  # the part of the steps with a penalty


def digits() -> tuple[Dataset[Any], int]:
    """(images and labels, how many classes)"""
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels / 16 - 0.5, dtype=torch.float32).view(-1, 1, 8, 8)
    images = F.interpolate(images, size=32, mode="bilinear").expand(-1, 3, -1, -1)
    return TensorDataset(images, torch.tensor(labels)), 10


def folder(path: Path) -> tuple[Dataset[Any], int]:
    """(images and labels, how many classes) of a folder, normalised by ImageNet's mean and deviation."""
    steps = [
        *(transforms.Resize(256), transforms.CenterCrop(224), transforms.ToTensor()),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    images = datasets.ImageFolder(str(path), transforms.Compose(steps))
    return images, len(images.classes)


def train(model: nn.Module, loader: DataLoader[Any], group_lasso: float, epochs: int) -> None:
    # `scale="size"` multiplies the strength by the square root of a group's size.
    groups = sparsity_param_groups(model, group_lasso=group_lasso, group_by="channel", scale="size")
    optimizer = ProxSGD(groups, lr=LR, momentum=0.9)
    steps = epochs * len(loader)
    schedule = OneCycleLR(optimizer, LR, total_steps=steps + 1, pct_start=0.1, cycle_momentum=False)
    last = round(PENALISED * steps)  # the last step with a penalty
    warmup = CoefficientWarmup(optimizer, steps=last // 3)
    step = 0
    model.train()
    for epoch in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            # Weights before a batch norm have larger gradients the smaller they are: clipped, so that
            # what the penalty makes small does not jump back.
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            step += 1
            if step < last:
                warmup.step()
            elif step == last:
                for group in optimizer.param_groups:
                    group.update(group_lasso=0.0, freeze_zeros="group")
        print(f"epoch {epoch + 1} of {epochs}: loss {loss.item():.3f}", flush=True)


@torch.no_grad()
def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    right = [model(x).argmax(1) == y for x, y in loader]
    return float(torch.cat(right).float().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument(
        "--group-lasso", type=float, default=0.01, metavar="X", help="strength of the penalty"
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="a folder of images in place of the digits")
    parser.add_argument("--weights", metavar="NAME", help="begin with torchvision's, such as DEFAULT")
    parser.add_argument("--out", type=Path, default=Path("small_resnet.pt"), help="file of the small network")
    args = parser.parse_args()
    torch.manual_seed(0)
    data, classes = folder(args.data) if args.data else digits()
    parts = random_split(data, [0.8, 0.2])
    loader = DataLoader(parts[0], batch_size=64, shuffle=True, drop_last=True)
    tests = DataLoader(parts[1], batch_size=64)

    model = models.resnet18(weights=args.weights)
    model.fc = nn.Linear(model.fc.in_features, classes)
    train(model, loader, args.group_lasso, args.epochs)

    model.eval()
    example: Tensor = next(iter(tests))[0]
    print(sparsity_report(model, example, group_by="channel"))
    result = compact(model, example)  # leaves `model` as it is
    print(result)  # shapes, parameters, FLOPs and latency before and after, and what had to stay

    save_compacted(result.model, args.out)
    small = load_compacted(models.resnet18(num_classes=classes), args.out).eval()
    with torch.no_grad():
        for x, _ in tests:
            torch.testing.assert_close(small(x), model(x), rtol=1e-3, atol=1e-3)
    print(f"test accuracy: {accuracy(model, tests):.1%}, and {accuracy(small, tests):.1%} from {args.out}")


if __name__ == "__main__":
    main()
