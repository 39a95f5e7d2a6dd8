"""The rows of the CPU suite that have targets, under the names that the tables show."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from . import baselines, workloads
from .baselines import Contender
from .lab import Lab
from .rows import Bench, on_threads
from .table import Row
from .timing import Times
from .workloads import Shapes

SECONDS = 1.0  # for the turns of one row in one run


def mostly_dead(shapes: Shapes, **options: Any) -> Contender:
    """ProxSGD with skip_dead on a matrix with 90% zero rows; fused SGD steps all rows."""
    ours = baselines.prox_sgd(shapes, freeze_zeros="group", skip_dead=True, **options)
    with torch.no_grad():
        for p in ours.params:
            p[torch.rand(len(p)) < 0.9] = 0
    return ours


def on_one_thread(shapes: Shapes, **options: Any) -> Contender:
    sgd = baselines.fused_sgd(shapes, **options)
    return sgd._replace(step=on_threads(1)(sgd.step))


def faster_baseline(times: Times) -> Times:
    """Takes as the baseline, in each turn, the faster of torch's fused SGD on one thread and on all."""
    rest = {name: values for name, values in times.items() if name != "one_thread"}
    return {**rest, "fused_sgd": [min(pair) for pair in zip(times["one_thread"], times["fused_sgd"])]}


def rows(lab: Lab) -> list[Row]:
    """The rows of the table; each target is the most that the row's ratio should be."""
    bench = Bench(lab)
    matrix, uneven = workloads.matrix(4096, 4096), workloads.matrix(4096, 4128)
    small, tiny = workloads.small(300, 1024), workloads.small(500, 16)

    def sgd(name: str, shapes: Shapes, target: float, group_by: str = "feature", dtype: str = "fp32") -> Row:
        slow = {"eager": partial(baselines.eager, group_by=group_by)}
        return bench.sgd(name, shapes, group_by, target=target, dtype=dtype, slow=slow, seconds=SECONDS)

    def adamw(name: str, shapes: Shapes, target: float, group_by: str = "feature", host: bool = False) -> Row:
        slow = {"eager": partial(baselines.eager_adamw, group_by=group_by)}
        options = {"target": target, "slow": slow, "host": host, "seconds": SECONDS}
        return bench.adamw(f"AdamW, {name}", shapes, group_by, **options)

    on_host: dict[str, Any] = {"host": True, "seconds": SECONDS}
    dead = {"make": mostly_dead, "target": 0.25, "seconds": SECONDS}
    better = {"more": {"one_thread": on_one_thread}, "adjust": faster_baseline, "target": 0.6}
    empty = {"more": {"empty": baselines.empty_step}, "threads": 1, "target": 1 / 3}
    halves = ("bf16", "fp16")
    return [
        sgd("feature 4096x4128", uneven, 1.35),
        sgd("feature 4096x4096", matrix, 1.35),
        sgd("feature 8192x4096", workloads.matrix(8192, 4096), 1.5),
        sgd("feature 512x4608", workloads.matrix(512, 4608), 1.25),
        sgd("filter 4096x4096", matrix, 1.15, "filter"),
        sgd("ResNet-50 feature", workloads.resnet50(), 1.25),
        *(sgd(f"feature 4096x4128, {dtype}", uneven, 1.5, dtype=dtype) for dtype in halves),
        *(sgd(f"filter 4096x4096, {dtype}", matrix, 1.5, "filter", dtype) for dtype in halves),
        bench.sgd("filter 4096x4096, 90% dead", matrix, "filter", **dead),
        bench.sgd("300 tensors of 1,024", small, **on_host, **better),
        bench.sgd("500 tensors of 16, host", tiny, **on_host, **empty),
        *(
            bench.modes(f"exact 4096x4128, {left}% left", uneven, left, target=1.5, seconds=SECONDS)
            for left in (90, 50, 10)
        ),
        adamw("filter 4096x4096", matrix, 1.2, "filter"),
        adamw("feature 4096x4096", matrix, 1.35),
        adamw("ResNet-50 feature", workloads.resnet50(), 1.3),
        adamw("300 tensors of 1,024", small, 1.0, host=True),
    ]
