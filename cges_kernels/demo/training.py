"""The network, the six methods of the thesis, and one training run."""

from __future__ import annotations

import copy
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..optimizer import ProxAdamW, ProxSGD
from ..reporting.report import sparsity_report
from ..training.recipes import CoefficientWarmup, cges_param_groups, sparsity_param_groups
from .data import Images, split

MOMENTUM = 0.9
WARMUP = 0.3  # of the steps; without it the strong coefficients end in chance


class LeNet(nn.Module):
    """Two convolutions and two fully connected layers, no padding; images above 16x16 are pooled.

    ``norm``: with batch norm behind the convolutions.
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


class Method(NamedTuple):
    """A way to be sparse: its name, the range of its lambdas, and the param groups it gives ProxSGD."""

    label: str
    weakest: float
    strongest: float
    param_groups: Callable[[nn.Module, float], list[dict[str, Any]]]

    def lambdas(self, count: int, times: float = 1.0) -> list[float]:
        """``count`` lambdas from the weakest to the strongest, each the same factor above the last."""
        return [float(f"{times * lam:.3g}") for lam in np.geomspace(self.weakest, self.strongest, count)]


def _by_size(penalty: str, **options: Any) -> Callable[[nn.Module, float], list[dict[str, Any]]]:
    """Param groups with lambda as the coefficient ``penalty``, scaled by group size."""
    return lambda model, lam: sparsity_param_groups(model, scale="size", **{**options, penalty: lam})


# The ranges go from nearly dense to where accuracy suffers, at momentum 0.9, where the penalty in force is
# a tenth of lambda. Scaling by size divides the exclusive penalty by the group size, so ES alone needs a
# lambda some fifty times the others' to zero as much. CGES has m = 0: mu rises from 0 in the first layer to
# 1 in the last.
METHODS = {
    "l2": Method("l2 (dense)", 1e-4, 1e-2, _by_size("weight_decay")),
    "l1": Method("l1", 0.003, 0.05, _by_size("l1")),
    "gs_filter": Method("GS filter", 0.006, 0.045, _by_size("group_lasso", group_by="filter")),
    "gs_feature": Method("GS feature", 0.006, 0.045, _by_size("group_lasso")),
    "es": Method("ES", 0.05, 2.0, _by_size("exclusive_lasso")),
    "cges": Method("CGES", 0.006, 0.045, lambda model, lam: cges_param_groups(model, lam, scale="size")),
}


class Training(NamedTuple):
    """An optimizer as the demo trains with it; its lambdas are METHODS' ``times`` so much.

    AdamW's are weighed against the signal in the gradients, SGD's against the gradients (docs/adamw.md).
    """

    lr: float
    times: float
    plain: Callable[..., torch.optim.Optimizer]  # torch's class, without a penalty
    proximal: Callable[..., torch.optim.Optimizer]
    options: dict[str, Any]  # of both


OPTIMIZERS = {
    "sgd": Training(0.05, 1.0, torch.optim.SGD, ProxSGD, {"momentum": MOMENTUM}),
    "adamw": Training(2e-3, 8.0, torch.optim.AdamW, ProxAdamW, {"weight_decay": 0.0}),
}


@dataclass(frozen=True)
class Settings:
    """What all runs share."""

    epochs: int = 120
    batch: int = 32
    optimizer: str = "sgd"
    device: str = "cpu"

    @property
    def training(self) -> Training:
        return OPTIMIZERS[self.optimizer]


class Job(NamedTuple):
    """One run: a method's key, its lambda, and the repetition, which also picks the fold."""

    method: str
    lam: float
    seed: int


@dataclass(frozen=True)
class Run:
    """What came of a job. Percentages throughout; a weight counts as zero only where it is exactly 0."""

    method: str
    lam: float
    seed: int
    accuracy: float
    nonzero: float  # of the weights
    flops_nonzero: float  # of the dense FLOPs, each layer times its fraction of nonzero weights
    flops_compacted: float  # of the dense FLOPs, without dead inputs, units and channels
    dead_groups: float  # of the "feature" groups: an input or a tap of a channel that no unit reads
    dead_units: float  # units and filters whose every weight is zero
    last_nonzero: float  # of the last layer's weights
    classes_per_feature: float  # classes that read a feature of the last layer, mean over those still read
    first: np.ndarray = field(repr=False, compare=False)  # weights of the first layer
    last: np.ndarray = field(repr=False, compare=False)  # weights of the last layer

    @property
    def job(self) -> Job:
        return Job(self.method, self.lam, self.seed)


MEASURES = (
    "accuracy",
    "nonzero",
    "flops_nonzero",
    "flops_compacted",
    "dead_groups",
    "dead_units",
    "last_nonzero",
    "classes_per_feature",
)


