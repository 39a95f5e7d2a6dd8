"""The figures, each with the numbers it shows as CSV beside it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from .. import prox
from ..reporting.figures import plot_filters, plot_weights
from ..reporting.files import as_csv
from .results import AXES, Row, summarise, table_csv
from .training import METHODS, Run

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

# Okabe and Ito's palette: told apart with any colour vision, and by marker in grey.
STYLES = {
    "l2": ("#000000", "s"),
    "l1": ("#E69F00", "v"),
    "gs_filter": ("#56B4E9", "D"),
    "gs_feature": ("#0072B2", "^"),
    "es": ("#009E73", "P"),
    "cges": ("#D55E00", "o"),
}
RC: dict[RcKeyType, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
}
SHOWN = 30.0  # percent of weights nonzero at which the methods' weights are shown, or as near as they come


def percent_axis(axis: Any, low: float) -> None:
    """A log axis from ``low`` to 100 with plain numbers at 1, 2, 5, 10, ..."""
    axis.axes.set_xscale("log")
    axis.axes.set_xlim(low, 115)
    axis.set_major_locator(LogLocator(10, subs=(1, 2, 5)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def accuracy(runs: Sequence[Run]) -> tuple[Figure, str]:
    """Test accuracy over three costs (thesis, Figure 3)."""
    rows = summarise(runs)
    figure = Figure(figsize=(13, 4.6), layout="constrained")
    panels: Sequence[Axes] = figure.subplots(1, 3, sharey=True)
    for panel, (x, label) in zip(panels, AXES.items()):
        for method, (colour, marker) in STYLES.items():
            _curve(panel, [row for row in rows if row.method == method], x, colour, marker)
        positive = [row.values[x].mean for row in rows if row.values[x].mean > 0]
        percent_axis(panel.xaxis, max(0.5, 0.8 * min(positive)))
        panel.set_xlabel(label)
    best = max(row.values["accuracy"].mean for row in rows)
    worst = min(row.values["accuracy"].mean for row in rows)
    panels[0].set_ylim(max(worst - 1, best - 20), best + 1.5)  # what falls further leaves the picture
    panels[0].set_ylabel("test accuracy, %")
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
    figure.suptitle("Accuracy and cost: mean and standard error over repetitions")
    return figure, table_csv(rows)


def _curve(panel: Axes, rows: Sequence[Row], x: str, colour: str, marker: str) -> None:
    points = sorted((row.values[x].mean, *row.values["accuracy"], row.values[x].error) for row in rows)
    if not points:
        return
    xs, ys, y_errors, x_errors = (np.nan_to_num(np.array(column)) for column in zip(*points))
    label = METHODS[rows[0].method].label
    style: dict[str, Any] = dict(
        color=colour, marker=marker, markersize=6, linewidth=1.6, elinewidth=1, capsize=2
    )
    panel.errorbar(xs, ys, y_errors, x_errors, label=label, **style)


def shown_runs(runs: Sequence[Run]) -> dict[str, Run]:
    """Of each method, the run of the first repetition whose % of weights is nearest to SHOWN (as ratios)."""
    seed = min(run.seed for run in runs)
    found: dict[str, Run] = {}
    for method in METHODS:
        mine = [run for run in runs if run.method == method and run.seed == seed]
        if mine:
            found[method] = min(mine, key=lambda run: abs(math.log(max(run.nonzero, 1e-3) / SHOWN)))
    return found


def _title(run: Run, nonzero: float) -> str:
    label = METHODS[run.method].label
    nonzeros = f"Nonzero: {nonzero:.0f}% here, {run.nonzero:.0f}% of all weights"
    return f"{label}, λ = {run.lam:g}.  {nonzeros}.  Accuracy {run.accuracy:.1f}%"


def last_layer(runs: Sequence[Run]) -> tuple[Figure, str]:
    """The last layer's weights of each method (thesis, Figure 5)."""
    shown = shown_runs(runs)
    weights = {_title(run, run.last_nonzero): run.last for run in shown.values()}
    figure = plot_weights(weights, xlabel="feature (unit of the layer below)", ylabel="class")
    for panel in figure.axes[: len(shown)]:
        panel.set_yticks([0, 3, 6, 9])
    return figure, _weights_csv(shown, "last", ("class", "feature"))


