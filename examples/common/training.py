"""The training loop, and one repetition: its images, its network, its recipe, and its measurements."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from cges_kernels import (
    CoefficientWarmup,
    ProxAdamW,
    ProxSGD,
    compact,
    sparsity_param_groups,
    sparsity_report,
)
from cges_kernels.reporting.files import replacing

from .data import Dataset
from .methods import Arm
from .networks import NORMED, build, scaled

TUNED_AT = 0.9  # the momentum at which the ranges of lambda were found


@dataclass(frozen=True)
class Settings:
    """The settings that all runs of a command share."""

    data: str = "digits"
    net: str = "lenet"
    epochs: int = 40
    batch: int = 32
    optimizer: str = "sgd"
    lr: float = 0.05
    momentum: float = 0.9
    lr_decay: int = 0  # steps after which lr is multiplied by 0.9; 0: lr falls to zero as a cosine
    warmup: float = 0.3  # part of the steps in which the penalty grows; without it strong ones learn nothing
    pretrain_epochs: int = 0  # epochs with weight decay alone, before the fine-tuning with a penalty
    pretrain_lr: float = 0.1
    pretrained: Path = Path()  # folder of the networks that fine-tuning starts from
    strength: float = 1.0  # a factor on every lambda
    device: str = "cpu"

    def coefficient(self, arm: Arm, lam: float) -> float:
        """What has at this momentum the effect that ``lam`` has at TUNED_AT (see ProxSGD's docstring)."""
        same = arm.in_gradient or self.optimizer != "sgd"
        return lam * self.strength * (1 if same else (1 - TUNED_AT) / (1 - self.momentum))


SETTINGS = {
    # At this strength the ranges of lambda go from nearly dense to where accuracy suffers. At twice the
    # strength most runs are no better than chance.
    "digits": Settings(strength=1.3),
    # The thesis's 30,000 steps; it names neither momentum nor a warm-up.
    "mnist": Settings(net="mnist", epochs=50, batch=100, momentum=0, lr_decay=5000, warmup=0),
    "cifar10": Settings(net="wrn-16-10", epochs=50, batch=128, lr=0.01, pretrain_epochs=200),
    "cifar100": Settings(net="wrn-16-10", epochs=50, batch=128, lr=0.01, pretrain_epochs=200),
    "folder": Settings(epochs=60, batch=64),
}


def fit(
    model: nn.Module,
    optimizer: Optimizer,
    schedulers: Sequence[Any],
    batches: Iterable[tuple[Tensor, Tensor]],
    penalty: Callable[[], Tensor] | None = None,
    after_step: Callable[[int], None] | None = None,
) -> None:
    """The training loop: a step per batch of inputs and classes, after which every scheduler steps.

    ``penalty`` is added to the loss; ``after_step`` is called with 1, 2, ... steps.
    """
    for step, (x, y) in enumerate(batches, 1):
        model.train()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x).flatten(0, -2), y.flatten())
        (loss if penalty is None else loss + penalty()).backward()
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        if after_step is not None:
            after_step(step)


@torch.no_grad()
def percent_correct(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """The percentage of images whose class the model predicts, in eval mode."""
    model.eval()
    correct = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000)))
    return 100 * correct / len(y)


