"""From single runs to the table, as text and as CSV."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from ..reporting.files import as_csv
from .training import MEASURES, METHODS, Run

AXES = {
    "nonzero": "% of weights",
    "flops_nonzero": "% of FLOPs, by nonzeros",
    "flops_compacted": "% of FLOPs, compacted",
}


class Estimate(NamedTuple):
    """A mean over repetitions and its standard error (NaN with one repetition)."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        n = len(values)
        error = float(np.std(values, ddof=1)) / math.sqrt(n) if n > 1 else math.nan
        return cls(float(np.mean(values)), error)

    def __format__(self, spec: str) -> str:
        """``spec`` is that of the mean."""
        mean = format(self.mean, spec or ".1f")
        return mean if math.isnan(self.error) else f"{mean} ±{self.error:.1f}"


class Row(NamedTuple):
    """A line of the table: a method at one lambda, and an Estimate of each measure."""

    method: str
    lam: float
    values: dict[str, Estimate]


def summarise(runs: Iterable[Run]) -> list[Row]:
    """The table: methods in their order, lambdas ascending, each over its repetitions."""
    together: dict[tuple[str, float], list[Run]] = {}
    for run in runs:
        together.setdefault((run.method, run.lam), []).append(run)
    keys = sorted(together, key=lambda key: (list(METHODS).index(key[0]), key[1]))
    return [
        Row(*key, {name: Estimate.of([getattr(run, name) for run in together[key]]) for name in MEASURES})
        for key in keys
    ]


COLUMNS = {
    "accuracy": "test accuracy",
    "nonzero": "weights",
    "flops_nonzero": "FLOPs nonzero",
    "flops_compacted": "FLOPs compacted",
    "dead_groups": "dead groups",
    "dead_units": "dead units",
}
LEGEND = """\
All in %. weights: exactly nonzero. FLOPs nonzero: each layer's times its nonzero weights; compacted: without
dead inputs, units and channels. dead groups: inputs, or taps of an input channel, that no unit reads."""


def aligned(rows: Sequence[Sequence[str]], gaps: Iterable[int] = ()) -> str:
    """Rows of text as a table, the first one its header, with an empty line before each index in ``gaps``."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = [
        "  ".join(cell.ljust(n) if i == 0 else cell.rjust(n) for i, (cell, n) in enumerate(zip(row, widths)))
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * n for n in widths))
    for i in sorted(gaps, reverse=True):
        lines.insert(i + 1, "")
    return "\n".join(line.rstrip() for line in lines)


def table(rows: Sequence[Row]) -> str:
    """The rows as text."""
    cells = [["method", "lambda", *COLUMNS.values()]]
    for row in rows:
        values = (format(row.values[name]) for name in COLUMNS)
        cells.append([METHODS[row.method].label, f"{row.lam:g}", *values])
    gaps = [i + 1 for i in range(1, len(rows)) if rows[i].method != rows[i - 1].method]
    return f"{aligned(cells, gaps)}\n{LEGEND}"


def table_csv(rows: Sequence[Row]) -> str:
    """The table as CSV: mean and standard error of every measure."""
    header = ["method", "lambda", *(f"{name}{part}" for name in MEASURES for part in ("", "_se"))]
    values = ([x for name in MEASURES for x in row.values[name]] for row in rows)
    return as_csv(header, ([row.method, row.lam, *x] for row, x in zip(rows, values)))


def runs_csv(runs: Iterable[Run]) -> str:
    """Every run as CSV."""
    header = ["method", "lambda", "seed", *MEASURES]
    return as_csv(header, ([*run.job, *(getattr(run, name) for name in MEASURES)] for run in runs))
