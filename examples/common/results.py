"""Turns rows of single runs into means with confidence intervals, and into verdicts on differences."""

from __future__ import annotations

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from cges_kernels.reporting.files import as_csv

TEXT = ("data", "net", "arm")  # the columns of text; all others are numbers
FACTS = ("data", "net", "epochs")  # the settings in every row
KEYS = ("arm", "lambda", "epoch", "density")  # rows that differ only in their seed have these in common
COSTS = {
    "nonzero": "nonzero weights",
    "flops_nonzero": "FLOPs by nonzeros",
    "weights_compacted": "weights, compacted",
    "flops_compacted": "FLOPs, compacted",
}
LEVELS = (90, 80, 70, 60, 50, 40, 30, 20, 15, 10, 7, 5, 3, 2, 1)  # percent, where curves are compared
KEPT = 0.9  # of the greatest mean accuracy: at less, an arm has collapsed at that lambda and is not compared
FEW = 5  # repetitions; verdicts from fewer are hints

Row = dict[str, Any]  # FACTS, some KEYS, "seed", and the measurements


class Interval(NamedTuple):
    """A mean and half the width of its 95% confidence interval (Student's t; NaN for a single value)."""

    mean: float
    half: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Interval:
        n = len(values)
        half = stats.sem(values) * stats.t.ppf(0.975, n - 1) if n > 1 else math.nan
        return cls(float(np.mean(values)), float(half))

    def __str__(self) -> str:
        return f"{self.mean:.1f}" if math.isnan(self.half) else f"{self.mean:.1f} ± {self.half:.1f}"

    @property
    def signed(self) -> str:
        return f"{self.mean:+.2f}" if math.isnan(self.half) else f"{self.mean:+.2f} ± {self.half:.2f}"

    @property
    def verdict(self) -> str:
        """Of the claim that what is estimated is positive: the one rule for verdicts."""
        if math.isnan(self.half):
            return "undecided (one repetition decides nothing)"
        if abs(self.mean) <= self.half:
            return "undecided"
        return "holds" if self.mean > 0 else "does not hold"


class Margin(NamedTuple):
    """An arm's advantage over a rival at equal cost: the mean over levels of that cost and over seeds."""

    interval: Interval
    levels: tuple[float, ...]  # percent; none if the two cannot be compared at any

    def __str__(self) -> str:
        if not self.levels:
            return self.verdict
        levels = " to ".join(f"{level:g}%" for level in dict.fromkeys((self.levels[0], self.levels[-1])))
        return f"{self.interval.signed} ({levels}): {self.verdict}"

    @property
    def verdict(self) -> str:
        """The verdict on the claim that the advantage is positive."""
        return self.interval.verdict if self.levels else "no common level"


class Group(NamedTuple):
    """The rows that differ in nothing but their seed."""

    arm: str
    lam: float
    point: float  # epoch or density; 0 where rows have neither
    rows: list[Row]

    def interval(self, measure: str) -> Interval:
        return Interval.of([row[measure] for row in self.rows])

    def gain(self, over: Group) -> Interval:
        """The accuracy minus that of the other group, seed by seed."""
        theirs = {row["seed"]: row["accuracy"] for row in over.rows}
        return Interval.of([row["accuracy"] - theirs[row["seed"]] for row in self.rows])


def point_of(row: Row) -> float:
    """The epoch or density at which the row was measured; 0 if it has neither."""
    return float(row["epoch"] if "epoch" in row else row.get("density", 0.0))