def first_layer(runs: Sequence[Run]) -> tuple[Figure, str]:
    """The first layer's filters of each method (thesis, Figure 6)."""
    shown = shown_runs(runs)
    filters = {_title(run, 100 * float(np.mean(run.first != 0))): run.first for run in shown.values()}
    return plot_filters(filters), _weights_csv(shown, "first", ("filter", "channel", "row", "column"))


def _weights_csv(shown: dict[str, Run], name: str, axes: Sequence[str]) -> str:
    rows = (
        [run.method, run.lam, *index, float(weight)]
        for run in shown.values()
        for index, weight in np.ndenumerate(getattr(run, name))
    )
    return as_csv(["method", "lambda", *axes, "weight"], rows)


def nonzero_left(b_times_n: float, prox_mode: str, n: int = 1024, groups: int = 64) -> float:
    """% nonzero after one exclusive step at b = b_times_n / n on normal random groups of n."""
    w = torch.randn(n, groups, generator=torch.Generator().manual_seed(0))
    left = prox(w, exclusive_lasso=b_times_n / n, prox_mode=prox_mode)
    return 100 * int(torch.count_nonzero(left)) / w.numel()


def nonzero_expected(b_times_n: float, prox_mode: str) -> float:
    """The same for infinitely large groups: P(|z| > t), z normal.

    sequential: t = bn * E|z|.  exact: t = bn * E max(|z| - t, 0), by bisection.
    """

    def expected_soft(t: float) -> float:
        return math.sqrt(2 / math.pi) * math.exp(-t * t / 2) - t * math.erfc(t / math.sqrt(2))

    high = b_times_n * expected_soft(0)
    if prox_mode == "sequential":
        return 100 * math.erfc(high / math.sqrt(2))
    low = 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if middle < b_times_n * expected_soft(middle) else (low, middle)
    return 100 * math.erfc(low / math.sqrt(2))


def modes(runs: Sequence[Run]) -> tuple[Figure, str]:
    """% nonzero that sequential and exact mode leave over b*n; independent of ``runs``."""
    del runs
    points, line = np.geomspace(0.1, 30, 11), np.geomspace(0.08, 40, 120)
    figure = Figure(figsize=(6.6, 4.4), layout="constrained")
    panel = figure.subplots()
    header, columns = ["b_times_n"], [points.tolist()]
    looks = {"sequential": ("#D55E00", "o", "--"), "exact": ("#0072B2", "s", "-")}
    for mode, (colour, marker, dashes) in looks.items():
        measured = [nonzero_left(x, mode) for x in points]
        expected = [nonzero_expected(x, mode) for x in points]
        panel.plot(line, [nonzero_expected(x, mode) for x in line], dashes, color=colour)
        panel.plot(points, measured, marker, color=colour)
        panel.plot([], [], dashes, marker=marker, color=colour, label=mode)
        header += [f"{mode}_measured", f"{mode}_expected"]
        columns += [measured, expected]
    panel.axvspan(1, line[-1], color="#000000", alpha=0.06, linewidth=0)
    panel.text(1.1, 97, "ProxSGD warns here", va="top", fontsize=9)
    panel.set_xscale("log")
    panel.set_xlim(line[0], line[-1])
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_ylim(-2, 100)
    panel.set_xlabel("b·n  (lr × exclusive_lasso × group size)")
    panel.set_ylabel("% of weights nonzero after one step")
    panel.set_title("Normal random groups: points n = 1024, lines n → ∞", fontsize=10)
    panel.legend(loc="lower left")
    return figure, as_csv(header, zip(*columns))


FIGURES: dict[str, Callable[[Sequence[Run]], tuple[Figure, str]]] = {
    "accuracy": accuracy,
    "last_layer": last_layer,
    "first_layer": first_layer,
    "modes": modes,
}


def write_figures(runs: Sequence[Run], folder: Path) -> None:
    """``name.png`` and ``name.csv`` of every figure."""
    for name, draw in FIGURES.items():
        with matplotlib.rc_context(RC):
            figure, text = draw(runs)
            figure.savefig(folder / f"{name}.png")
        (folder / f"{name}.csv").write_text(text)
