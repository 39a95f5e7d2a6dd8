"""What the CPU suite measures beyond the rows with targets: a grid of single tensors, models, scaling.

Every row has torch's fused SGD as its baseline and a copy of the bytes that must move beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch

from . import baselines, counts, workloads
from .baselines import Contender
from .core import coefficients_for, on_threads
from .lab import Lab
from .table import Measure, Row
from .timing import Times
from .workloads import Case, Shapes

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}
SPECS = ("feature", "filter", "channel", "tensor")
SIDES = (64, 512, 4096)  # of the grid
LARGEST = 2**24  # elements, where cost is followed over elements
HUGE = (16384, 8192)
FOR_ALL = 10**8  # elements up to which every contender runs; eager ones take seconds a step beyond
FOR_CPU = 5 * 10**8  # elements up to which a model is measured here; larger ones are left to a GPU


def facts(suite: str, shapes: Shapes, dtype: str = "fp32", **more: Any) -> dict[str, Any]:
    """What the files say of a row beside its times."""
    of = {"elements": workloads.elements(shapes), "tensors": len(shapes), "dtype": dtype}
    moved = workloads.bytes_moved(shapes, DTYPES[dtype])
    return {"suite": suite, **of, "bytes": moved, "cache": "cold", **more}


def beside(lab: Lab, shapes: Shapes, dtype: torch.dtype = torch.float32, **options: Any) -> Measure:
    """prox_sgd, torch's fused SGD and a copy."""

    def measure() -> list[Times]:
        lab.free()
        ours = lab.contender(partial(baselines.prox_sgd, **options), shapes, dtype)
        steps = {"fused_sgd": lab.contender(baselines.fused_sgd, shapes, dtype).step, "prox_sgd": ours.step}
        return [lab.beside_copy(steps, shapes, dtype)]

    return measure


def exact_beside(lab: Lab, shapes: Shapes, dtype: torch.dtype, group_by: str, size: int) -> Measure:
    """The same in exact mode, half of the weights left; each step starts from the same weights."""

    def measure() -> list[Times]:
        lab.free()
        known = min(size, max(SIDES))  # coefficients for longer groups follow from those for this length
        chosen = dict(coefficients_for(0.5, known))
        chosen["group_lasso"] *= (size / known) ** 0.5
        chosen["exclusive_lasso"] *= known / size
        ours = baselines.prox_sgd(shapes, dtype=dtype, group_by=group_by, prox_mode="exact", **chosen)
        kept = [(p.detach(), p.detach().clone()) for p in ours.params]
        flush = baselines.plain_copy(lab.copy_bytes, lab.device).step

        def reset() -> None:
            for p, start in kept:
                p.copy_(start)
            flush()

        steps = {"fused_sgd": baselines.fused_sgd(shapes, dtype=dtype).step, "prox_sgd": ours.step}
        return [lab.beside_copy(steps, shapes, dtype, before=reset)]

    return measure


def grid(lab: Lab, sides: Sequence[int] = SIDES, runs: int = 2) -> list[Row]:
    """Every group spec, mode and dtype over rows x columns; all of them for fp32, else the squares."""
    rows = []
    for dtype in DTYPES:
        pairs = [(r, c) for r in sides for c in sides if dtype == "fp32" or r == c]
        for spec in SPECS:
            for height, width in pairs:
                shapes = workloads.of_group(spec, height, width)
                size = {"filter": width, "tensor": height * width, "channel": 9 * height}.get(spec, height)
                place = {"dtype": DTYPES[dtype], "group_by": spec}
                ways = {
                    "sequential": beside(lab, shapes, **place),
                    "exact": exact_beside(lab, shapes, size=size, **place),
                }
                for mode, measure in ways.items():
                    name = f"{spec} {height}x{width} {dtype} {mode}"
                    of = {"group_by": spec, "rows": height, "columns": width, "mode": mode}
                    note = facts("grid", shapes, dtype, **of)
                    rows.append(Row(name, "fused_sgd", "prox_sgd", None, measure, note, runs=runs))
    return rows


