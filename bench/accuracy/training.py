"""One repetition: its images, its network, how it trains, and what is measured of what comes out."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, StepLR

from cges_kernels import CoefficientWarmup, ProxSGD, compact, penalty, sparsity_param_groups, sparsity_report
from cges_kernels.demo.training import fit, percent_correct
from cges_kernels.reporting.files import replacing

from .arms import Arm
from .data import Dataset
from .networks import NORMED, build, scaled

PENALTY = ("group_lasso", "exclusive_lasso", "l1", "group_by", "view")  # keys that penalty() takes
TUNED_AT = 0.9  # the momentum at which the ranges of lambda were found


@dataclass(frozen=True)
class Settings:
    """What all runs of a command share."""

    data: str = "digits"
    net: str = "lenet"
    epochs: int = 40
    batch: int = 32
    lr: float = 0.05
    momentum: float = 0.9
    lr_decay: int = 0  # times 0.9 every so many steps; 0: a cosine to zero
    warmup: float = 0.3  # of the steps, in which the penalty grows to its full strength
    pretrain_epochs: int = 0  # with weight decay alone, before the rest fine-tunes
    pretrain_lr: float = 0.1
    strength: float = 1.0  # times every lambda
    device: str = "cpu"

    def coefficient(self, lam: float) -> float:
        """What has at this momentum the effect that ``lam`` has at TUNED_AT (the optimizer's docstring)."""
        return lam * self.strength * (1 - TUNED_AT) / (1 - self.momentum)


class Repetition:
    """The images and the recipe of repetition ``seed``."""

    def __init__(self, dataset: Dataset, settings: Settings, folder: Path, seed: int) -> None:
        self.settings, self.folder, self.seed, self.classes = settings, folder, seed, dataset.classes
        train, test = dataset.split(seed)
        x, y = torch.from_numpy(dataset.x), torch.from_numpy(dataset.y)
        self.x, self.y, self.test_x, self.test_y = (
            part.to(settings.device) for part in (x[train], y[train], x[test], y[test])
        )
        self.steps = -(-len(self.x) // settings.batch)  # per epoch

    def network(self, norm: bool = False) -> nn.Module:
        """A fresh network, or the one trained with l2 if fine-tuning starts there; the same each time."""
        torch.manual_seed(self.seed)
        name = NORMED[self.settings.net] if norm else self.settings.net
        model = build(name, self.x[0], self.classes)
        if self.settings.pretrain_epochs:
            model.load_state_dict(torch.load(self._pretrained, weights_only=True))
        return model

    @property
    def _pretrained(self) -> Path:
        of = self.settings
        return self.folder / f"l2-{of.data}-{of.net}-{of.pretrain_epochs}-{self.seed}.pt"

    def pretrain(self) -> None:
        """Train with weight decay 5e-4 and keep the network, unless an earlier command has."""
        if self._pretrained.exists():
            return
        torch.manual_seed(self.seed)
        model = build(self.settings.net, self.x[0], self.classes)
        groups = sparsity_param_groups(model, weight_decay=5e-4)
        optimizer = ProxSGD(groups, lr=self.settings.pretrain_lr, momentum=0.9)
        self.fit(model, optimizer, epochs=self.settings.pretrain_epochs, warmup=0)
        with replacing(self._pretrained) as path:
            torch.save(model.state_dict(), path)

    def optimizer(self, model: nn.Module, arm: Arm, lam: float, **options: Any) -> ProxSGD:
        groups = arm.param_groups(model, self.settings.coefficient(lam))
        return ProxSGD(groups, lr=self.settings.lr, momentum=self.settings.momentum, **options)

    def fit(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        epochs: int | None = None,
        warmup: float | None = None,
        coefficients: ProxSGD | None = None,
        **options: Any,
    ) -> None:
        """Train ``model``; ``coefficients`` holds the penalty that warms up, if not the optimizer itself."""
        epochs = self.settings.epochs if epochs is None else epochs
        share = self.settings.warmup if warmup is None else warmup
        schedulers = [
            self._lr_schedule(optimizer, epochs * self.steps),
            CoefficientWarmup(coefficients or optimizer, round(share * epochs * self.steps)),
        ]
        fit(model, optimizer, schedulers, self.x, self.y, epochs, self.settings.batch, self.seed, **options)

    def _lr_schedule(self, optimizer: torch.optim.Optimizer, steps: int) -> LRScheduler:
        for group in optimizer.param_groups:  # where an earlier training ended, begin anew
            group["lr"] = group.setdefault("initial_lr", group["lr"])
        if self.settings.lr_decay:
            return StepLR(optimizer, self.settings.lr_decay, 0.9)
        return CosineAnnealingLR(optimizer, steps)

    def fit_subgradient(self, model: nn.Module, arm: Arm, lam: float) -> None:
        """Train with the penalty added to the loss, as is done without a prox: the same objective.

        The prox's is loss + (1 - momentum) * Omega, see ProxSGD.
        """
        coefficients = self.optimizer(model, arm, lam)
        sgd = torch.optim.SGD(model.parameters(), lr=self.settings.lr, momentum=self.settings.momentum)
        self.fit(model, sgd, coefficients=coefficients, penalty=functools.partial(self._omega, coefficients))

    def _omega(self, optimizer: ProxSGD) -> Tensor:
        terms = [
            penalty(p, **{key: group[key] for key in PENALTY})
            for group in optimizer.param_groups
            if any(group[key] for key in PENALTY[:3])
            for p in group["params"]
        ]
        omega = torch.stack(terms).sum() if terms else torch.zeros((), device=self.x.device)
        return (1 - self.settings.momentum) * omega

    def accuracy(self, model: nn.Module) -> float:
        return percent_correct(model, self.test_x, self.test_y)

    def measure(self, model: nn.Module, slimming: bool = False) -> dict[str, float]:
        """Accuracy and what the network costs, all in percent, costs of the dense network's."""
        total = sparsity_report(model, self.x[:1]).total
        small = compact(without_scaled(model) if slimming else model, self.x[:1]).model
        left = sparsity_report(small, self.x[:1]).total
        counted = left if slimming else total
        return {
            "accuracy": self.accuracy(model),
            "nonzero": 100 * counted.nonzero / total.weights,
            "flops_nonzero": 100 * counted.flops_nonzero / total.flops,
            "weights_compacted": 100 * left.weights / total.weights,
            "flops_compacted": 100 * left.flops / total.flops,
        }


@torch.no_grad()
def without_scaled(model: nn.Module) -> nn.Module:
    """A copy, the same in eval mode, whose filters are zero where their batch norm multiplies by zero."""
    model = copy.deepcopy(model)
    for conv, norm in scaled(model):
        conv.weight[norm.weight == 0] = 0
    return model
