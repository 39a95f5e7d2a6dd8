"""What the runs say of the thesis's claims. Everything is computed; nothing is assumed to hold."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from .results import AXES, Estimate, Row, summarise
from .training import METHODS, Run

LEVELS = (90, 80, 70, 60, 50, 40, 30, 20, 15, 10, 7, 5, 3, 2, 1)  # percent, where curves are compared


class Margin(NamedTuple):
    """``y`` of one method less that of a rival where both have the same ``x``, mean over shared levels."""

    estimate: Estimate
    lowest: float  # of the levels, each a mean over repetitions
    highest: float
    levels: tuple[float, ...]  # of x, percent


def _curves(runs: Iterable[Run], method: str, x: str, y: str) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Per repetition: (log x ascending, y). Runs in which nothing is left are not on the curve."""
    points: dict[int, list[tuple[float, float]]] = {}
    for run in runs:
        if run.method == method and getattr(run, x) > 0:
            points.setdefault(run.seed, []).append((math.log(getattr(run, x)), getattr(run, y)))
    return {seed: tuple(np.array(sorted(curve)).T) for seed, curve in points.items()}


def margin(runs: Sequence[Run], method: str, rival: str, x: str, y: str = "accuracy") -> Margin | None:
    """``method`` against ``rival``, each interpolated over log x, repetition by repetition (same folds).

    Compared at those LEVELS that every curve of both covers; None where there is none.
    """
    ours, theirs = _curves(runs, method, x, y), _curves(runs, rival, x, y)
    curves = [*ours.values(), *theirs.values()]
    if not ours or ours.keys() != theirs.keys():
        return None
    low, high = max(xs[0] for xs, _ in curves), min(xs[-1] for xs, _ in curves)
    levels = tuple(level for level in LEVELS if low <= math.log(level) <= high)
    if not levels:
        return None
    at = np.log(levels)
    difference = np.array([np.interp(at, *ours[seed]) - np.interp(at, *theirs[seed]) for seed in ours])
    by_level = difference.mean(0)
    return Margin(Estimate.of(difference.mean(1)), float(by_level.min()), float(by_level.max()), levels)


def verdict(estimate: Estimate) -> str:
    """Of the claim that what is estimated is positive: two standard errors decide."""
    if math.isnan(estimate.error):
        return "undecided (one repetition has no standard error)"
    if abs(estimate.mean) <= 2 * estimate.error:
        return "undecided"
    return "holds" if estimate.mean > 0 else "does not hold"


def _compare(runs: Sequence[Run], method: str, rivals: Iterable[str], x: str) -> list[str]:
    """A line on the accuracy of ``method`` against each rival's at equal ``x``."""
    return [_line(method, rival, margin(runs, method, rival, x), "points") for rival in rivals]


def _line(method: str, rival: str, found: Margin | None, unit: str, sign: int = 1) -> str:
    """``sign`` -1: the claim is that the margin is negative."""
    name = f"   {METHODS[method].label:<4} against {METHODS[rival].label:<10}"
    if found is None:
        return f"{name}  no level that both reach"
    judged = verdict(Estimate(sign * found.estimate.mean, found.estimate.error))
    levels = f"{found.levels[0]:g}% to {found.levels[-1]:g}%"
    spread = f"{found.lowest:+.1f} to {found.highest:+.1f} from {levels}"
    return f"{name}  {found.estimate:+.1f} {unit} ({spread}): {judged}"


def _against_dense(runs: Sequence[Run]) -> list[str]:
    """Each sparse method at its most accurate lambda against l2 at its own."""
    best: dict[str, Row] = {}
    for row in summarise(runs):
        if row.method not in best or row.values["accuracy"].mean > best[row.method].values["accuracy"].mean:
            best[row.method] = row
    dense = best.pop("l2")
    baseline = {run.seed: run.accuracy for run in runs if (run.method, run.lam) == dense[:2]}
    lines = [f"   l2: {dense.values['accuracy']}% (lambda {dense.lam:g})"]
    for method, row in best.items():
        mine = [run for run in runs if (run.method, run.lam) == row[:2]]
        gain = Estimate.of([run.accuracy - baseline[run.seed] for run in mine])
        weights = f"{row.values['nonzero'].mean:.0f}% of the weights, lambda {row.lam:g}"
        lines.append(f"   {METHODS[method].label:<10}  {gain:+.1f} points ({weights}): {verdict(gain)}")
    return lines


def claims(runs: Sequence[Run]) -> str:
    """Which claims of the thesis hold here, as text."""
    repetitions = len({run.seed for run in runs})
    text = [
        "What the thesis claims, and what came here.",
        f"Margins: mean ± standard error over {repetitions} repetitions, on curves interpolated between the",
        "lambdas, averaged over levels of equal cost (in brackets: least and greatest of the levels). Two",
        "standard errors decide. Learning rate, epochs and lambda ranges come from trials on the digits, for",
        "stable training and curves from dense to sparse; none was set to make a method win.",
    ]
    for number, (x, label) in enumerate(AXES.items(), 1):
        lines = _compare(runs, "cges", ("l1", "gs_filter", "gs_feature", "es"), x)
        text += ["", f"{number}. CGES is more accurate at equal {label}", *lines]
    text += ["", "4. Sparsity improves on the dense network (each at its most accurate lambda, as tested)"]
    text += _against_dense(runs)
    text += [
        "",
        "5. Exclusive sparsity: fewer classes read a feature of the last layer (at equal % of it)",
    ]
    measures: dict[str, Any] = dict(x="last_nonzero", y="classes_per_feature")
    for method in ("es", "cges"):
        for rival in ("l1", "gs_feature"):
            text.append(_line(method, rival, margin(runs, method, rival, **measures), "classes", sign=-1))
    return "\n".join(text)