def model(lab: Lab, case: Case, runs: int) -> Row:
    """Beside all that a user could pick instead, slow ones in the first run only; counts are made there."""
    large = workloads.elements(case.shapes) > FOR_ALL
    more = {"foreach": baselines.foreach_sgd, "for_loop": baselines.for_loop_sgd, **baselines.others()}
    others = {} if large else more
    counted: dict[str, dict[str, int]] = {}
    note = facts("models", case.shapes, workload=case.name, counts=counted)

    def count(name: str, contender: Contender) -> None:
        counted[name] = counts.counted(name, contender.step)

    def measure() -> list[Times]:
        lab.free()
        sgd = lab.contender(baselines.fused_sgd, case.shapes)
        ours = lab.contender(baselines.prox_sgd, case.shapes)
        sets = [lab.beside_copy({"fused_sgd": sgd.step, "prox_sgd": ours.step}, case.shapes, torch.float32)]
        if not counted:
            count("fused_sgd", sgd), count("prox_sgd", ours)
        del ours
        baseline = {"fused_sgd": sgd.step}
        return [*sets, *lab.one_by_one(others, baseline, case.shapes, torch.float32, note, count)]

    name = f"{case.name}, all contenders"  # the rows with targets have one of these models too
    return Row(name, "fused_sgd", "prox_sgd", None, measure, note, runs=1 if large else runs)


def models(lab: Lab, cases: Iterable[Case], runs: int = 3) -> list[Row]:
    """Those that a CPU's memory holds."""
    return [model(lab, case, runs) for case in cases if workloads.elements(case.shapes) <= FOR_CPU]


def powers(low: int, high: int, factor: int = 4) -> Iterable[int]:
    while low <= high:
        yield low
        low *= factor


def scaling(
    lab: Lab, threads: int, largest: int = LARGEST, huge: tuple[int, int] = HUGE, runs: int = 2
) -> list[Row]:
    """How cost grows with elements, tensors, group length and threads; and one huge tensor."""

    def row(
        along: str, x: int, shapes: Shapes, measure: Measure | None = None, runs: int = runs, **options: Any
    ) -> Row:
        group_by = options.get("group_by", "feature")
        name = f"{along} {x}" if along in ("threads", "tensors") else f"{group_by}, {along} {x}"
        note = facts("scaling", shapes, along=along, x=x, group_by=group_by)
        how = measure or beside(lab, shapes, **options)
        return Row(name, "fused_sgd", "prox_sgd", None, how, note, runs=runs)

    def with_threads(count: int, shapes: Shapes) -> Measure:
        def measure() -> list[Times]:
            before = torch.get_num_threads()
            try:
                on_threads(count, lambda: None)()
                return beside(lab, shapes)()
            finally:
                torch.set_num_threads(before)

        return measure

    def near(rows: int) -> Shapes:  # of about as many elements as the half of the largest
        return workloads.matrix(rows, largest // 2 // rows)

    side = int(largest**0.5)
    rows = [row("elements", n, workloads.small(1, n)) for n in powers(largest // 4**7 or 1, largest)]
    rows += [row("tensors", n, workloads.small(n, 1024)) for n in (1, 10, 100, 1000)]
    for spec in ("feature", "filter"):
        for length in powers(16, largest // 64):
            shapes = near(length) if spec == "feature" else [near(length)[0][::-1]]
            rows.append(row("group length", length, shapes, group_by=spec))
    shapes = workloads.matrix(side, side + 32)  # rows that do not alias in the caches
    rows += [row("threads", n, shapes, with_threads(n, shapes)) for n in powers(1, threads, 2)]
    return [*rows, row("huge", huge[0] * huge[1], workloads.matrix(*huge), runs=1)]
