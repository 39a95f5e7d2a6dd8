"""Whole training iterations: ``python -m bench.training`` writes bench/results/training-<name>.json and .csv.

Forward, backward and step, on random weights and data, with bf16 autocast. Without a GPU it trains tiny
networks, which shows that the program works and nothing else.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from cges_kernels import ProxSGD, penalty, sparsity_param_groups
from cges_kernels.backends import registry

from .baselines import COEFFICIENTS, LR, MOMENTUM
from .lab import Cpu, Lab
from .table import NAMES, RESULTS, WHEN, Results, Row, earlier, measure, merged, write
from .timing import Times, take_turns

RUNS = 3  # separated, each with models of its own
SECONDS = 7.0  # of a run
CALLS = 3  # iterations between the events
PROXIMAL: Mapping[str, dict[str, Any]] = {
    "prox_sgd": {"prox_mode": "sequential"},
    "exact": {"prox_mode": "exact"},
    "eager": {"backend": "reference"},
}
CONTENDERS = ("fused_sgd", *PROXIMAL, "penalty")
MORE = ("wall_ms", "step_ms", "step_host_ms", *WHEN)  # columns beside those of every table
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


def small_conv_net(device: str) -> Task:
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, stride=2), nn.ReLU()]
    return images(nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * 6 * 6, 10)), 8, 16, 10, device)


def gpt2(device: str, count: int = 8, tokens: int = 512, **config: int) -> Task:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**config)).to(device)
    ids = torch.randint(model.config.vocab_size, (count, tokens), device=device)
    return Task(model, lambda model: model(ids, labels=ids).loss)


def small_gpt2(device: str) -> Task:
    return gpt2(device, 2, 16, n_layer=2, n_embd=32, n_head=2, vocab_size=96, n_positions=16)


Maker = Callable[[str], Task]
MODELS: dict[str, tuple[str, Maker]] = {  # and the package that each needs
    "ResNet-50": ("torchvision", resnet50),
    "GPT-2 small": ("transformers", gpt2),
}
SMALL_MODELS: dict[str, tuple[str, Maker]] = {
    "small conv net": ("torch", small_conv_net),
    "small GPT-2": ("transformers", small_gpt2),
}


class HostEvent:
    """torch.cuda.Event where there is no GPU: the host's own time."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: HostEvent) -> float:
        return 1e3 * (end.seconds - self.seconds)


class Training:
    """What a user of one contender writes. Called, it does an iteration; it remembers its times."""

    def __init__(self, task: Task, name: str, lab: Lab) -> None:
        self.task, self.lab = task, lab
        groups = sparsity_param_groups(task.model, **COEFFICIENTS)
        self.in_loss: list[dict[str, Any]] = []
        if name in PROXIMAL:
            self.optimizer = ProxSGD(groups, lr=LR, momentum=MOMENTUM, **PROXIMAL[name])
        else:
            self.optimizer = torch.optim.SGD(task.model.parameters(), lr=LR, momentum=MOMENTUM, fused=True)
        if name == "penalty":
            self.in_loss = [group for group in groups if group["group_lasso"] or group["exclusive_lasso"]]
        self.walls: list[float] = []  # seconds of an iteration by the CPU's clock, of a few with their start
        self.steps: list[tuple[Any, Any]] = []  # events around each step
        self.hosts: list[float] = []  # seconds until each step returned

    def event(self) -> Any:
        return HostEvent() if self.lab.device == "cpu" else torch.cuda.Event(enable_timing=True)

    def backward(self) -> None:
        self.optimizer.zero_grad()
        with torch.autocast(self.lab.device, torch.bfloat16):
            loss = self.task.loss(self.task.model)
        for group in self.in_loss:
            options = {key: group[key] for key in PENALTY_KEYS}
            loss = loss + sum(penalty(p, **options) for _, p in group["params"])
        loss.backward()

    def __call__(self) -> None:
        self.backward()
        start, end = self.event(), self.event()
        start.record()
        began = time.perf_counter()
        self.optimizer.step()
        self.hosts.append(time.perf_counter() - began)
        end.record()
        self.steps.append((start, end))

    def clock(self) -> float:
        """Seconds of an iteration between events; an untimed one goes first, to let the host get ahead."""
        start, end = self.event(), self.event()
        self.lab.synchronize()
        began = time.perf_counter()
        self()
        start.record()
        for _ in range(CALLS):
            self()
        end.record()
        self.lab.synchronize()
        self.walls.append((time.perf_counter() - began) / (CALLS + 1))
        return start.elapsed_time(end) / 1e3 / CALLS

    def times(self, turns: int) -> dict[str, float]:
        """Medians of the last ``turns``, in milliseconds."""
        calls = turns * (CALLS + 1)
        return {
            "wall_ms": 1e3 * median(self.walls[-turns:]),
            "step_ms": median(start.elapsed_time(end) for start, end in self.steps[-calls:]),
            "step_host_ms": 1e3 * median(self.hosts[-calls:]),
        }


