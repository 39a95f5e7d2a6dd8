"""The suites for a CPU beyond the rows with targets: models, a grid of tensors, and how cost scales.

Every row has torch's fused SGD as its baseline and a copy of the bytes that must move beside it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from itertools import product
from typing import Any

from . import baselines, workloads
from .rows import Bench, leaving
from .table import Row
from .workloads import DTYPES, Case, Shapes

SPECS = ("feature", "filter", "channel", "tensor")
SIDES = (64, 512, 4096)  # numbers of rows and columns in the grid
LARGEST = 2**24  # the largest tensor of the series over elements
HUGE = (16384, 8192)
FOR_ALL = 10**8  # elements up to which every contender runs; eager ones take seconds a step beyond
FOR_CPU = 5 * 10**8  # elements up to which a model is measured on a CPU


def models(bench: Bench, cases: Iterable[Case], runs: int = 3) -> list[Row]:
    """The models that a CPU's memory holds, measured with all alternatives that a user could pick."""
    every = {"for_loop": baselines.for_loop_sgd, **baselines.others()}
    rows = []
    for case in (case for case in cases if workloads.elements(case.shapes) <= FOR_CPU):
        slow, most = (every, runs) if workloads.elements(case.shapes) <= FOR_ALL else ({}, 1)
        # a name of its own, because a row with a target measures one of these models too
        name = f"{case.name}, all contenders"
        options = {"suite": "models", "workload": case.name, "slow": slow, "runs": most}
        rows.append(bench.sgd(name, case.shapes, **options))
    return rows


def grid(bench: Bench, sides: Sequence[int] = SIDES, runs: int = 2) -> list[Row]:
    """Every group spec, mode and dtype on matrices of rows x columns, which are square except in fp32.

    In exact mode half of the weights are left, and each step starts from the same ones.
    """
    rows = []
    for dtype, spec, height, width in product(DTYPES, SPECS, sides, sides):
        if dtype == "fp32" or height == width:
            shapes = workloads.of_group(spec, height, width)
            size = {"filter": width, "tensor": height * width, "channel": 9 * height}.get(spec, height)
            exact = {"make": partial(leaving, 0.5, size), "reset": ("prox_sgd",)}
            for mode, how in {"sequential": {}, "exact": exact}.items():
                options: dict[str, Any] = {"suite": "grid", "dtype": dtype, "runs": runs, **how}
                options |= {"rows": height, "columns": width, "mode": mode}
                rows.append(bench.sgd(f"{spec} {height}x{width} {dtype} {mode}", shapes, spec, **options))
    return rows


def powers(low: int, high: int, factor: int = 4) -> Iterable[int]:
    while low <= high:
        yield low
        low *= factor


def scaling(
    bench: Bench, threads: int, largest: int = LARGEST, huge: tuple[int, int] = HUGE, runs: int = 2
) -> list[Row]:
    """How cost grows with elements, tensors, group length and threads; and one huge tensor."""

    def along(what: str, x: int, shapes: Shapes, group_by: str = "feature", **options: Any) -> Row:
        name = f"{what} {x}" if what in ("threads", "tensors") else f"{group_by}, {what} {x}"
        options = {"runs": runs, "suite": "scaling", "along": what, "x": x, **options}
        return bench.sgd(name, shapes, group_by, **options)

    def near(rows: int) -> Shapes:  # a matrix of about ``largest`` / 2 elements
        return workloads.matrix(rows, largest // 2 // rows)

    side = int(largest**0.5)
    rows = [along("elements", n, workloads.small(1, n)) for n in powers(largest // 4**7 or 1, largest)]
    rows += [along("tensors", n, workloads.small(n, 1024)) for n in (1, 10, 100, 1000)]
    for spec in ("feature", "filter"):
        for length in powers(16, largest // 64):
            shapes = near(length) if spec == "feature" else [near(length)[0][::-1]]
            rows.append(along("group length", length, shapes, spec))
    shapes = workloads.matrix(side, side + 32)  # rows that do not alias in the caches
    rows += [along("threads", n, shapes, threads=n) for n in powers(1, threads, 2)]
    return [*rows, along("huge", huge[0] * huge[1], workloads.matrix(*huge), runs=1)]
