"""From the rows of single runs to means with confidence intervals, and to margins between arms."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
from scipy import stats

from cges_kernels.demo import claims
from cges_kernels.demo.results import Estimate
from cges_kernels.reporting.files import as_csv

from .experiments import EXPERIMENTS, Row

RESULTS = Path(__file__).parent.parent / "results" / "accuracy"
TEXT = ("data", "net", "arm")  # columns that are no numbers
FACTS = ("data", "net", "epochs")  # of every row
KEYS = ("arm", "lambda", "epoch", "density")  # what rows of different seeds have in common
MEASURES = ("accuracy", "nonzero", "flops_nonzero", "weights_compacted", "flops_compacted")


class Interval(NamedTuple):
    """A mean and half the width of its 95% confidence interval (Student's t; NaN for a single value)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        return cls.from_estimate(Estimate.of(values), len(values))

    @classmethod
    def from_estimate(cls, estimate: Estimate, n: int) -> Interval:
        return cls(estimate.mean, estimate.error * float(stats.t.ppf(0.975, n - 1)) if n > 1 else math.nan)

    def __neg__(self) -> Interval:
        return Interval(-self.mean, self.half)

    def __str__(self) -> str:
        return f"{self.mean:.1f} ± {self.half:.1f}"

    @property
    def signed(self) -> str:
        return f"{self.mean:+.2f} ± {self.half:.2f}"

    @property
    def verdict(self) -> str:
        """Of the claim that what is estimated is positive."""
        if not abs(self.mean) > self.half:  # so NaN is undecided
            return "undecided"
        return "holds" if self.mean > 0 else "does not hold"


class Group(NamedTuple):
    """The rows that differ in nothing but their seed."""

    arm: str
    lam: float
    point: float | None  # epoch or density, where rows have one
    rows: list[Row]

    def interval(self, measure: str) -> Interval:
        return Interval.of([row[measure] for row in self.rows])


def grouped(name: str, rows: Iterable[Row]) -> list[Group]:
    """Arms in the experiment's order, lambdas ascending, points in the order of training."""
    together: dict[tuple[str, float, float | None], list[Row]] = {}
    for row in rows:
        point = row.get("epoch", row.get("density"))
        together.setdefault((row["arm"], row["lambda"], point), []).append(row)
    order = EXPERIMENTS[name].order
    keys = sorted(together, key=lambda key: (order.index(key[0]), key[1]))  # stable: points stay in order
    return [Group(*key, sorted(together[key], key=lambda row: row["seed"])) for key in keys]


def runs_csv(rows: Sequence[Row]) -> str:
    """Every row as it is."""
    header = list(rows[0])
    return as_csv(header, ([row[key] for key in header] for row in rows))


def read_runs(path: Path) -> list[Row]:
    """What :func:`runs_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: value if key in TEXT else float(value) for key, value in row.items()} for row in rows]


def summary_csv(name: str, rows: Sequence[Row]) -> str:
    """The means over seeds, each with half the width of its confidence interval as ``_ci``."""
    keys, measures = ([key for key in of if key in rows[0]] for of in (KEYS, MEASURES))
    header = [*FACTS, "seeds", *keys, *(f"{measure}{part}" for measure in measures for part in ("", "_ci"))]
    lines = []
    for group in grouped(name, rows):
        first = group.rows[0]
        values = [x for measure in measures for x in group.interval(measure)]
        facts = [first[key] for key in FACTS]
        lines.append([*facts, len(group.rows), *(first[key] for key in keys), *values])
    return as_csv(header, lines)


class Margin(NamedTuple):
    """Accuracy of an arm less a rival's at equal cost: in points, mean over levels (percent) and seeds."""

    interval: Interval
    levels: tuple[float, ...]

    def __str__(self) -> str:
        levels = f"{self.levels[0]:g}%"
        if len(self.levels) > 1:
            levels += f" to {self.levels[-1]:g}%"
        return f"{self.interval.signed} ({levels}): {self.interval.verdict}"


def margin(rows: Iterable[Row], arm: str, rival: str, x: str) -> Margin | None:
    """Both interpolated over log ``x``, seed by seed, as the demo does; None where they share no level."""
    runs = [
        SimpleNamespace(method=row["arm"], **{k: row[k] for k in ("seed", "accuracy", x)}) for row in rows
    ]
    found = claims.margin(runs, arm, rival, x)
    if found is None:
        return None
    seeds = len({run.seed for run in runs if run.method == arm})
    return Margin(Interval.from_estimate(found.estimate, seeds), found.levels)


def best(name: str, rows: Iterable[Row], arm: str) -> Group:
    """The arm at the lambda of its greatest mean accuracy, as tested."""
    mine = [group for group in grouped(name, rows) if group.arm == arm]
    return max(mine, key=lambda group: group.interval("accuracy").mean)


def gain(group: Group, over: Group) -> Interval:
    """Accuracy of one less the other's, seed by seed."""
    theirs = {row["seed"]: row["accuracy"] for row in over.rows}
    return Interval.of([row["accuracy"] - theirs[row["seed"]] for row in group.rows])


def epochs_to(rows: Iterable[Row], arm: str, share: float, rival: str) -> dict[float, float]:
    """Per seed, the first epoch at which ``arm`` has ``share`` of ``rival``'s last accuracy; inf: none."""
    rows = list(rows)
    found = {}
    for seed in sorted({row["seed"] for row in rows}):
        of = {a: [r for r in rows if r["seed"] == seed and r["arm"] == a] for a in (arm, rival)}
        wanted = share * max(of[rival], key=lambda row: row["epoch"])["accuracy"]
        found[seed] = min((r["epoch"] for r in of[arm] if r["accuracy"] >= wanted), default=np.inf)
    return found
