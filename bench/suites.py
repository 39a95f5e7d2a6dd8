"""What is measured beyond the rows with targets: a grid of single tensors, models, scaling.

Every row has torch's fused SGD as its baseline and a copy of the bytes that must move beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch

from . import baselines, workloads
from .core import coefficients_for
from .lab import Lab
from .table import Measure, Row
from .timing import Times
from .workloads import DTYPES, Case, Shapes, facts

SPECS = ("feature", "filter", "channel", "tensor")
SIDES = (64, 512, 4096)  # of the grid
LARGEST = 2**24  # elements, where cost is followed over elements
HUGE = (16384, 8192)
FOR_ALL = 10**8  # elements up to which every contender runs; eager ones take seconds a step beyond
FOR_CPU = 5 * 10**8  # elements up to which a model is measured here; larger ones are left to a GPU


def beside(lab: Lab, shapes: Shapes, note: dict[str, Any], **options: Any) -> Measure:
    """prox_sgd, torch's fused SGD and a copy, on the row's backend and in its dtype."""
    dtype = DTYPES[note["dtype"]]
    note["cache"] = lab.cache(shapes, dtype)

    def measure() -> list[Times]:
        lab.free()
        ours = partial(baselines.prox_sgd, backend=note["backend"], **options)
        makers = {"fused_sgd": baselines.fused_sgd, "prox_sgd": ours}
        contenders = {name: lab.contender(make, shapes, dtype) for name, make in makers.items()}
        return [lab.beside_copy(contenders, shapes, dtype, note)]

    return measure


def exact_beside(lab: Lab, shapes: Shapes, note: dict[str, Any], group_by: str, size: int) -> Measure:
    """The same in exact mode, half of the weights left; each step starts from the same weights."""
    place = {"dtype": DTYPES[note["dtype"]], "device": lab.device}

    def measure() -> list[Times]:
        lab.free()
        known = min(size, max(SIDES))  # coefficients for longer groups follow from those for this length
        chosen = dict(coefficients_for(0.5, known))
        chosen["group_lasso"] *= (size / known) ** 0.5
        chosen["exclusive_lasso"] *= known / size
        options = {"backend": note["backend"], "group_by": group_by, "prox_mode": "exact", **chosen}
        ours = baselines.prox_sgd(shapes, **place, **options)
        kept = [(p.detach(), p.detach().clone()) for p in ours.params]
        flush = baselines.plain_copy(lab.copy_bytes, lab.device).step

        def reset() -> None:
            for p, start in kept:
                p.copy_(start)
            flush()

        contenders = {"fused_sgd": baselines.fused_sgd(shapes, **place), "prox_sgd": ours}
        return [lab.beside_copy(contenders, shapes, place["dtype"], note, reset)]

    return measure


def named(backend: str, name: str) -> str:
    """The name of a row: where there are several backends, they go first."""
    return name if backend == "cpu" else f"{backend}: {name}"


def grid(
    lab: Lab,
    sides: Sequence[int] = SIDES,
    runs: int = 2,
    backend: str = "cpu",
    dtypes: Iterable[str] | None = None,
    oblong: Sequence[str] = ("fp32",),
) -> list[Row]:
    """Every group spec, mode and dtype over rows x columns; all of them for ``oblong``, else the squares."""
    rows = []
    for dtype in DTYPES if dtypes is None else dtypes:
        pairs = [(r, c) for r in sides for c in sides if dtype in oblong or r == c]
        for spec in SPECS:
            for height, width in pairs:
                shapes = workloads.of_group(spec, height, width)
                size = {"filter": width, "tensor": height * width, "channel": 9 * height}.get(spec, height)
                for mode in ("sequential", "exact"):
                    of = {"group_by": spec, "rows": height, "columns": width, "mode": mode}
                    note = facts("grid", shapes, "cold", dtype, backend, **of)
                    if mode == "exact":
                        measure = exact_beside(lab, shapes, note, spec, size)
                    else:
                        measure = beside(lab, shapes, note, group_by=spec)
                    name = named(backend, f"{spec} {height}x{width} {dtype} {mode}")
                    rows.append(Row(name, "fused_sgd", "prox_sgd", None, measure, note, runs=runs))
    return rows


def model(lab: Lab, case: Case, runs: int) -> Row:
    """Beside all that a user could pick instead, slow ones in the first run only."""
    large = workloads.elements(case.shapes) > FOR_ALL
    more = {"foreach": baselines.foreach_sgd, "for_loop": baselines.for_loop_sgd, **baselines.others()}
    others = {} if large else more
    cache = lab.cache(case.shapes, torch.float32)
    note = facts("models", case.shapes, cache, workload=case.name)

    def measure() -> list[Times]:
        lab.free()
        sgd = lab.contender(baselines.fused_sgd, case.shapes)
        ours = lab.contender(baselines.prox_sgd, case.shapes)
        contenders = {"fused_sgd": sgd, "prox_sgd": ours}
        sets = [lab.beside_copy(contenders, case.shapes, torch.float32, note)]
        del ours, contenders
        return [*sets, *lab.one_by_one(others, {"fused_sgd": sgd}, case.shapes, torch.float32, note)]

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
    lab: Lab,
    threads: int,
    largest: int = LARGEST,
    huge: tuple[int, int] = HUGE,
    runs: int = 2,
    backend: str = "cpu",
) -> list[Row]:
    """How cost grows with elements, tensors, group length and threads; and one huge tensor."""

    def row(
        along: str,
        x: int,
        shapes: Shapes,
        how: Callable[..., Measure] = beside,
        runs: int = runs,
        group_by: str = "feature",
    ) -> Row:
        name = f"{along} {x}" if along in ("threads", "tensors") else f"{group_by}, {along} {x}"
        note = facts("scaling", shapes, "", backend=backend, along=along, x=x, group_by=group_by)
        measure = how(lab, shapes, note, group_by=group_by)
        return Row(named(backend, name), "fused_sgd", "prox_sgd", None, measure, note, runs=runs)

    def with_threads(lab: Lab, shapes: Shapes, note: dict[str, Any], **options: Any) -> Measure:
        measure_here = beside(lab, shapes, note, **options)

        def measure() -> list[Times]:
            before = torch.get_num_threads()
            try:
                torch.set_num_threads(note["x"])
                return measure_here()
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
    rows += [row("threads", n, shapes, with_threads) for n in powers(1, threads, 2)]
    return [*rows, row("huge", huge[0] * huge[1], workloads.matrix(*huge), runs=1)]