@dataclass(frozen=True)
class Results:
    """The rows of an experiment, the labels of its arms in their order, and what every lambda was times."""

    rows: Sequence[Row]
    labels: Mapping[str, str]
    strength: float = 1.0

    @cached_property
    def groups(self) -> list[Group]:
        """Arms in their order, lambdas ascending, points in the order of training."""
        together: dict[tuple[str, float, float], list[Row]] = {}
        for row in self.rows:
            together.setdefault((row["arm"], row["lambda"], point_of(row)), []).append(row)
        order = list(self.labels)
        keys = sorted(together, key=lambda key: (order.index(key[0]), key[1]))  # stable: points stay in order
        return [Group(*key, sorted(together[key], key=lambda row: row["seed"])) for key in keys]

    @property
    def told(self) -> str:
        """The data, the network, the epochs, the number of seeds and the strength of the runs."""
        first, seeds = self.rows[0], self.seeds
        times = "" if self.strength == 1 else f", every λ times {self.strength:g}"
        return f"{first['data']}, network {first['net']}, {first['epochs']:g} epochs, {seeds} seeds{times}"

    @property
    def seeds(self) -> int:
        return len({row["seed"] for row in self.rows})

    @property
    def caution(self) -> list[str]:
        """What has to be said of the verdicts, if anything."""
        few = f"{self.seeds} of {FEW} repetitions (--seeds): take the verdicts as hints."
        return [few] if self.seeds < FEW else []

    @cached_property
    def enough(self) -> float:
        """The mean accuracy below which an arm has collapsed at a lambda."""
        return KEPT * max(group.interval("accuracy").mean for group in self.groups)

    def of(self, arm: str) -> list[Group]:
        return [group for group in self.groups if group.arm == arm]

    def at(self, point: float) -> Results:
        """The rows of one epoch or density."""
        return replace(self, rows=[row for row in self.rows if point_of(row) == point])

    def best(self, arm: str) -> Group:
        """The group of the arm at the lambda with the greatest mean accuracy on the test images."""
        return max(self.of(arm), key=lambda group: group.interval("accuracy").mean)

    def over(self, dense: str, arm: str) -> str:
        """The text for a table: how much more accurate the arm is than ``dense``, each at its best lambda."""
        best = self.best(arm)
        gain, weights = best.gain(self.best(dense)), best.interval("nonzero").mean
        return f"{gain.signed} ({weights:.0f}% of the weights): {gain.verdict}"

    def _curves(self, arm: str, x: str, y: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Per seed: (log x ascending, y), where the arm has not collapsed and something is left."""
        points: dict[int, list[tuple[float, float]]] = {}
        for group in self.of(arm):
            for row in group.rows if group.interval("accuracy").mean >= self.enough else ():
                if row[x] > 0:
                    points.setdefault(row["seed"], []).append((math.log(row[x]), row[y]))
        return {seed: tuple(np.array(sorted(curve)).T) for seed, curve in points.items()}

    def margin(self, arm: str, rival: str, x: str, y: str = "accuracy") -> Margin:
        """The arm's ``y`` minus the rival's, each interpolated over log ``x``, seed by seed.

        They are compared at those LEVELS that every curve of both covers.
        """
        ours, theirs = self._curves(arm, x, y), self._curves(rival, x, y)
        curves = [*ours.values(), *theirs.values()]
        low = max((xs[0] for xs, _ in curves), default=math.inf)
        high = min((xs[-1] for xs, _ in curves), default=-math.inf)
        levels = tuple(level for level in LEVELS if low <= math.log(level) <= high)
        if not levels or ours.keys() != theirs.keys():
            return Margin(Interval(math.nan, math.nan), ())
        at = np.log(levels)
        found = [np.interp(at, *ours[seed]) - np.interp(at, *theirs[seed]) for seed in ours]
        return Margin(Interval.of([difference.mean() for difference in found]), levels)

    def runs_csv(self) -> str:
        """Every row as it is."""
        return as_csv(list(self.rows[0]), (list(row.values()) for row in self.rows))

    def summary_csv(self) -> str:
        """The means over seeds, each with half the width of its confidence interval as ``_ci``."""
        keys = [key for key in KEYS if key in self.rows[0]]
        measures = [key for key in self.rows[0] if key not in (*FACTS, *KEYS, "seed")]
        header = [*FACTS, "seeds", *keys, *(f"{key}{part}" for key in measures for part in ("", "_ci"))]
        lines = []
        for group in self.groups:
            first = group.rows[0]
            values = [x for key in measures for x in group.interval(key)]
            lines.append([*(first[k] for k in FACTS), len(group.rows), *(first[k] for k in keys), *values])
        return as_csv(header, lines)


def read_runs(path: Path) -> list[Row]:
    """The rows of a file that :meth:`Results.runs_csv` wrote."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: value if key in TEXT else float(value) for key, value in row.items()} for row in rows]
