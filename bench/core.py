"""The rows of the CPU suite that have targets; their names are those of the README's table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from cges_kernels import prox
from cges_kernels.backends import gathering
from cges_kernels.backends.extension import BUILT
from cges_kernels.core.groups import grouped_layout
from cges_kernels.core.hyperparameters import Hyperparameters

from . import baselines, workloads
from .baselines import Contender
from .counts import count_once
from .table import Measure, Row
from .timing import Step, Times, last_cache_bytes, take_turns
from .workloads import Shapes


def in_turns(contenders: Mapping[str, Contender], note: dict[str, Any], before: Step | None = None) -> Times:
    """Seconds of each call; what is counted of each contender goes into ``note`` once."""
    times = take_turns({name: contender.step for name, contender in contenders.items()}, before)
    count_once(note, contenders)
    return times


def against_fused_sgd(shapes: Shapes, note: dict[str, Any], **options: Any) -> Measure:
    """prox_sgd and a copy of the same bytes, then the eager reference, beside torch's fused SGD."""

    dtype = workloads.DTYPES[note["dtype"]]

    def measure() -> list[Times]:
        sgd = baselines.fused_sgd(shapes, dtype=dtype)
        ours, eager = (make(shapes, dtype=dtype, **options) for make in (baselines.prox_sgd, baselines.eager))
        copy = baselines.copy(shapes, dtype)
        fast = in_turns({"fused_sgd": sgd, "prox_sgd": ours, "copy": copy}, note)
        return [fast, in_turns({"fused_sgd": sgd, "eager": eager}, note)]

    return measure


def mostly_dead(shapes: Shapes, note: dict[str, Any], dead: float, **options: Any) -> Measure:
    """prox_sgd that passes by so many of the rows, beside torch's fused SGD, which knows nothing of them."""

    def measure() -> list[Times]:
        held = {"freeze_zeros": "group", "skip_dead": True, **options}
        sgd, ours = baselines.fused_sgd(shapes), baselines.prox_sgd(shapes, **held)
        with torch.no_grad():
            for p in ours.params:
                p[torch.rand(len(p)) < dead] = 0
        return [in_turns({"fused_sgd": sgd, "prox_sgd": ours, "copy": baselines.copy(shapes)}, note)]

    return measure


def against_fused_adamw(shapes: Shapes, note: dict[str, Any], **options: Any) -> Measure:
    """prox_adamw, then the eager reference of it, beside torch's fused AdamW (and SGD)."""

    def measure() -> list[Times]:
        adamw, ours = baselines.fused_adamw(shapes), baselines.prox_adamw(shapes, **options)
        eager = baselines.prox_adamw(shapes, backend="reference", **options)
        sgd, copy = baselines.fused_sgd(shapes), baselines.copy(shapes, states=2)
        everyone = {"fused_adamw": adamw, "prox_adamw": ours, "fused_sgd": sgd, "copy": copy}
        fast = in_turns(everyone, note)
        return [fast, in_turns({"fused_adamw": adamw, "eager": eager}, note)]

    return measure


def on_threads(count: int, step: Step) -> Callable[[], None]:
    def run() -> None:
        torch.set_num_threads(count)
        step()

    return run


def faster_of_one_and_two_threads(shapes: Shapes, note: dict[str, Any]) -> Measure:
    """prox_sgd beside torch's fused SGD on one and on two threads; the faster one is the baseline."""

    def measure() -> list[Times]:
        threads = torch.get_num_threads()
        makers = {"fused_sgd": baselines.fused_sgd, "prox_sgd": baselines.prox_sgd, "copy": baselines.copy}
        contenders = {name: make(shapes) for name, make in makers.items()}
        steps = {name: on_threads(threads, contender.step) for name, contender in contenders.items()}
        times = take_turns({"one": on_threads(1, contenders["fused_sgd"].step), **steps})
        count_once(note, contenders)
        faster = [min(pair) for pair in zip(times.pop("one"), times["fused_sgd"])]
        return [{**times, "fused_sgd": faster}]

    return measure


def host_time(shapes: Shapes, note: dict[str, Any]) -> Measure:
    """Everything on one thread and nothing to compute: what a call of step() costs."""

    def measure() -> list[Times]:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        makers = {
            "fused_sgd": baselines.fused_sgd,
            "prox_sgd": baselines.prox_sgd,
            "empty": baselines.empty_step,
            "copy": baselines.copy,
        }
        times = in_turns({name: make(shapes) for name, make in makers.items()}, note)
        torch.set_num_threads(threads)
        return [times]

    return measure


@baselines.with_idle
def checks(shapes: Shapes, kind: type) -> baselines.Made:
    """A StepPlan's gather and run, without a launch."""
    params = baselines.parameters(shapes)
    layouts = [grouped_layout(p, "feature", None) for p in params]
    plan = kind([params], [layouts])
    plan.set_hyperparameters(0, Hyperparameters.make(lr=baselines.LR, momentum=baselines.MOMENTUM))
    state: dict[Tensor, Any] = {}

    def step() -> None:
        assert plan.gather([params], state)
        plan.run(lambda table: None)

    return step, params


