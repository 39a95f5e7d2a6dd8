"""Whole training iterations: ``python -m bench.training`` writes bench/results/training-NAME.json.

An iteration is forward, backward and step, on random weights and data, with bf16 autocast.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer

from cges_kernels import ProxSGD, penalty, sparsity_param_groups
from cges_kernels.backends import registry

from . import table
from .baselines import COEFFICIENTS, LR, MOMENTUM
from .lab import Lab, find
from .table import Row
from .timing import Step, Times, take_turns

SECONDS = 7.0  # for the turns of one run
CALLS = 3  # iterations that are timed together
PROXIMAL: Mapping[str, dict[str, Any]] = {
    "prox_sgd": {"prox_mode": "sequential"},
    "exact": {"prox_mode": "exact"},
    "eager": {"backend": "reference"},
}
CONTENDERS = ("fused_sgd", *PROXIMAL, "penalty")
PENALTY_KEYS = ("group_lasso", "exclusive_lasso", "group_by", "view")


class Task(NamedTuple):
    """A model and its loss on a batch that stays the same."""

    model: nn.Module
    loss: Callable[[nn.Module], Tensor]


def images(model: nn.Module, count: int, side: int, classes: int, device: str) -> Task:
    x = torch.randn(count, 3, side, side, device=device).to(memory_format=torch.channels_last)
    labels = torch.randint(classes, (count,), device=device)
    model = model.to(device, memory_format=torch.channels_last)
    return Task(model, lambda model: nn.functional.cross_entropy(model(x), labels))


def resnet50(device: str) -> Task:
    from torchvision import models

    return images(models.resnet50(), 128, 224, 1000, device)


def transformer(device: str, width: int = 1024, depth: int = 24, batch: int = 32, tokens: int = 197) -> Task:
    """The layers of ViT-L/16 on random tokens, of which the first is classified."""
    options = {"dropout": 0.0, "batch_first": True, "norm_first": True}
    layer = nn.TransformerEncoderLayer(width, width // 64 or 2, 4 * width, **options)
    model = nn.ModuleList(
        [nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(width, 10)]
    ).to(device)
    x = torch.randn(batch, tokens, width, device=device)
    labels = torch.randint(10, (batch,), device=device)
    return Task(model, lambda model: nn.functional.cross_entropy(model[1](model[0](x)[:, 0]), labels))


MODELS: dict[str, Callable[[str], Task]] = {"ViT-L/16": transformer}
if find_spec("torchvision"):
    MODELS["ResNet-50"] = resnet50


class Training:
    """The training loop that a user of one contender writes. A call does one iteration."""

    def __init__(self, task: Task, name: str, device: str) -> None:
        self.task, self.device = task, device
        groups = sparsity_param_groups(task.model, **COEFFICIENTS)
        self.in_loss: list[dict[str, Any]] = []
        if name in PROXIMAL:
            self.optimizer = ProxSGD(groups, lr=LR, momentum=MOMENTUM, **PROXIMAL[name])
        else:
            self.optimizer = torch.optim.SGD(task.model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
        if name == "penalty":
            self.in_loss = [group for group in groups if group["group_lasso"] or group["exclusive_lasso"]]

    def backward(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.device, torch.bfloat16):
            loss = self.task.loss(self.task.model)
        for group in self.in_loss:
            options = {key: group[key] for key in PENALTY_KEYS}
            loss = loss + sum(penalty(p, **options) for _, p in group["params"])
        loss.backward()

    def __call__(self) -> None:
        self.backward()
        self.optimizer.step()


def clock(step: Step, once: bool) -> float:
    """Seconds that a user waits for an iteration: the mean of a few, after an untimed warm-up."""
    threads = torch.get_num_threads()
    return Timer("step()", globals={"step": step}, num_threads=threads).timeit(CALLS).median


def row(lab: Lab, name: str, make: Callable[[str], Task]) -> Row:
    backend = registry.choose_backend("auto", [torch.empty(1, device=lab.device)])
    note = {"suite": "training", "backend": backend, "dtype": "bf16", "workload": name}

    def run() -> list[Times]:
        lab.free()
        task = make(lab.device)
        # Each has a model of its own, all from the same weights. With one for all, each would compute with
        # the zeros that the others made, and a gradient's memory would change hands in every turn.
        tasks = {n: task._replace(model=copy.deepcopy(task.model)) for n in CONTENDERS}
        return [take_turns({n: Training(tasks[n], n, lab.device) for n in tasks}, clock, SECONDS)]

    return Row(name, "fused_sgd", "prox_sgd", None, run, note)


def run(lab: Lab, argv: Sequence[str] | None = None) -> bool:
    options = table.arguments("bench.training", __doc__, runs=3, minutes=3.0).parse_args(argv)
    rows = [row(lab, name, make) for name, make in MODELS.items()]
    return table.run(rows, f"training-{lab.name()}", lab.environment(options.commit), options, keep=True)


if __name__ == "__main__":
    torch.manual_seed(0)
    sys.exit(0 if run(find("bench.training")) else 1)