@torch.no_grad()
def compacted(model: LeNet) -> LeNet:
    """A copy that computes the same function and reads no more than it must.

    A dead unit always gives relu(bias), so what the next layer makes of it moves into that layer's bias and
    the weights that read it become zero (exact, as nothing is padded); then a unit that no weight reads
    loses its own weights, from the last layer down.
    """
    model = copy.deepcopy(model)
    layers: list[nn.Conv2d | nn.Linear] = [model.conv1, model.conv2, model.fc1, model.fc2]
    reads = [
        above.weight.view(above.weight.shape[0], below.weight.shape[0], -1)  # [out, unit below, taps]
        for below, above in itertools.pairwise(layers)
    ]
    for below, above, read in zip(layers, layers[1:], reads):
        assert below.bias is not None and above.bias is not None
        dead = (below.weight == 0).flatten(1).all(1)
        above.bias += read.sum(2) @ (F.relu(below.bias) * dead)
        read[:, dead] = 0
    for below, read in reversed(list(zip(layers, reads))):
        below.weight[(read == 0).all(2).all(0)] = 0
    return model


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedulers: Sequence[Any],
    x: Tensor,
    y: Tensor,
    epochs: int,
    batch: int,
    seed: int,
    penalty: Callable[[], Tensor] | None = None,
    after_epoch: Callable[[int], None] | None = None,
) -> None:
    """The training loop: every scheduler steps after every optimizer step, ``seed`` orders the images.

    ``penalty`` is added to the loss; ``after_epoch`` is called with 1, 2, ... epochs.
    """
    shuffle = torch.Generator().manual_seed(seed)
    for epoch in range(1, epochs + 1):
        model.train()
        for rows in torch.randperm(len(x), generator=shuffle).to(x.device).split(batch):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(x[rows]), y[rows])
            (loss if penalty is None else loss + penalty()).backward()
            optimizer.step()
            for scheduler in schedulers:
                scheduler.step()
        if after_epoch is not None:
            after_epoch(epoch)


@torch.no_grad()
def percent_correct(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Of the images, in eval mode."""
    model.eval()
    correct = sum(int((model(a).argmax(1) == b).sum()) for a, b in zip(x.split(1000), y.split(1000)))
    return 100 * correct / len(y)


def train(job: Job, images: Images, settings: Settings) -> Run:
    """Train on one fold, test on the rest, and count the zeros."""
    torch.manual_seed(job.seed)
    device = torch.device(settings.device)
    x, y = (torch.from_numpy(array).to(device) for array in images)
    train_rows, test_rows = (torch.from_numpy(rows).to(device) for rows in split(images.y, job.seed))
    model = LeNet(images.size).to(device)
    groups = METHODS[job.method].param_groups(model, job.lam)
    training = settings.training
    optimizer = training.proximal(groups, lr=training.lr, **training.options)
    steps = settings.epochs * -(-len(train_rows) // settings.batch)
    schedulers = [
        torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps),
        CoefficientWarmup(optimizer, round(WARMUP * steps)),
    ]
    fit(model, optimizer, schedulers, x[train_rows], y[train_rows], settings.epochs, settings.batch, job.seed)
    return _evaluate(job, model, x[test_rows], y[test_rows])


@torch.no_grad()
def _evaluate(job: Job, model: LeNet, x: Tensor, y: Tensor) -> Run:
    accuracy = percent_correct(model, x, y)
    total = sparsity_report(model, x[:1]).total
    compact = sparsity_report(compacted(model), x[:1]).total
    assert total.flops is not None and total.flops_nonzero is not None
    assert compact.flops_compacted is not None
    first, last = model.conv1.weight, model.fc2.weight
    classes = (last != 0).sum(0)
    return Run(
        *job,
        accuracy=accuracy,
        nonzero=total.percent_nonzero,
        flops_nonzero=100 * total.flops_nonzero / total.flops,
        flops_compacted=100 * compact.flops_compacted / total.flops,
        dead_groups=100 * total.dead_groups / total.groups,
        dead_units=100 * total.dead_outputs / total.outputs,
        last_nonzero=100 * int(classes.sum()) / last.numel(),
        classes_per_feature=int(classes.sum()) / max(int((classes > 0).sum()), 1),
        first=first.cpu().numpy().copy(),
        last=last.cpu().numpy().copy(),
    )


def train_all(jobs: list[Job], images: Images, settings: Settings, workers: int) -> Iterator[Run]:
    """The runs in the order they finish, from ``workers`` processes."""
    return in_workers(train, jobs, (images, settings), settings.device, workers)


def in_workers(
    work: Callable[..., Any], jobs: Sequence[Any], shared: tuple[Any, ...], device: str, workers: int
) -> Iterator[Any]:
    """``work(job, *shared)`` of every job, as they finish, from ``workers`` processes of one thread each.

    One worker is this process itself. The results do not depend on the number of workers.
    """
    if workers == 1:
        threads = torch.get_num_threads()
        _start_worker(work, shared, device)
        try:
            yield from map(_work, jobs)
        finally:
            torch.set_num_threads(threads)
        return
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (work, shared, device))
    try:
        for future in as_completed([pool.submit(_work, job) for job in jobs]):
            yield future.result()
    finally:
        pool.shutdown(cancel_futures=True)


_task: tuple[Callable[..., Any], tuple[Any, ...]]


def _start_worker(work: Callable[..., Any], shared: tuple[Any, ...], device: str) -> None:
    global _task
    _task = work, shared
    torch.set_num_threads(1)
    if device != "cpu":  # the same command gives the same table there too
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def _work(job: Any) -> Any:
    work, shared = _task
    return work(job, *shared)