def checks_alone(shapes: Shapes, note: dict[str, Any]) -> Measure:
    """What a GPU's step costs before its launch, in C++ and in Python."""

    def measure() -> list[Times]:
        kinds = {"python": gathering.StepPlan, "cpp": BUILT["cpu"].StepPlan}
        contenders = {name: checks(shapes, kind) for name, kind in kinds.items()}
        whole = {"fused_sgd": baselines.fused_sgd(shapes), "copy": baselines.copy(shapes)}
        return [in_turns({**contenders, **whole}, note)]

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
    make: Callable[..., Contender],
    rows: int,
    fraction: float,
    note: dict[str, Any],
    turns: Callable[[Mapping[str, Contender], Step], Times],
    flush: Step = lambda: None,
) -> Measure:
    """Both modes at one pair of coefficients, from the same weights in every step; ``flush`` goes before it.

    ``make`` takes prox_mode and coefficients, and its first parameter has groups of ``rows``; ``turns`` times
    what it is given, and torch's fused SGD and a copy with it.
    """

    def measure() -> list[Times]:
        chosen = coefficients_for(fraction, rows)
        contenders: dict[str, Contender] = {}
        kept = []
        for mode in ("sequential", "exact"):
            contender = make(prox_mode=mode, **chosen)
            p = contender.params[0].detach()
            kept.append((p, p.clone()))
            contender.step()
            note[f"percent_nonzero_{mode}"] = 100 * (p != 0).double().mean().item()
            contenders[mode] = contender

        def reset() -> None:
            for p, start in kept:
                p.copy_(start)
            flush()

        return [turns(contenders, reset)]

    return measure


def rows() -> list[Row]:
    """The table: each target is the ratio to aim at."""

    def row(
        name: str,
        shapes: Shapes,
        target: float | None,
        measure: Callable[..., Measure] = against_fused_sgd,
        baseline: str = "fused_sgd",
        contender: str = "prox_sgd",
        states: int = 1,
        dtype: str = "fp32",
        **options: Any,
    ) -> Row:
        warm = workloads.bytes_moved(shapes, workloads.DTYPES[dtype], states) <= last_cache_bytes()
        cache = "warm" if warm else "cold"  # the same tensors in every step
        note = workloads.facts("core", shapes, cache, dtype, states=states)
        return Row(name, baseline, contender, target, measure(shapes, note, **options), note)

    def exact(shapes: Shapes, note: dict[str, Any], percent: int) -> Measure:
        def turns(contenders: Mapping[str, Contender], before: Step) -> Times:
            others = {"fused_sgd": baselines.fused_sgd(shapes), "copy": baselines.copy(shapes)}
            return in_turns({**contenders, **others}, note, before)

        make = partial(baselines.prox_sgd, shapes)
        return exact_against_sequential(make, shapes[0][0], percent / 100, note, turns)

    adamw: dict[str, Any] = dict(
        measure=against_fused_adamw, baseline="fused_adamw", contender="prox_adamw", states=2
    )
    matrix, uneven = workloads.matrix(4096, 4096), workloads.matrix(4096, 4128)
    small, tiny = workloads.small(300, 1024), workloads.small(500, 16)
    return [
        row("feature 4096x4128", uneven, 1.35),
        row("feature 4096x4096", matrix, 1.35),
        row("feature 8192x4096", workloads.matrix(8192, 4096), 1.5),
        row("feature 512x4608", workloads.matrix(512, 4608), 1.25),
        row("filter 4096x4096", matrix, 1.15, group_by="filter"),
        row("ResNet-50 feature", workloads.resnet50(), 1.25),
        *(row(f"feature 4096x4128, {dtype}", uneven, 1.5, dtype=dtype) for dtype in ("bf16", "fp16")),
        *(
            row(f"filter 4096x4096, {dtype}", matrix, 1.5, dtype=dtype, group_by="filter")
            for dtype in ("bf16", "fp16")
        ),
        row("filter 4096x4096, 90% dead", matrix, 0.25, mostly_dead, dead=0.9, group_by="filter"),
        row("300 tensors of 1,024", small, 0.6, faster_of_one_and_two_threads),
        row("500 tensors of 16, host", tiny, 1 / 3, host_time),
        row("500 tensors, checks alone", tiny, None, checks_alone, "python", "cpp"),
        *(
            row(f"exact 4096x4128, {left}% left", uneven, 1.5, exact, "sequential", "exact", percent=left)
            for left in (90, 50, 10)
        ),
        row("AdamW, filter 4096x4096", matrix, 1.2, group_by="filter", **adamw),
        row("AdamW, feature 4096x4096", matrix, 1.35, **adamw),
        row("AdamW, ResNet-50 feature", workloads.resnet50(), 1.3, **adamw),
        row("AdamW, 300 tensors of 1,024", small, 1.0, **adamw),
    ]
