"""Milliseconds per optimizer step: ours against torch's fused one and against the eager reference."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import nn

from ..backends.registry import choose_backend
from ..reporting.files import as_csv
from ..training.recipes import cges_param_groups
from .results import aligned
from .training import OPTIMIZERS, LeNet, Training

SECONDS = 0.02  # that one timing of one optimizer should last


class Timing(NamedTuple):
    """Medians in milliseconds; ``executor`` is what ours ran on."""

    what: str
    weights: int
    executor: str
    plain: float
    prox: float
    reference: float


def _models(size: int) -> dict[str, nn.Module]:
    convolutions = nn.Sequential(*[nn.Conv2d(512, 512, 3) for _ in range(4)])
    return {"this network": LeNet(size), "4 convolutions 512x512x3x3": convolutions}


def _steps(model: nn.Module, training: Training) -> tuple[str, list[Callable[[], Any]]]:
    """The executor, and step() of torch's fused optimizer, ours and the reference, on a copy each."""
    makers: list[Callable[[nn.Module], Any]] = [
        lambda m: training.plain(m.parameters(), lr=1e-4, **training.options, fused=True),
        lambda m: training.proximal(cges_param_groups(m, 0.01, scale="size"), lr=1e-4, **training.options),
        lambda m: training.proximal(
            cges_param_groups(m, 0.01, scale="size"), lr=1e-4, **training.options, backend="reference"
        ),
    ]
    steps: list[Callable[[], Any]] = []
    for make in makers:
        own = copy.deepcopy(model)
        for p in own.parameters():
            p.grad = torch.randn_like(p)
        steps.append(make(own).step)
    return choose_backend("auto", list(model.parameters())), steps


def _time(step: Callable[[], Any], count: int, device: torch.device) -> float:
    """Milliseconds per call, over ``count`` of them."""
    synchronise = torch.cuda.synchronize if device.type == "cuda" else (lambda: None)
    synchronise()
    start = time.perf_counter()
    for _ in range(count):
        step()
    synchronise()
    return 1000 * (time.perf_counter() - start) / count


def measure(size: int, device: str, optimizer: str = "sgd", rounds: int = 15) -> list[Timing]:
    """The three optimizers in turn, ``rounds`` times, on the demo's network and on a larger one."""
    timings = []
    where = torch.device(device)
    for what, model in _models(size).items():
        executor, steps = _steps(model.to(where), OPTIMIZERS[optimizer])
        first = [min(_time(step, 1, where) for _ in range(3)) for step in steps]
        counts = [max(1, round(1000 * SECONDS / ms)) for ms in first]
        taken = [[_time(step, n, where) for step, n in zip(steps, counts)] for _ in range(rounds)]
        weights = sum(p.numel() for p in model.parameters())
        timings.append(Timing(what, weights, executor, *map(median, zip(*taken))))
    return timings


def speed_table(timings: Sequence[Timing], optimizer: str = "sgd") -> str:
    """The timings as text."""
    training = OPTIMIZERS[optimizer]
    plain, ours = f"torch {training.plain.__name__}, fused", training.proximal.__name__
    rows = [["ms per optimizer step", "weights", plain, ours, "", "eager reference", ""]]
    for t in timings:
        prox, reference = f"({t.prox / t.plain:.2f}x)", f"({t.reference / t.plain:.2f}x)"
        row = [f"{t.plain:.3f}", f"{t.prox:.3f}", prox, f"{t.reference:.3f}", reference]
        rows.append([t.what, f"{t.weights:,}", *row])
    executors = ", ".join(sorted({t.executor for t in timings}))
    options = ", ".join(f"{key} {value:g}" for key, value in training.options.items())
    return (
        f"{aligned(rows)}\n{ours}'s executor: {executors}; {torch.get_num_threads()} threads; CGES, {options}"
    )


def speed_csv(timings: Sequence[Timing]) -> str:
    """The timings as CSV."""
    return as_csv(["what", "weights", "executor", "torch_fused_ms", "proximal_ms", "reference_ms"], timings)