class Repetition:
    """The images and the recipe of repetition ``seed``."""

    def __init__(self, dataset: Dataset, settings: Settings, seed: int) -> None:
        self.settings, self.seed, self.classes = settings, seed, dataset.classes
        train, test = dataset.split(seed)
        self.x, self.y, self.test_x, self.test_y = (
            torch.from_numpy(part).to(settings.device)
            for part in (dataset.x[train], dataset.y[train], dataset.x[test], dataset.y[test])
        )
        self.steps = -(-len(self.x) // settings.batch)  # per epoch

    def network(self, norm: bool = False) -> nn.Module:
        """A fresh network, or the pretrained one if the settings ask for it; the same at each call."""
        torch.manual_seed(self.seed)
        name = NORMED[self.settings.net] if norm else self.settings.net
        model = build(name, self.x[0], self.classes)
        if self.settings.pretrain_epochs:
            model.load_state_dict(torch.load(self._pretrained, weights_only=True))
        return model

    @property
    def _pretrained(self) -> Path:
        of = self.settings
        return of.pretrained / f"l2-{of.data}-{of.net}-{of.pretrain_epochs}-{self.seed}.pt"

    def pretrain(self) -> None:
        """Train with weight decay 5e-4 and save the network, unless an earlier command has saved it."""
        if self._pretrained.exists():
            return
        torch.manual_seed(self.seed)
        model = build(self.settings.net, self.x[0], self.classes)
        groups = sparsity_param_groups(model, weight_decay=5e-4)
        optimizer = ProxSGD(groups, lr=self.settings.pretrain_lr, momentum=0.9)
        self.fit(model, optimizer, epochs=self.settings.pretrain_epochs, warmup=0)
        with replacing(self._pretrained) as path:
            torch.save(model.state_dict(), path)

    def optimizer(self, model: nn.Module, arm: Arm, lam: float, **options: Any) -> Optimizer:
        groups = arm.param_groups(model, self.settings.coefficient(arm, lam))
        if self.settings.optimizer == "adamw":
            return ProxAdamW(groups, lr=self.settings.lr, weight_decay=0.0, **options)
        return ProxSGD(groups, lr=self.settings.lr, momentum=self.settings.momentum, **options)

    def train(self, arm: Arm, lam: float, **options: Any) -> nn.Module:
        """A network of the arm's kind, trained under its penalty; the options are the optimizer's."""
        model = self.network(arm.norm)
        self.fit(model, self.optimizer(model, arm, lam, **options))
        return model

    def fit(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        epochs: int | None = None,
        warmup: float | None = None,
        coefficients: Optimizer | None = None,
        after_epoch: Callable[[int], None] | None = None,
        penalty: Callable[[], Tensor] | None = None,
    ) -> None:
        """Train ``model``; ``coefficients`` holds the penalty that warms up, if not the optimizer itself."""
        epochs = self.settings.epochs if epochs is None else epochs
        warmup = self.settings.warmup if warmup is None else warmup
        schedulers = [
            self._lr_schedule(optimizer, epochs * self.steps),
            CoefficientWarmup(coefficients or optimizer, round(warmup * epochs * self.steps)),
        ]

        def after_step(step: int) -> None:
            if after_epoch is not None and step % self.steps == 0:
                after_epoch(step // self.steps)

        fit(model, optimizer, schedulers, self._batches(epochs), penalty, after_step)

    def _batches(self, epochs: int) -> Iterator[tuple[Tensor, Tensor]]:
        shuffle = torch.Generator().manual_seed(self.seed)
        for _ in range(epochs):
            order = torch.randperm(len(self.x), generator=shuffle).to(self.x.device)
            for rows in order.split(self.settings.batch):
                yield self.x[rows], self.y[rows]

    def _lr_schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        for group in optimizer.param_groups:  # an earlier training may have left its last lr
            group["lr"] = group.setdefault("initial_lr", group["lr"])
        if self.settings.lr_decay:
            return StepLR(optimizer, self.settings.lr_decay, 0.9)
        return CosineAnnealingLR(optimizer, steps)

    def accuracy(self, model: nn.Module) -> float:
        return percent_correct(model, self.test_x, self.test_y)

    def measure(self, model: nn.Module, slimming: bool = False) -> dict[str, float]:
        """Accuracy in percent, and the network's costs in percent of the dense network's.

        Compacted weights and FLOPs are those of the smaller dense network that compact() makes. Slimming
        removes channels, so all its costs are those of the compacted network.
        """
        total = sparsity_report(model, self.x[:1]).total
        small = compact(without_scaled(model) if slimming else model, self.x[:1])
        left = sparsity_report(small.model, self.x[:1]).total
        counted = left if slimming else total
        assert total.flops and counted.flops_nonzero is not None
        return {
            "accuracy": self.accuracy(model),
            "nonzero": 100 * counted.nonzero / total.weights,
            "flops_nonzero": 100 * counted.flops_nonzero / total.flops,
            "weights_compacted": 100 * left.weights / total.weights,
            "flops_compacted": 100 * small.flops[1] / small.flops[0],
        }


@torch.no_grad()
def without_scaled(model: nn.Module) -> nn.Module:
    """A copy, the same in eval mode, whose filters are zero where their batch norm multiplies by zero."""
    model = copy.deepcopy(model)
    for conv, norm in scaled(model):
        conv.weight[norm.weight == 0] = 0
    return model