def row(lab: Lab, name: str, make: Maker, found: Mapping[str, Any]) -> Row:
    backend = registry.choose_backend("auto", [torch.empty(1, device=lab.device)])
    note = {"suite": "training", "backend": backend, "dtype": "bf16", "workload": name}
    note.update({key: found[key] for key in WHEN})

    def run() -> list[Times]:
        lab.free()
        task = make(lab.device)
        # Each has a model of its own, all from the same weights. With one for all, each would compute with
        # the zeros that the others made, and a gradient's memory would change hands in every turn.
        contenders = {n: Training(task._replace(model=copy.deepcopy(task.model)), n, lab) for n in CONTENDERS}
        times = take_turns(contenders, clock=lambda training, once: training.clock(), seconds=SECONDS)
        sizes = [p.numel() for p in task.model.parameters()]
        note.update(elements=sum(sizes), tensors=len(sizes))
        note["counts"] = {n: training.times(len(times[n])) for n, training in contenders.items()}
        return [times]

    # Of what is counted, the last run's numbers stay.
    return Row(name, "fused_sgd", "prox_sgd", None, run, note, runs=RUNS)


def shown(results: Results) -> str:
    lines = [f"{'':38s}{'iteration ms':>13s}{'to fused':>9s}{'wall ms':>9s}{'step ms':>9s}{'host ms':>9s}"]
    for result in results:
        lines.append(f"{result['row']}: {result.get('error', '')}")
        for name, of in result.get("contenders", {}).items():
            numbers = f"{of['wall_ms']:9.2f}{of['step_ms']:9.3f}{of['step_host_ms']:9.3f}"
            lines.append(f"  {NAMES[name]:36s}{of['ms']:13.2f}{of['ratio']:9.3f}{numbers}")
    return "\n".join(lines)


def run(lab: Lab, options: argparse.Namespace) -> bool:
    """Train what can be made here and write the files; whether there was anything and all went well."""
    found, name = {**lab.environment(options.commit), "runs": RUNS}, f"training-{lab.name()}"
    rows = []
    for model, (package, make) in (SMALL_MODELS if lab.device == "cpu" else MODELS).items():
        if options.model not in model:
            continue
        if find_spec(package) is None:
            print(f"bench.training: {model} is left out: {package} is not installed", file=sys.stderr)
        else:
            rows.append(row(lab, model, make, found))
    old = earlier(name, options.out)

    def save(results: Results) -> None:
        write({"environment": found, "results": merged(old, results)}, name, options.out, MORE)

    results = measure(rows, RUNS, options.minutes, save)
    print(shown(results))
    return bool(results) and not any("error" in result for result in results)


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="bench.training", description=__doc__)
    parser.add_argument(
        "--model", default="", help="train those whose names contain this; other results stay"
    )
    parser.add_argument("--minutes", type=float, default=3.0, help="begin no run later (%(default)s)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the files (default %(default)s)")
    parser.add_argument("--commit", help="what was measured, where git cannot tell")
    return parser.parse_args(argv)


def main() -> None:
    options = arguments()
    torch.manual_seed(0)
    sys.exit(0 if run(Lab() if torch.cuda.is_available() else Cpu(), options) else 1)


if __name__ == "__main__":
    main()
