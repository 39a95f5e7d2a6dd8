"""The rows of the CPU suite that have targets; their names are those of the README's table."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from cges_kernels import ops, prox, step_plan

from . import baselines, workloads
from .table import Measure, Row
from .timing import Step, Times, last_cache_bytes, take_turns


def against_fused_sgd(shapes: workloads.Shapes, **options: Any) -> Measure:
    """prox_sgd and a copy of the same bytes, then the eager reference, beside torch's fused SGD."""

    def measure() -> list[Times]:
        sgd = baselines.fused_sgd(shapes).step
        ours, copy = baselines.prox_sgd(shapes, **options).step, baselines.copy(shapes).step
        fast = take_turns({"fused_sgd": sgd, "prox_sgd": ours, "copy": copy})
        return [fast, take_turns({"fused_sgd": sgd, "eager": baselines.eager(shapes, **options).step})]

    return measure


def on_threads(count: int, step: Step) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(count)
        step()

    return run


def faster_of_one_and_two_threads(shapes: workloads.Shapes) -> Measure:
    """prox_sgd beside torch's fused SGD on one and on two threads; the faster one is the baseline."""

    def measure() -> list[Times]:
        sgd, ours = baselines.fused_sgd(shapes).step, baselines.prox_sgd(shapes).step
        threads = torch.get_num_threads()
        steps = {
            "one": on_threads(1, sgd),
            "two": on_threads(threads, sgd),
            "prox_sgd": on_threads(threads, ours),
        }
        times = take_turns(steps)
        faster = [min(pair) for pair in zip(times["one"], times["two"])]
        return [{"prox_sgd": times["prox_sgd"], "fused_sgd": faster}]

    return measure


def host_time(shapes: workloads.Shapes) -> Measure:
    """Everything on one thread and nothing to compute: what a call of step() costs."""

    def measure() -> list[Times]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        makers = {
            "fused_sgd": baselines.fused_sgd,
            "prox_sgd": baselines.prox_sgd,
            "empty": baselines.empty_step,
        }
        times = take_turns({name: make(shapes).step for name, make in makers.items()})
        torch.set_num_threads(threads)
        return [times]

    return measure


def checks_alone(shapes: workloads.Shapes) -> Measure:
    """What a GPU's step costs before its launch: a StepPlan's gather and run, in C++ and in Python."""

    def stepper(kind: type) -> Step:
        params = [baselines.parameters(shapes)]
        layouts = [[ops.layout_tuple(p, "feature", None) for p in params[0]]]
        plan = kind(params, layouts)
        plan.set_hyperparameters(0, lr=baselines.LR, momentum=baselines.MOMENTUM)
        state: dict[Tensor, Any] = {}

        def step() -> None:
            assert plan.gather(params, state)
            plan.run(lambda table: None)

        return step

    def measure() -> list[Times]:
        kinds = {"python": step_plan.StepPlan, "cpp": ops._C.StepPlan}
        return [take_turns({name: stepper(kind) for name, kind in kinds.items()})]

    return measure


@cache
def coefficients_for(fraction: float, rows: int) -> dict[str, float]:
    """A mild group lasso and the exclusive lasso that in exact mode leave ``fraction`` of normal weights."""
    sample = torch.randn(rows, 64)
    low, high = 1e-6, 1e6
    for _ in range(40):
        strength = (low * high) ** 0.5
        chosen = {"group_lasso": rows**0.5 / 20, "exclusive_lasso": strength / rows}
        left = (prox(sample, **chosen, prox_mode="exact") != 0).double().mean()
        low, high = (strength, high) if left > fraction else (low, strength)
    return {key: value / baselines.LR for key, value in chosen.items()}


def exact_against_sequential(
    make: Callable[..., baselines.Contender],
    rows: int,
    fraction: float,
    note: dict[str, Any],
    turns: Callable[..., Times] = take_turns,
    flush: Step = lambda: None,
) -> Measure:
    """Both modes at one pair of coefficients, from the same weights in every step; ``flush`` goes before it.

    ``make`` takes prox_mode and coefficients, and its first parameter has groups of ``rows``.
    """

    def measure() -> list[Times]:
        chosen = coefficients_for(fraction, rows)
        steps: dict[str, Step] = {}
        kept = []
        for mode in ("sequential", "exact"):
            contender = make(prox_mode=mode, **chosen)
            p = contender.params[0].detach()
            kept.append((p, p.clone()))
            contender.step()
            note[f"percent_nonzero_{mode}"] = 100 * (p != 0).double().mean().item()
            steps[mode] = contender.step

        def reset() -> None:
            for p, start in kept:
                p.copy_(start)
            flush()

        return [turns(steps, before=reset)]

    return measure


def rows() -> list[Row]:
    """The table: each target is the ratio to aim at."""

    def note(shapes: workloads.Shapes) -> dict[str, Any]:
        moved = workloads.bytes_moved(shapes, torch.float32)
        cache = "cold" if moved > last_cache_bytes() else "warm"  # the same tensors in every step
        return {
            "elements": workloads.elements(shapes),
            "tensors": len(shapes),
            "bytes": moved,
            "cache": cache,
        }

    def fused(name: str, target: float, shapes: workloads.Shapes, **options: Any) -> Row:
        measure = against_fused_sgd(shapes, **options)
        return Row(name, "fused_sgd", "prox_sgd", target, measure, note(shapes))

    def special(name: str, target: float, shapes: workloads.Shapes, measure: Measure) -> Row:
        return Row(name, "fused_sgd", "prox_sgd", target, measure, note(shapes))

    def exact(percent: int) -> Row:
        shapes = workloads.matrix(4096, 4128)
        found = note(shapes)

        def make(**options: Any) -> baselines.Contender:
            return baselines.prox_sgd(shapes, **options)

        measure = exact_against_sequential(make, 4096, percent / 100, found)
        return Row(f"exact 4096x4128, {percent}% left", "sequential", "exact", 1.5, measure, found)

    small, tiny = workloads.small(300, 1024), workloads.small(500, 16)
    return [
        fused("feature 4096x4128", 1.25, workloads.matrix(4096, 4128)),
        fused("feature 4096x4096", 1.5, workloads.matrix(4096, 4096)),
        fused("feature 8192x4096", 1.75, workloads.matrix(8192, 4096)),
        fused("feature 512x4608", 1.3, workloads.matrix(512, 4608)),
        fused("filter 4096x4096", 1.25, workloads.matrix(4096, 4096), group_by="filter"),
        fused("ResNet-50 feature", 1.3, workloads.resnet50()),
        special("300 tensors of 1,024", 1.0, small, faster_of_one_and_two_threads(small)),
        special("500 tensors of 16, host", 1 / 3, tiny, host_time(tiny)),
        Row("500 tensors, checks alone", "python", "cpp", None, checks_alone(tiny), note(tiny)),
        *(exact(percent) for percent in (90, 50, 10)),
    ]
